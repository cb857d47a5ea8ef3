# SPDX-License-Identifier: Apache-2.0
"""Copy one disk from one host to another, both ends.

Data flows one way: tracker -> source pump (read, classify, frame) -> target => receiver
-> target file.

    sender        the story of one copy; its stages share a `context`:
    precopy       the first pass, and rounds while the source runs
    approach      target durable, freeze rehearsed, one more round
    freeze_stage  stop, freeze, last blocks, durable, thaw
    freeze_policy when to go on, to freeze, or to give up (pure), by `measurements`
    target        what the sender asks of the place where the copy goes
    receiver      the other end: stream -> target file

May import `trackers`, `freeze`, `disks` and what is below them.  A new dialect or kind
of target is a class with the methods of `target.Output`, and a line in
`target_registry`.
"""
