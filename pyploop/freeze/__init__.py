# SPDX-License-Identifier: Apache-2.0
"""Stop and freeze the source for the last blocks, and undo that.

    session      all stops and freezes of one copy, in order; undone in reverse
    deadline     how long that may last (pure, given a clock)
    stoppers     one class per kind of stop spec: cmd, cgroup, vzctl, fs
    filesystems  syncfs, FIFREEZE and FITHAW of the file systems of the source
    throttle     slows the writer down before the freeze

Invariant: whatever freezes, thaws on every path (pyploop.undo.ledger).

May import `undo`, `system`, `report` and what is below them; knows nothing of
disks or copies.  A new kind of stop is a class with the methods of
`stoppers.Stopper`, a line in `stoppers.build` and one in `stoppers.parse_spec`.
"""

from pyploop.freeze.command import run_command
from pyploop.freeze.filesystems import FileSystems

__all__ = ["FileSystems", "run_command"]
