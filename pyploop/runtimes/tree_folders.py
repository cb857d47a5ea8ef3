# SPDX-License-Identifier: Apache-2.0
"""The folders of directory trees: the free place on the target, and the removal on the
source."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Tree, volumes
from pyploop.system import mount_table, removal


def check_free(tree: Tree, size: int) -> None:
    """On the target: nothing is in the way, and there is room for `size` bytes."""
    path = Path(tree.path)
    if os.path.lexists(path):
        if path.is_symlink() or not path.is_dir():
            raise MigrateError(
                VzExitCode.EXISTS, f"{path}, where a tree goes, is not a directory", path=tree.path
            )
        if any(path.iterdir()):
            raise MigrateError(
                VzExitCode.EXISTS,
                f"{path}, where a tree goes, is not empty",
                path=tree.path,
                hint=volumes.LEFT,
            )
    folder = path if path.is_dir() else volumes.existing_parent(tree.path)
    st = os.statvfs(folder)
    room = st.f_bavail * st.f_frsize
    if room < size:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{folder} has room for {room >> 20} MiB, but the tree {path} needs {size >> 20} MiB",
            path=str(folder),
        )


def remove_contents(path: str) -> None:
    """Empty a directory, if it is there.  OSError: EBUSY when something is mounted in it,
    which does not belong to the container; others name what could not be removed."""
    if below := mount_table.mount_points_below(os.path.realpath(path)):
        raise OSError(errno.EBUSY, "something is mounted there", below[-1])
    removal.remove_contents(path)
