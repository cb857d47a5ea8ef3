# SPDX-License-Identifier: Apache-2.0
"""One disk from one host to another, both ends.

Data flow one way: tracker -> source pump (read, classify, frame) -> target => receiver
-> target file.  `sender` is the story of one copy.  `target` is what the sender asks of
the place where the copy goes: a new dialect or kind of target is a class with those
methods, and a line in `target_registry`.  It may import `trackers`, `freeze`, `disks`
and what is below.
"""
