# SPDX-License-Identifier: Apache-2.0
"""The block devices that share bytes with a source.

The search goes down first: from a partition to its disk, from a loop device to its
backing file or block device, from a mapped device to its slaves.  Then it goes up from
each of these: to partitions, holders, and loop devices on the same inode or block device.
It keeps byte ranges, so a neighbour that shares no byte with the source is left out.
(`disks.backing` goes down only, and further: through file systems.)
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from pyploop.system import mount_table, sysblock
from pyploop.system.sysblock import BlockDevice, Loop

Dev = tuple[int, int]


@dataclass(frozen=True)
class Member:
    """A block device that shares bytes with the source."""

    device: BlockDevice
    tracked: bool
    """Its writes pass the source's request queue, where a tracker sees them."""
    height: int
    """The number of page caches between it and the source; negative below the source."""

    @property
    def path(self) -> str:
        return self.device.path


@dataclass(frozen=True)
class RelatedDevices:
    """The devices that share bytes with a source."""

    members: list[Member]
    """The source is the first."""
    queue: BlockDevice
    """The lowest device, which all tracked writes pass, and the part of it that is the
    source.  It is the source itself when that lies on no other device."""
    base: int
    """The source's first byte in `queue`'s device."""
    loop: Loop | None
    """The loop device on the file that has the bytes; None when no file has them."""
    below: list[BlockDevice]
    """The source and the devices below it, down to `queue`'s; disks only, no partitions."""

    @property
    def tracked(self) -> list[BlockDevice]:
        return [m.device for m in self.members if m.tracked]

    @property
    def untracked(self) -> list[BlockDevice]:
        return [m.device for m in self.members if not m.tracked]


def find_related(source: BlockDevice) -> RelatedDevices:
    """Search now.  SysfsError when a device is removed meanwhile."""
    return _Walk(sysblock.loops()).all(source)


@dataclass(frozen=True)
class _Span:
    """The bytes of a device that belong to the source, or may belong to it."""

    device: BlockDevice
    start: int
    end: int
    height: int


class _Walk:
    def __init__(self, loops: list[Loop]) -> None:
        self._loops = loops
        self._members: dict[Dev, Member] = {}

    def all(self, source: BlockDevice) -> RelatedDevices:
        chain, loop = self._down(source)
        for span in chain:
            self._up(span, tracked=True)
        bottom = chain[-1]
        if loop is not None:
            self._beside(loop, bottom)
        for slave in sysblock.related(bottom.device, "slaves"):
            self._below(slave, bottom.height - 1)
        # A partition has counters of its own, so it is preferred to its disk.
        at = next((s for s in reversed(chain[-2:]) if s.device.is_partition), bottom)
        d = at.device
        queue = BlockDevice(d.name, d.dev, d.disk, d.disk_dev, d.start + at.start, source.size)
        below = [span.device for span in chain if not span.device.is_partition]
        return RelatedDevices(list(self._members.values()), queue, at.start, loop, below)

    def _down(self, source: BlockDevice) -> tuple[list[_Span], Loop | None]:
        """The source and the devices below it.  And the last of them, when it is a loop device
        on a file."""
        by_device = {loop.device.dev: loop for loop in self._loops}
        span = _Span(source, 0, source.size, 0)
        chain = [span]
        while True:
            if span.device.is_partition:
                disk, at, height = span.device.disk_dev, span.device.start, span.height
            elif (loop := by_device.get(span.device.dev)) is None:
                return chain, None
            elif loop.below is None:
                return chain, loop
            else:
                disk, at, height = loop.below, loop.offset, span.height - 1
            span = _Span(sysblock.find(disk), span.start + at, span.end + at, height)
            chain.append(span)

    def _up(self, span: _Span, tracked: bool) -> None:
        device = span.device
        if device.dev in self._members:
            return
        self._members[device.dev] = Member(device, tracked, span.height)
        if not device.is_partition:
            for part in sysblock.partitions(device):
                if shared := _overlap(span, part.start, part, span.height):
                    self._up(shared, tracked)
        for loop in self._loops:
            if loop.below == device.dev and (
                shared := _overlap(span, loop.offset, loop.device, span.height + 1)
            ):
                self._up(shared, tracked)
        for holder in sysblock.related(device, "holders"):
            # Only its driver knows which of its bytes lie here, so all of them count.
            self._up(_Span(holder, 0, holder.size, span.height + 1), tracked)

    def _beside(self, shown: Loop, span: _Span) -> None:
        """The other loop devices on the backing file of `shown`."""
        start, end = shown.offset + span.start, shown.offset + span.end
        in_file = _Span(shown.device, start, end, span.height)
        overlays = _overlays()
        file = _real(shown, overlays)
        for loop in self._loops:
            if loop.below is None and _real(loop, overlays) == file:
                shared = _overlap(in_file, loop.offset, loop.device, span.height)
                if shared is not None:
                    self._up(shared, tracked=False)

    def _below(self, device: BlockDevice, height: int) -> None:
        """A device below a mapped one, whose driver has claimed it."""
        if device.dev in self._members:
            return
        self._members[device.dev] = Member(device, False, height)
        if device.is_partition:
            self._below(sysblock.find(device.disk_dev), height)
        for slave in sysblock.related(device, "slaves"):
            self._below(slave, height - 1)


def _overlap(span: _Span, at: int, device: BlockDevice, height: int) -> _Span | None:
    """The part of the device inside the span; the device begins at `at` of the span's."""
    start, end = max(span.start - at, 0), min(span.end - at, device.size)
    return _Span(device, start, end, height) if start < end else None


@dataclass(frozen=True)
class _Overlay:
    point: str
    upper: str
    """The folder that it writes to."""
    dev: Dev
    """The device number of that folder."""


def _overlays() -> dict[Dev, _Overlay]:
    """The mounted overlays, by their device numbers."""
    found = {}
    for entry in mount_table.read():
        if upper := entry.upper_folder():
            with contextlib.suppress(OSError):
                dev = sysblock.dev_numbers(os.stat(upper).st_dev)
                found[entry.dev] = _Overlay(entry.point, upper, dev)
    return found


def _real(loop: Loop, overlays: dict[Dev, _Overlay]) -> tuple[Dev, int]:
    """Device number and inode of the backing file below an overlay.  The overlay shows the
    same inode number with a device number of its own."""
    dev, inode = loop.file
    return (overlays[dev].dev if dev in overlays else dev), inode


def below_overlay(loop: Loop) -> str:
    """The path below the overlay of a backing file that was opened in one; empty when it was
    not, or cannot be found."""
    overlays = _overlays()
    over = overlays.get(loop.file[0])
    if over is None or not loop.name.startswith(over.point.rstrip("/") + "/"):
        return ""
    path = os.path.join(over.upper, os.path.relpath(loop.name, over.point))
    try:
        st = os.stat(path)
    except OSError:
        return ""
    return path if sysblock.file_id(st) == _real(loop, overlays) else ""
