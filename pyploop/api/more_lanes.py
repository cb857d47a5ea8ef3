# SPDX-License-Identifier: Apache-2.0
"""Further lanes of a copy between two hosts: opened while they pay, replaced when they end.

They are opened side by side, each by an ssh of its own, but not all at once: the sshd there
has a limit for connections that are not logged in yet (MaxStartups).  On a long line some are
opened before anything was measured, while both ends still greet each other.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import TracebackType

from pyploop.api.remote_host import RemoteHost
from pyploop.diskcopy.lane_policy import LanePolicy
from pyploop.diskcopy.lanes import Lanes
from pyploop.errors import ConnectError, PyploopError
from pyploop.report.events import Reporter
from pyploop.system.cpu import IdleShare
from pyploop.system.jobs import Job, Latch
from pyploop.transport.lane import Lane

LOOK = 0.25
"""Seconds between two looks at how fast the copy is, and which lanes there are."""
SOON = 0.02
"""The same while lanes are being opened."""
AT_ONCE = 5
"""Lanes that are being opened at a time: sshd refuses some connections from the tenth on, and
others may log in meanwhile."""
TRIES = 3
"""Lanes in a row that do not come about, until none is tried any more."""
BRIEF = 10.0
"""Seconds: a lane that was lost within them counts as one that did not come about."""
STOPPING = 5.0
"""Seconds for lanes that are being opened to be given up."""


class MoreLanes:
    """A context manager: in its body lanes come and go, beside the one that the copy began
    with.  Behind it they are closed.  Its end may wait for a request that waits for others, so
    those must have ended."""

    def __init__(
        self, there: RemoteHost, lanes: Lanes, report: Reporter, *, sending: bool, size: int
    ) -> None:
        """lanes: those of the copy at this end.  sending: that is the sender's.  size: bytes
        of the source; 0: not known."""
        self._there, self._lanes, self._report, self._sending = there, lanes, report, sending
        self._over = Latch()
        self._policy = LanePolicy(there.round_trip())
        self._size = size
        self._asked: list[tuple[int, str]] = []
        """Numbers and tokens of lanes that are not opened yet."""
        self._coming: dict[int, Job[Lane]] = {}
        """Lanes that are being opened, by their numbers."""
        self._open: dict[int, tuple[Lane, float]] = {}
        """Number -> lane, and when it took part."""
        self._ended: list[Lane] = []
        """Their descriptors are the copy's as long as it runs."""
        self._missing = 0
        """Lanes that were lost, and not replaced yet."""
        self._failures = 0
        self._idle = IdleShare()
        self._gate = threading.Lock()
        self._held = False
        """There is no connection."""
        self._job: Job[None] = Job(self._run)

    def __enter__(self) -> MoreLanes:
        # Before another request waits for the copy's end.
        if count := self._policy.first(self._size):
            self._asked = self._there.tokens(count)
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
        for job in self._coming.values():
            job.end(STOPPING)
            if job.over.is_set() and job.failure is None:
                self._ended.append(job.join())
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

    def _gone(self) -> bool:
        return self._held or self._over.is_set()

    def _run(self) -> None:
        self._begin()
        while not self._over.wait(SOON if self._coming else LOOK) and self._failures < TRIES:
            self._look_for_opened()
            if self._held:
                self._asked.clear()  # by an agent's connection that is lost
            self._begin()
            moved = self._lanes.moved()
            if moved is None or self._held:
                self._policy.pause()
                continue  # not yet, or not any more
            self._look_for_ended()
            if not self._coming:
                self._ask_for_more(moved)

    def _ask_for_more(self, moved: int) -> None:
        streams, idle = 1 + len(self._open), self._idle.recent()
        more = self._policy.sample(time.monotonic(), moved, streams, idle)
        if count := max(more, self._missing):
            with contextlib.suppress(PyploopError):  # the copy ends, or its connection is lost
                self._asked = self._there.tokens(count, self._gone)
            self._begin()

    def _begin(self) -> None:
        """Begin to open the lanes that were asked for, as many as may be opened now."""
        while self._asked and len(self._coming) < AT_ONCE and not self._over.is_set():
            number, token = self._asked.pop(0)
            job = Job(partial(self._there.further_lane, token, self._gone))
            self._coming[number] = job
            job.start()

    def _look_for_opened(self) -> None:
        for number, job in list(self._coming.items()):
            if not job.over.is_set():
                continue
            try:
                self._take(number, job.join())
            except ConnectError as e:
                if not self._held:
                    self._failures += 1
                self._report.info(f"The copy goes on without lane {number}: {e}")
            del self._coming[number]

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

    def _take(self, number: int, lane: Lane) -> None:
        """The lane is open: let it take part."""
        with self._gate:
            if not self._taken(number, lane):
                lane.cut()
                lane.close()
                return
            self._open[number] = (lane, time.monotonic())
            self._missing = max(0, self._missing - 1)
        self._report.info(
            f"Lane {number} to {self._there.host} takes part ({1 + len(self._open)} streams)"
        )

    def _taken(self, number: int, lane: Lane) -> bool:
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
