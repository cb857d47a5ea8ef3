# SPDX-License-Identifier: Apache-2.0
"""A chain of memory images, the same at both ends: folders `1`, `2` … of the
pre-dumps and `images` of the dump, each with a link `parent` to the one before.

At the target nothing of it comes over the wire but numbers, which must be the
next ones.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pyploop.errors import MigrateError, ProtocolError, VzExitCode

LONGEST = 20
"""Pre-dumps of one migration."""
DUMP = "images"


def folder_of(top: Path, number: int) -> Path:
    """number: of the pre-dump, 0 for the dump."""
    return top / (str(number) if number else DUMP)


def check_room(top: Path, room: int) -> None:
    """MigrateError(6) when the file system has not so many bytes left."""
    st = os.statvfs(top)
    free = st.f_bavail * st.f_frsize
    if free < room:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{top} has room for {free >> 20} MiB of memory, not {room >> 20}",
        )


class Chain:
    """The target's."""

    def __init__(self, top: Path) -> None:
        self._top = top
        self.length = 0
        self._dumped = False

    def check(self, number: int, parent: int) -> None:
        """ProtocolError unless `append` may come with these."""
        wanted = self.length + 1 if number else 0
        parents = (self.length,) if number else (0, self.length)
        whole = type(number) is int and type(parent) is int
        if (
            self._dumped
            or not whole
            or number != wanted
            or parent not in parents
            or number > LONGEST
        ):
            raise ProtocolError(f"agent protocol: no memory round {number!r} after {parent!r}")

    def append(self, number: int, parent: int) -> Path:
        """The new folder of a pre-dump, or (0) of the dump; parent: 0 for none,
        which for the dump drops the pre-dumps."""
        self.check(number, parent)
        if not parent:
            self.drop()
        folder = folder_of(self._top, number)
        folder.mkdir(mode=0o700)
        if parent:
            (folder / "parent").symlink_to(f"../{parent}")
        self.length = number or self.length
        self._dumped = not number
        return folder

    def drop(self) -> None:
        """The pre-dumps go: a later one failed, and what it should have had is lost."""
        for number in range(1, self.length + 1):
            shutil.rmtree(folder_of(self._top, number), ignore_errors=True)
        self.length = 0
