# SPDX-License-Identifier: Apache-2.0
"""Files of a tree that nobody can remove, not even root, until their flag is taken away."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Tree
from pyploop.system import kernel
from pyploop.system.tree_walk import walk

MOST = 8
"""Files that are named."""


def check(trees: Sequence[Tree]) -> None:
    """MigrateError(6) when a tree has an immutable or append-only file.  It would be left here
    after the container has moved, and its copy would not have the flag."""
    found = []
    for tree in trees:
        for names, fd, listing in walk(tree.path):
            for entry in listing:
                with contextlib.suppress(OSError):  # gone meanwhile
                    if not entry.is_symlink() and kernel.is_immutable(fd, entry.name):
                        found.append(os.path.join(tree.path, *names, entry.name))
    if found:
        more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{', '.join(found[:MOST])}{more}: immutable or append-only, so the source could not "
            "remove it afterwards",
            path=found[0],
            hint="take the flag away (chattr -i -a), and set it again on the target; or keep the "
            "source's files (-r no)",
        )
