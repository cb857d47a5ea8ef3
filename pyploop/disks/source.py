# SPDX-License-Identifier: Apache-2.0
"""The open source of a copy: what it is, how it is read, and its users.

Invariant: a device is never read through its own page cache.  That cache is stale when a
file system is mounted on the device.  O_DIRECT gives the right data, and so does the
backing file of a loop device, which the loop driver itself reads.
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
    """The end that is less than a sector of the device: O_DIRECT cannot read it."""
    io_mode: str = ""
    """How it is read: a text for the log and the summary."""
    sparse_fd: int | None = None
    """A file that shows the holes (SEEK_HOLE), or None."""
    sparse_base: int = 0
    """Where the source starts in `sparse_fd`."""
    block: BlockDevice | None = None
    mounts: list[Mount] = field(default_factory=list)
    cluster: int = MIB
    image: str = ""
    """The name in the message `Sending IMAGE`."""
    image_format: str = "raw"
    control_fd: int = -1
    """The open device, for ioctls; `fd` may be another file."""
    related: RelatedDevices | None = None
    """The devices that share bytes with the source; None when it is not a block device."""
    monitor: Monitor | None = None
    """Watches its users; None for a ploop device, whose driver tracks all writes."""
    notes: list[str] = field(default_factory=list)
    """Notes for the log; more are added while it is copied."""
    _holes_unknown: bool = False
    identities: list[Identity] = field(default_factory=list)
    """What each device below it showed at the start."""
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
    def is_device(self) -> bool:
        """A block device, whatever it is read from; else a plain file."""
        return self.kind != "file"

    @property
    def queue(self) -> BlockDevice | None:
        """The block device, and the part of it, that all writes to the source pass: the
        source, or a device below it."""
        return self.block if self.related is None else self.related.queue

    def check_size(self) -> None:
        """ReadError when the size has changed since it was opened."""
        if self.kind == "block":
            size = kernel.device_size(self.control_fd, self.path)
        else:
            size = os.fstat(self.fd).st_size
        if size != self.size:
            raise ReadError(
                f"{self.path} had {self.size} bytes at the start and has {size} now; no target "
                "was made: start the copy again",
                path=self.path,
            )

    def check_same(self) -> None:
        """ReadError or LoopError when the contents, size or users of the source have changed
        since the last check, which no tracker sees."""
        self.check_device()
        self.check_size()
        if self.monitor is not None:
            self.monitor.check_end()

    def check_device(self) -> None:
        """ReadError when the device, or one below it, shows other contents than at the
        start."""
        for identity in self.identities:
            identity.check()

    def write_back(self) -> None:
        """Write back the page caches of the related devices, or of a plain file."""
        if self.monitor is not None:
            self.monitor.write_back()
        self.write_back_file()

    def write_back_file(self) -> None:
        """Write back the page cache of a plain file; does nothing for a device."""
        if not self.is_device:
            try:
                kernel.write_back(self.fd, self.path)
            except OSError as e:
                raise DeviceControlError.of(
                    f"cannot write back {self.path}", e, path=self.path
                ) from e

    def holes(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(data, holes) as (start, end) in bytes: ascending and disjoint, together the whole
        source.  Without a `sparse_fd` everything is data."""
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
    """A file on tmpfs without holes.  tmpfs looks at each page to find a hole (10 ms a GiB),
    but its count of blocks is exact.  On other file systems an allocated block can be a
    hole."""
    st = os.fstat(fd)
    return st.st_blocks * SECTOR >= st.st_size and kernel.is_tmpfs(fd, path)
