# SPDX-License-Identifier: Apache-2.0
"""The users of a source, and the writes to it that no tracker sees.

- `related_devices`: the block devices that share bytes with the source.
- `users`: the file systems, swap spaces, drivers and processes that use these bytes.
- `untracked_writes`: writes that do not pass the source's request queue.
- `io_accounting`: keeps the kernel's accounting of a disk switched on.
- `monitor`: looks at all of this before, during and at the end of a copy.

A new kind of user gets a method in `users._Finder`, with what the person can do about
it.  This package may import `undo` and the packages below it.
"""
