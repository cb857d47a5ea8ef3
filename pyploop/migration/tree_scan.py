# SPDX-License-Identifier: Apache-2.0
"""What a directory tree contains, and which of its files may have changed.

The kernel sets a file's ctime at each change of contents or attributes, and nobody can set
it back.  It misses one thing: a mapped page that a program has written once is written
again without a new ctime, until it has been written back.  `Since` says from when on a
ctime counts.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Set

from pyploop.errors import MigrateError, VzExitCode
from pyploop.system import kernel, mount_table
from pyploop.system.tree_walk import FLAGS, walk

_CLOCK_REALTIME_COARSE = 5
"""From linux/time.h; Python has no name for it."""
SECOND = 1_000_000_000
LONGEST_PATH = 4096 - len("/tree/") - 256
"""Bytes of a folder's path below the tree's top: PATH_MAX, without what rsync puts before
it and the name of a file in it."""
TIMED = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"))
"""File systems that set a file's times when a mapped page is first written to.  tmpfs does
not.  Others are not known."""


def entries(root: str) -> Iterator[tuple[bytes, os.stat_result]]:
    """(path below root, lstat) of everything in the tree, a folder before its contents.
    Other file systems are not entered.  What is removed meanwhile is left out.  A folder
    that the container replaces by a link is not followed.
    MigrateError(6) for a path that is too long for rsync."""
    for names, _, listing in walk(root):
        above = os.fsencode("".join(f"{name}/" for name in names))
        if len(above) >= LONGEST_PATH:
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"{root}/{os.fsdecode(above[:100])}...: folders are nested too deeply for rsync: "
                f"the path has {len(above)} bytes, and less than {LONGEST_PATH} are possible",
                path=root,
            )
        for entry in listing:
            try:
                st = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield above + os.fsencode(entry.name), st


def check_source(path: str) -> int:
    """Bytes that the tree's files take.  MigrateError(6) unless the path is a directory that
    lies on one file system."""
    if not os.path.isdir(path) or os.path.islink(path):
        raise MigrateError(VzExitCode.COPY_FAILED, f"{path} is not a directory", path=path)
    device = os.stat(path).st_dev
    seen: set[int] = set()
    total = 0
    for name, st in entries(path):
        if st.st_dev != device:
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"{path}/{os.fsdecode(name)} belongs to another file system than {path}, so it "
                "would not be copied",
                path=path,
                hint="unmount it, or name it as a disk or tree of its own in migrate.toml",
            )
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            if st.st_ino in seen:
                continue
            seen.add(st.st_ino)
        total += st.st_blocks * 512
    return total


def suspects(root: str, since: int, first: int) -> dict[int, list[bytes]]:
    """Files that may have changed: inode -> its names.  These have a ctime of `since`
    (nanoseconds) or later.  In a folder that may have been moved since then, those of
    `first` or later count too, because an earlier scan may have missed them."""
    found: dict[int, list[bytes]] = {}
    moved: set[bytes] = set()
    for name, st in entries(root):
        here = os.path.dirname(name) in moved
        if stat.S_ISDIR(st.st_mode):
            if here or st.st_ctime_ns >= since:
                moved.add(name)
        elif stat.S_ISREG(st.st_mode) and st.st_ctime_ns >= (first if here else since):
            found.setdefault(st.st_ino, []).append(name)
    return found


def named(root: str, names: Set[bytes] | None) -> dict[int, list[bytes]]:
    """Files that have one of these names: inode -> all its names.  names: None for all files."""
    found: dict[int, list[bytes]] = {}
    wanted: set[int] = set()
    for name, st in entries(root):
        if stat.S_ISREG(st.st_mode):
            if is_one := names is None or name in names:
                wanted.add(st.st_ino)
            if is_one or st.st_nlink > 1:
                found.setdefault(st.st_ino, []).append(name)
    return {inode: found[inode] for inode in wanted}


class Since:
    """The beginning of a pass over a tree.  A file that was read after it has the same
    contents now, unless its ctime is `threshold()` or later."""

    def __init__(self, root: str) -> None:
        # The clock that file times are taken from.  In whole seconds, because some file
        # systems store no more.
        now = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        self._at = now // SECOND * SECOND
        self._offset = _clock_offset()
        # After this, a write to a mapped page sets a new ctime again.
        fd = os.open(root, FLAGS)
        try:
            kernel.syncfs(fd, root)
        finally:
            os.close(fd)

    def threshold(self) -> int:
        """Nanoseconds.  Earlier, if the clock was set back since."""
        back = self._offset - _clock_offset()
        return self._at - back - SECOND if back > SECOND // 10 else self._at


def _clock_offset() -> int:
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def file_system(path: str) -> str:
    """The type of the path's file system, as /proc names it."""
    entry = mount_table.holding_by_name(os.path.realpath(path))
    return "?" if entry is None else entry.fstype
