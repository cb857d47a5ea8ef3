# SPDX-License-Identifier: Apache-2.0
"""Further lanes for the disks of one migration, while they are copied and the container runs:
all disks share them.  One more is opened while that pays (diskcopy/lane_policy.py), and one
that ends is replaced.  In the freeze no lane is opened, and nothing waits for one."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from pyploop.diskcopy.lane_policy import LanePolicy
from pyploop.diskcopy.lanes import Lanes
from pyploop.errors import CancelledError, PyploopError
from pyploop.migration import deadlines
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.lane_supply import LaneSupply
from pyploop.report.events import Reporter
from pyploop.system.jobs import Job, Latch
from pyploop.transport.lane import Lane

LOOK = 0.25
"""Seconds between two looks at how fast the disks are copied, and which lanes there are."""
BRIEF = 10.0
"""Seconds: a lane that was lost within them counts as one that did not come about."""


@dataclass
class CopiedDisk:
    """A disk whose copy takes lanes."""

    index: int
    lanes: Lanes
    data: int
    """Bytes of its first pass."""
    moved: int = 0
    streams: int = 1
    """The one that its copy began with included."""

    def look(self) -> bool:
        """Whether a lane can be added now."""
        moved = self.lanes.moved()
        if moved is not None:
            self.moved = moved
        return moved is not None

    @property
    def need(self) -> float:
        """Bytes of the first pass that are left for each stream; more are only guessed."""
        return max(self.data - self.moved, 1) / self.streams


@dataclass
class _Open:
    disk: CopiedDisk
    lane: Lane
    since: float


class DiskLanes:
    """`start` begins, `stop` ends it."""

    def __init__(
        self, remote: Remote, supply: LaneSupply, disks: list[CopiedDisk], report: Reporter
    ) -> None:
        self._remote, self._supply, self._report = remote, supply, report
        self._disks = disks
        self._open: dict[int, _Open] = {}
        """By their numbers."""
        self._over = Latch()
        self._job: Job[None] = Job(self._run)

    def start(self) -> None:
        self._job.start()

    def stop(self) -> None:
        """No lane is added or replaced any more.  Waits for nothing."""
        self._over.set()
        self._supply.stop()

    def _run(self) -> None:
        policy = LanePolicy(self._supply.round_trip)
        while not self._over.wait(LOOK):
            self._look_for_ended()
            taking = [disk for disk in self._disks if disk.look()]
            streams = len(self._disks) + len(self._open)
            moved = sum(disk.moved for disk in self._disks)
            more = policy.sample(time.monotonic(), moved, streams)
            if not taking:
                continue  # not yet, or not any more
            if more and not self._supply.comes:
                self._supply.more(more)
            while taking and (found := self._supply.take(0.0)):
                self._use(*found, max(taking, key=lambda disk: disk.need))

    def _look_for_ended(self) -> None:
        for number, one in list(self._open.items()):
            if not one.lane.ended():
                continue
            del self._open[number]
            one.disk.streams -= 1
            if time.monotonic() - one.since < BRIEF:
                self._supply.failed()
            self._supply.more(1)
            printed = one.lane.printed()
            self._report.info(
                f"Lane {number} to {self._remote.host} was lost"
                + (f" ({printed})" if printed else "")
            )

    def _use(self, number: int, lane: Lane, disk: CopiedDisk) -> None:
        try:
            self._remote.call(
                "use", deadlines.REQUEST, self._over.is_set, number=number, disk=disk.index
            )
            os.set_blocking(lane.wfd, False)
            disk.lanes.add(lane.wfd, number)
        except CancelledError:
            return
        except PyploopError as e:
            self._supply.failed()
            self._report.info(f"Disk {disk.index} is copied without lane {number}: {e}")
            lane.cut()
            return
        disk.streams += 1
        self._open[number] = _Open(disk, lane, time.monotonic())
        self._report.info(
            f"Lane {number} to {self._remote.host} takes part in the copy of disk {disk.index} "
            f"({disk.streams} streams)"
        )
