# SPDX-License-Identifier: Apache-2.0
"""How the target is written: through the page cache, or past it (O_DIRECT).

Past it costs less of the CPU, leaves other processes' data in the page cache, and leaves
nothing for fdatasync to wait for.  It needs a disk below: on tmpfs there is none, and
other file systems (btrfs with checksums, network file systems) copy the data anyway.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Literal

from pyploop.disks import backing
from pyploop.disks.backing import Below
from pyploop.system import kernel
from pyploop.units import BLOCK, SECTOR

Write = Literal["auto", "direct", "buffered"]
WRITES: tuple[Write, ...] = ("auto", "direct", "buffered")

ON_DISKS = ("ext2", "ext3", "ext4", "xfs")
"""Where `auto` writes past the page cache.  These allocate ahead, too (csrc/ahead.h)."""
WRITERS = 4
"""Direct writes under way at a time: more make no disk here faster."""
DEFAULT_ALIGNMENT = (BLOCK, SECTOR)
"""Of position and length, and of memory, when the kernel does not say: no disk has larger
sectors."""


@dataclass(frozen=True)
class WriteMode:
    """How an open target is written."""

    words: str
    """For the log and the summary; empty: it is not this side that writes."""
    direct: tuple[int, int] | None = None
    """The alignments of O_DIRECT (DEFAULT_ALIGNMENT); None: through the page cache."""
    ahead: bool = False
    """Room is allocated before it is written."""

    def report(self, direct_bytes: int, *, lanes: bool = False) -> str:
        """`words`, after so many bytes were written past the page cache.  lanes: several
        streams were written to the target; one descriptor cannot be both ways for them."""
        if self.direct and lanes:
            return f"buffered since lanes took part, and {self.words} before that"
        if self.direct and not direct_bytes:
            return f"buffered ({self.words} was refused, or nothing was a whole block)"
        return self.words


OTHER_SIDE = WriteMode("")
PRIOR = WriteMode("buffered (most of the target is read, and little is written)")
"""Of a target with older contents.  Pages that a read has brought in would be in the way of
direct writes beside them: the kernel then fails a later fdatasync."""


def _buffered(why: str) -> WriteMode:
    return WriteMode(f"buffered ({why})")


def choose(fd: int, path: str, asked: Write, below: Below | None = None) -> WriteMode:
    """How to write the open file or device.  below: what lies below it, if that was found
    already.  OSError when it cannot be looked at."""
    if asked == "buffered":
        return _buffered("--write")
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return _direct(fd, path, ahead=False)
    fstype = _file_system(backing.of_file(fd) if below is None else below)
    if fstype in backing.IN_MEMORY:
        return _buffered(f"{fstype} has no disk")
    if asked == "auto" and fstype not in ON_DISKS:
        return _buffered(f"on {fstype or 'an unknown file system'}; --write direct is tried there")
    return _direct(fd, path, ahead=fstype in ON_DISKS)


def _direct(fd: int, path: str, *, ahead: bool) -> WriteMode:
    alignment = kernel.direct_alignment(fd, path) or DEFAULT_ALIGNMENT
    if not all(alignment):
        return _buffered("the file system does not take O_DIRECT for this file")
    return WriteMode(f"O_DIRECT, {WRITERS} writes at a time", alignment, ahead)


def _file_system(below: Below) -> str:
    """The type of the file system that has the blocks: not that of an overlay above it."""
    types = [fs.fstype for fs in below.file_systems if fs.fstype != "overlay"]
    return types[0] if types else ""
