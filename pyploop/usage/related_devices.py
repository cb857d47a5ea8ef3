# SPDX-License-Identifier: Apache-2.0
"""Which block devices share bytes with a source, by whatever way.

First down from the source: a partition lies on its disk, a loop device on its
backing file or on another block device, a mapped device on its slaves.  Then up
from each of these: partitions, holders, and loop devices on the same inode or
block device.  Ranges are kept, so that a neighbour that shares no byte is left out.
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
    """What is written to it passes the source's queue, where a tracker sees it."""
    height: int
    """Page caches between it and the source; below the source it is negative."""

    @property
    def path(self) -> str:
        return self.device.path


@dataclass(frozen=True)
class RelatedDevices:
    """All of them, the source first."""

    members: list[Member]
    queue: BlockDevice
    """Where the ways to the bytes meet: the lowest device, and the part of it that
    is the source.  Of a source that lies on no other device, itself."""
    base: int
    """The source's first byte in `queue`'s device."""
    loop: Loop | None
    """The loop device that shows the file in which the bytes are; None: no file."""
    below: list[BlockDevice]
    """The source and what it lies on, down to `queue`'s device; disks, no partitions."""

    @property
    def tracked(self) -> list[BlockDevice]:
        return [m.device for m in self.members if m.tracked]

    @property
    def untracked(self) -> list[BlockDevice]:
        return [m.device for m in self.members if not m.tracked]


def find_related(source: BlockDevice) -> RelatedDevices:
    """SysfsError when a device vanishes meanwhile."""
    return _Walk(sysblock.loops()).all(source)


@dataclass(frozen=True)
class _Span:
    """The bytes of a device that are the source's, or may be."""

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
        # A partition has counters of its own, so it is told apart from its disk.
        at = next((s for s in reversed(chain[-2:]) if s.device.is_partition), bottom)
        d = at.device
        queue = BlockDevice(d.name, d.dev, d.disk, d.disk_dev, d.start + at.start, source.size)
        below = [span.device for span in chain if not span.device.is_partition]
        return RelatedDevices(list(self._members.values()), queue, at.start, loop, below)

    def _down(self, source: BlockDevice) -> tuple[list[_Span], Loop | None]:
        """The source, what it lies on, and so on; and the loop device that is the
        last of them when it shows a file."""
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
            # Which of its bytes lie here, only its driver knows.
            self._up(_Span(holder, 0, holder.size, span.height + 1), tracked)

    def _beside(self, shown: Loop, span: _Span) -> None:
        """The other loop devices on the file that `shown` shows."""
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
        """What a mapped device lies on; its driver has claimed it."""
        if device.dev in self._members:
            return
        self._members[device.dev] = Member(device, False, height)
        if device.is_partition:
            self._below(sysblock.find(device.disk_dev), height)
        for slave in sysblock.related(device, "slaves"):
            self._below(slave, height - 1)


def _overlap(span: _Span, at: int, device: BlockDevice, height: int) -> _Span | None:
    """What of the device, which begins at `at` in the span's, lies in the span."""
    start, end = max(span.start - at, 0), min(span.end - at, device.size)
    return _Span(device, start, end, height) if start < end else None


@dataclass(frozen=True)
class _Overlay:
    point: str
    upper: str
    """The folder to which it writes."""
    dev: Dev
    """That folder's device number."""


def _overlays() -> dict[Dev, _Overlay]:
    """The overlays that are mounted, by their device numbers."""
    found = {}
    for entry in mount_table.read():
        if upper := entry.upper_folder():
            with contextlib.suppress(OSError):
                dev = sysblock.dev_numbers(os.stat(upper).st_dev)
                found[entry.dev] = _Overlay(entry.point, upper, dev)
    return found


def _real(loop: Loop, overlays: dict[Dev, _Overlay]) -> tuple[Dev, int]:
    """An overlay shows a written file by a device number of its own, and by the
    inode number that it has below."""
    dev, inode = loop.file
    return (overlays[dev].dev if dev in overlays else dev), inode


def below_overlay(loop: Loop) -> str:
    """Where the backing file is written when it was opened in an overlay; empty: it
    was not, or it cannot be found."""
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
