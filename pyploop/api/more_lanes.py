# SPDX-License-Identifier: Apache-2.0
"""Further lanes of a copy between two hosts: opened while they pay, replaced when they end.

They are opened one after the other, each by an ssh of its own, so the sshd there has one
connection at a time that is not logged in yet (MaxStartups).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from pyploop.api.remote_host import RemoteHost
from pyploop.diskcopy.lane_policy import LanePolicy
from pyploop.diskcopy.lanes import Lanes
from pyploop.errors import CancelledError, PyploopError
from pyploop.report.events import Reporter
from pyploop.system.jobs import Job, Latch
from pyploop.transport.lane import Lane
from pyploop.wire import copy_messages

LOOK = 0.25
"""Seconds between two looks at how fast the copy is, and which lanes there are."""
TRIES = 3
"""Lanes in a row that do not come about, until none is tried any more."""
BRIEF = 10.0
"""Seconds: a lane that was lost within them counts as one that did not come about."""
STOPPING = 5.0
"""Seconds for a lane that is being opened to be given up.  One that comes later is closed."""


class MoreLanes:
    """A context manager: in its body lanes come and go, beside the one that the copy began
    with.  Behind it they are closed.  Its end may wait for a request that waits for others, so
    those must have ended."""

    def __init__(self, there: RemoteHost, lanes: Lanes, report: Reporter, *, sending: bool) -> None:
        """lanes: those of the copy at this end.  sending: that is the sender's."""
        self._there, self._lanes, self._report, self._sending = there, lanes, report, sending
        self._over = Latch()
        self._round_trip = there.round_trip()
        self._open: dict[int, tuple[Lane, float]] = {}
        """Number -> lane, and when it took part."""
        self._ended: list[Lane] = []
        """Their descriptors are the copy's as long as it runs."""
        self._missing = 0
        """Lanes that were lost, and not replaced yet."""
        self._failures = 0
        self._gate = threading.Lock()
        self._held = False
        """There is no connection."""
        self._job: Job[None] = Job(self._run)

    def __enter__(self) -> MoreLanes:
        self._job.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._job.end(STOPPING)
        for lane in (*(lane for lane, _ in self._open.values()), *self._ended):
            lane.__exit__(kind)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Lanes are opened in the body only.  Its end does not wait for anything, and lets
        other requests to the other host go on."""
        try:
            yield
        finally:
            self._over.set()
            self._lanes.refuse("the copy has ended")

    def hold(self) -> None:
        """From any thread: the connection is lost, and all lanes with it."""
        with self._gate:
            self._held = True
            for number, (lane, _) in list(self._open.items()):
                lane.cut()
                del self._open[number]
                self._ended.append(lane)
                self._missing += 1

    def go_on(self) -> None:
        """There is another one, and the copy uses no lane of before."""
        with self._gate:
            self._held, self._failures = False, 0
            for lane in self._ended:
                lane.close()
            self._ended.clear()

    def _run(self) -> None:
        policy = LanePolicy(self._round_trip)
        while not self._over.wait(LOOK) and self._failures < TRIES:
            moved = self._lanes.moved()
            if moved is None or self._held:
                policy.pause()
                continue  # not yet, or not any more
            self._look_for_ended()
            more = policy.sample(time.monotonic(), moved, 1 + len(self._open))
            for _ in range(max(more, self._missing)):
                if self._over.is_set() or not self._open_one():
                    break

    def _look_for_ended(self) -> None:
        with self._gate:
            if not self._held:
                self._take_ended()

    def _take_ended(self) -> None:
        for number, (lane, since) in list(self._open.items()):
            if lane.ended():
                del self._open[number]
                self._ended.append(lane)
                self._missing += 1
                brief = time.monotonic() - since < BRIEF
                self._failures = self._failures + 1 if brief else 0
                printed = lane.printed()
                why = f" ({printed})" if printed else ""
                self._report.info(f"Lane {number} to {self._there.host} was lost{why}")

    def _open_one(self) -> bool:
        number = self._there.lanes
        if number >= copy_messages.LANES:
            return False
        try:
            lane = self._there.lane(lambda: self._held or self._over.is_set())
        except CancelledError:
            return False
        except PyploopError as e:
            if not self._held:
                self._failures += 1
            self._report.info(f"The copy goes on without lane {number}: {e}")
            return False
        with self._gate:
            if not self._taken(number, lane):
                lane.cut()
                lane.close()
                return False
            self._open[number] = (lane, time.monotonic())
            self._missing = max(0, self._missing - 1)
        self._report.info(
            f"Lane {number} to {self._there.host} takes part ({1 + len(self._open)} streams)"
        )
        return True

    def _taken(self, number: int, lane: Lane) -> bool:
        """The lane takes part."""
        if self._held:
            return False
        try:
            if self._sending:
                os.set_blocking(lane.wfd, False)
                self._lanes.add(lane.wfd, number)
            else:
                self._lanes.add(lane.rfd, number)
        except PyploopError as e:
            self._failures += 1
            self._report.detail(str(e))
            return False
        return True
