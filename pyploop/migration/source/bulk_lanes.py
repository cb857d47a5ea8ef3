# SPDX-License-Identifier: Apache-2.0
"""The lanes of a migration's second connection (transport/bulk.py), for what comes by
channels: memory images and directories.  Only a long line needs it: elsewhere one ssh carries
as much as its cipher does."""

from __future__ import annotations

import time
from collections.abc import Callable

from pyploop.diskcopy.lane_policy import LanePolicy
from pyploop.errors import PyploopError
from pyploop.migration.source.lane_supply import LaneSupply
from pyploop.report.events import Reporter
from pyploop.system.jobs import Job, Latch
from pyploop.transport.bulk import Bulk
from pyploop.transport.lane import Lane
from pyploop.transport.mux import Mux

LOOK = 0.25
"""Seconds between two looks at how fast it is, and which lanes there are."""
FIRST = 0.02
"""The same until the first lane is there."""
BRIEF = 10.0
"""Seconds: a lane that was lost within them counts as one that did not come about."""
STOPPING = 5.0
"""Seconds for the last request to end."""


class BulkLanes:
    """Call `close` on every path."""

    def __init__(
        self,
        host: str,
        supply: LaneSupply,
        use: Callable[[int, Callable[[], bool]], object],
        report: Reporter,
    ) -> None:
        """use: tells the agent to use the lane of a number; its second argument says whether
        that is not needed any more."""
        self._host, self._supply, self._use, self._report = host, supply, use, report
        self._bulk: Bulk | None = None
        self._open: dict[int, tuple[Lane, float]] = {}
        self._over = Latch()
        self._job: Job[None] = Job(self._run)
        self._job.start()

    def mux(self, patience: float) -> Mux | None:
        """The connection; None: there is none, and none comes within so many seconds."""
        deadline = time.monotonic() + patience
        while self._bulk is None and not self._job.over.is_set() and time.monotonic() < deadline:
            self._over.wait(FIRST)
        bulk = self._bulk
        return None if bulk is None or bulk.mux.failure is not None else bulk.mux

    def complete(self, patience: float) -> None:
        """Wait until it has the lanes that were opened ahead, so many seconds at most."""
        deadline = time.monotonic() + patience
        self._supply.complete(patience)
        while self._supply.waiting and time.monotonic() < deadline and not self._over.wait(FIRST):
            pass

    @property
    def failure(self) -> PyploopError | None:
        return None if self._bulk is None else self._bulk.mux.failure

    def stop(self) -> None:
        """No lane is added or replaced any more.  Waits for nothing."""
        self._over.set()
        self._supply.stop()

    def cut(self, cause: PyploopError) -> None:
        """From any thread: end it."""
        self.stop()
        if self._bulk is not None:
            self._bulk.mux.end(cause)
        self._supply.cut()

    def close(self) -> None:
        self.stop()
        self._job.end(STOPPING)
        if self._bulk is not None:
            self._bulk.close()
        self._supply.close()

    def _run(self) -> None:
        policy = LanePolicy(self._supply.round_trip)
        while not self._over.wait(LOOK if self._open else FIRST):
            if self._bulk is not None:
                self._look_for_ended(self._bulk)
                more = policy.sample(time.monotonic(), self._bulk.moved, len(self._open))
                if more and not self._supply.comes:
                    self._supply.more(more)
            while found := self._supply.take(0.0):
                self._add(*found)
            if not self._open and not self._supply.comes:
                return

    def _look_for_ended(self, bulk: Bulk) -> None:
        ended = set(bulk.ended)
        for number, (lane, since) in list(self._open.items()):
            if number not in ended and not lane.ended():
                continue
            del self._open[number]
            lane.cut()  # it may only have stalled
            if time.monotonic() - since < BRIEF:
                self._supply.failed()
            self._supply.more(1)
            printed = lane.printed()
            self._report.info(
                f"Lane {number} to {self._host} was lost" + (f" ({printed})" if printed else "")
            )

    def _add(self, number: int, lane: Lane) -> None:
        try:
            self._use(number, self._over.is_set)
            self._bulk = self._bulk or Bulk()
            self._bulk.add(lane.rfd, lane.wfd, number)
        except (PyploopError, OSError) as e:
            lane.cut()
            if not self._over.is_set():
                self._supply.failed()
                self._report.info(f"Lane {number} to {self._host} is not used: {e}")
            return
        self._open[number] = (lane, time.monotonic())
        self._report.info(
            f"Lane {number} to {self._host} takes part in the copy of memory and directories "
            f"({len(self._open)} streams)"
        )
