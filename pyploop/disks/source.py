# SPDX-License-Identifier: Apache-2.0
"""The source of a copy, open: what it is, how it is read, who uses it.

Invariant: a device is never read through its own page cache.  With a file
system mounted on it that cache is stale; O_DIRECT is right, and so is the
backing file of a loop device, which is where the loop driver itself reads.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Literal

from pyploop.disks.identity import Identity
from pyploop.disks.tail import Tail
from pyploop.errors import DeviceControlError, ReadError
from pyploop.system import kernel
from pyploop.system.file_extents import data_extents
from pyploop.system.mount_table import Mount
from pyploop.system.sysblock import BlockDevice
from pyploop.units import MIB, SECTOR
from pyploop.usage.monitor import Monitor
from pyploop.usage.related_devices import RelatedDevices

Kind = Literal["block", "file", "ploop"]


@dataclass
class Source:
    """An open source.  All positions of the copy count from its first byte,
    which is byte `base` of `fd`."""

    path: str
    kind: Kind
    size: int
    fd: int
    base: int = 0
    align: int = 1
    """Alignment of reads from `fd`, bytes; 1: buffered."""
    tail: Tail | None = None
    """The end that is no whole sector of the device: O_DIRECT cannot read it."""
    io_mode: str = ""
    """How it is read, in words, for the log and the summary."""
    sparse_fd: int | None = None
    """A file that knows the holes (SEEK_HOLE), or None."""
    sparse_base: int = 0
    """Where the source starts in `sparse_fd`."""
    block: BlockDevice | None = None
    mounts: list[Mount] = field(default_factory=list)
    cluster: int = MIB
    image: str = ""
    """What is being sent, for `Sending IMAGE`."""
    image_format: str = "raw"
    control_fd: int = -1
    """The open device that takes ioctls, when `fd` is another file."""
    related: RelatedDevices | None = None
    """The devices that share bytes with a block device; None: not one."""
    monitor: Monitor | None = None
    """Who uses it; None: a ploop device, whose driver tracks all writes."""
    notes: list[str] = field(default_factory=list)
    """What its copy should say; grows."""
    _holes_unknown: bool = False
    identities: list[Identity] = field(default_factory=list)
    """What each device showed through which the bytes are reached."""
    _owned: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def close(self) -> None:
        self._owned.close()

    @property
    def is_image(self) -> bool:
        """What is copied is the image file `image` below a device, in its clusters:
        the top delta of a ploop device, whose driver tracks the bytes of that file."""
        return self.kind == "ploop"

    @property
    def must_be_mounted(self) -> bool:
        """It can be copied only while a file system on it can be frozen.  Of a ploop
        device nothing else stops all writes to its image."""
        return self.kind == "ploop"

    @property
    def queue(self) -> BlockDevice | None:
        """The block device, and the part of it, that all writes to the source pass:
        the source's own, or that on which it lies."""
        return self.block if self.related is None else self.related.queue

    def check_size(self) -> None:
        """ReadError when the size is not what it was when it was opened."""
        if self.kind == "block":
            size = kernel.device_size(self.control_fd, self.path)
        else:
            size = os.fstat(self.fd).st_size
        if size != self.size:
            raise ReadError(
                f"{self.path} had {self.size} bytes at the start and has {size} now: start again; "
                "no target was made"
            )

    def check_same(self) -> None:
        """Fails when the source's size, or who uses it, is not what it was at the
        last look: nothing of that was tracked."""
        self.check_device()
        self.check_size()
        if self.monitor is not None:
            self.monitor.check_end()

    def check_device(self) -> None:
        """Fails when the device, or one on which it lies, shows something else than
        when it was opened."""
        for identity in self.identities:
            identity.check()

    def write_back(self) -> None:
        """Write back what was written through a device's own page cache, or into a
        plain file."""
        if self.monitor is not None:
            self.monitor.write_back()
        self.write_back_file()

    def write_back_file(self) -> None:
        """The same of a plain file only."""
        if self.kind == "file":
            try:
                kernel.write_back(self.fd, self.path)
            except OSError as e:
                raise DeviceControlError.of(f"cannot write back {self.path}", e) from e

    def holes(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(data, holes): both ascending and disjoint, together the whole
        source.  Without a file that knows, everything is data."""
        if self.sparse_fd is None or _has_all_pages(self.sparse_fd, self.path):
            return ([(0, self.size)] if self.size else []), []
        base, pos = self.sparse_base, 0
        data: list[tuple[int, int]] = []
        holes: list[tuple[int, int]] = []
        for first, last in data_extents(self.sparse_fd, base, base + self.size, self._note_once):
            if first - base > pos:
                holes.append((pos, first - base))
            pos = last - base
            data.append((first - base, pos))
        if pos < self.size:
            holes.append((pos, self.size))
        return data, holes

    def _note_once(self, why: str) -> None:
        if not self._holes_unknown:
            self._holes_unknown = True
            self.notes.append(f"{self.path}: {why}")


def _has_all_pages(fd: int, path: str) -> bool:
    """tmpfs goes through a file page by page to find a hole (10 ms a GiB), and
    counts exactly those it has.  Elsewhere what is allocated may still be a hole."""
    st = os.fstat(fd)
    return st.st_blocks * SECTOR >= st.st_size and kernel.is_tmpfs(fd, path)
