# SPDX-License-Identifier: Apache-2.0
"""A chain of memory images.  Both ends have the same: folders `1`, `2` … for the
pre-dumps and `images` for the dump, each with a link `parent` to the folder before it.

The target makes these names itself.  Only numbers come over the wire, and each must be
the next one.
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
    """number: of the pre-dump; 0: the dump."""
    return top / (str(number) if number else DUMP)


def check_room(top: Path, room: int) -> None:
    """MigrateError(6) when the file system has fewer than `room` bytes left."""
    st = os.statvfs(top)
    free = st.f_bavail * st.f_frsize
    if free < room:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{top} has room for {free >> 20} MiB of memory images, and {room >> 20} MiB are "
            "needed",
            path=str(top),
            hint="make room there, or set images_dir in migrate.toml to a larger tmpfs",
        )


class Chain:
    """The chain at the target."""

    def __init__(self, top: Path) -> None:
        self._top = top
        self.length = 0
        self._dumped = False

    def check(self, number: int, parent: int) -> None:
        """ProtocolError unless `append` is allowed with these numbers."""
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
            raise ProtocolError(
                f"agent protocol: no memory round {number!r} with the parent {parent!r} is "
                f"possible now: {self.length} rounds are here"
                + (", and the dump" if self._dumped else "")
            )

    def append(self, number: int, parent: int) -> Path:
        """Make the folder of a pre-dump, or (0) of the dump.  parent: 0 for none; the
        pre-dumps are then removed."""
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
        """Remove the pre-dumps: a later one failed, and the changes that it should have
        contained are lost."""
        for number in range(1, self.length + 1):
            shutil.rmtree(folder_of(self._top, number), ignore_errors=True)
        self.length = 0
