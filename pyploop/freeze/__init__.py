# SPDX-License-Identifier: Apache-2.0
"""What is stopped and frozen for the last blocks, and how it is undone.

    stoppers     one stop spec each: a command, a cgroup, a container, a file system
    filesystems  syncfs, FIFREEZE, FITHAW of what is mounted from the source
    hold         all of it, in order; undone in reverse

Invariant: whatever freezes, thaws on every path (pyploop.undo.ledger).
"""

from pyploop.freeze.command import run_command
from pyploop.freeze.filesystems import FileSystems

__all__ = ["FileSystems", "run_command"]
