# SPDX-License-Identifier: Apache-2.0
"""Lanes of one migration, at its source: further connections to the same agent, for data
that need no Python on their way.

They are opened by threads of their own, while the checks and the first copies go on, and
wait here until one is needed.  On a short line that is one for each disk.  On a long line
several are opened ahead: to open one takes about ten round trips, in which the lanes that
there are move no more than their windows (OpenSSH's channels: 2 MiB).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from pyploop.diskcopy.lane_policy import MOST, WINDOW
from pyploop.errors import CancelledError, PyploopError
from pyploop.report.events import Reporter
from pyploop.system.jobs import TICK, Job, Latch
from pyploop.transport.lane import Lane
from pyploop.wire import channels

LONG = 0.02
"""Seconds of a round trip from which on a line is long: one lane moves 100 MB/s at most."""
EACH = 10 * WINDOW
"""Bytes that one lane moves on a long line in the time in which another one is opened.  With
less for it to carry it does not pay."""
UNKNOWN = 8 * EACH
"""Bytes that a runtime is taken to have in memory when it does not say."""
AT_ONCE = 4
"""Lanes that are being opened at the same time on a long line.  sshd may refuse connections
when ten are not logged in yet (MaxStartups)."""
TRIES = 3
"""Lanes in a row that do not come about, until none is tried any more."""
LOOK = 0.05
"""Seconds between two looks whether more are wanted."""
STOPPING = 5.0
"""Seconds for a lane that is being opened to be given up.  One that comes later is closed."""


def wanted_ahead(disks: int, data: int, round_trip: float) -> int:
    """Lanes to open before it is known how fast they are.  data: bytes of all disks.
    round_trip: seconds."""
    least = min(disks, MOST)
    return max(least, min(MOST, data // EACH)) if round_trip >= LONG else least


class LaneSupply:
    """From any thread.  Call `close` on every path."""

    def __init__(
        self,
        host: str,
        open_one: Callable[[int, Callable[[], bool]], Lane],
        round_trip: float,
        report: Reporter,
        *,
        first: int = 1,
    ) -> None:
        """host: for messages.  open_one: opens the lane of a number; its second argument says
        whether it is needed no more.  round_trip: seconds.  first: the first lane's number."""
        self._host, self._open_one, self._report = host, open_one, report
        self.round_trip = round_trip
        self._lock = threading.Lock()
        self._ready: queue.SimpleQueue[tuple[int, Lane]] = queue.SimpleQueue()
        self._all: list[Lane] = []
        self._wanted = self._opening = self._opened = 0
        self._next = first
        self._failures = 0
        self._over = Latch()
        self._jobs: list[Job[None]] = []

    def start(self, wanted: int) -> None:
        """Begin to open so many."""
        self._wanted = wanted
        for _ in range(AT_ONCE if self.round_trip >= LONG else 1):
            self._jobs.append(Job(self._run))
            self._jobs[-1].start()

    def more(self, lanes: int) -> None:
        """Open so many more."""
        with self._lock:
            self._wanted += lanes

    def take(self, patience: float) -> tuple[int, Lane] | None:
        """(number, a lane that nothing uses yet), which stays ours.  None: there is none, and
        none comes within so many seconds."""
        deadline = time.monotonic() + patience
        while True:
            left = deadline - time.monotonic()
            try:
                return self._ready.get(timeout=max(0.0, min(TICK, left)))
            except queue.Empty:
                if left <= 0 or not self.comes:
                    return None

    def failed(self) -> None:
        """A lane was lost soon, or could not be used: after TRIES of them no more is opened."""
        with self._lock:
            self._failures += 1

    def stop(self) -> None:
        """Open no more.  Waits for nothing: requests are answered one after the other, and
        one for a lane is given up."""
        self._over.set()

    def cut(self) -> None:
        """The connection has ended, and so have the lanes."""
        self.stop()
        with self._lock:
            lanes = list(self._all)
        for lane in lanes:
            lane.cut()

    def close(self) -> None:
        self.stop()
        for job in self._jobs:
            job.end(STOPPING)
        self.cut()
        with self._lock:
            lanes, self._all = self._all, []
        for lane in lanes:
            lane.close()

    def complete(self, patience: float) -> None:
        """Wait until those that are wanted are there, or will not come; so many seconds at
        most."""
        deadline = time.monotonic() + patience
        while self.comes and time.monotonic() < deadline:
            self._over.wait(LOOK)

    @property
    def waiting(self) -> bool:
        """A lane is there that nothing has taken."""
        return not self._ready.empty()

    @property
    def comes(self) -> bool:
        """More are wanted, and may come."""
        with self._lock:
            missing = self._opened < self._wanted and self._failures < TRIES
            return missing and not self._over.is_set()

    def _run(self) -> None:
        while not self._over.is_set():
            number = self._claim()
            if number:
                self._open(number)
            else:
                self._over.wait(LOOK)

    def _claim(self) -> int:
        """The number of a lane to open now; 0: none is needed."""
        with self._lock:
            enough = self._opened + self._opening >= self._wanted
            if enough or self._failures >= TRIES or self._next > channels.LANES:
                return 0
            self._opening += 1
            self._next += 1
            return self._next - 1

    def _open(self, number: int) -> None:
        lane: Lane | None = None
        try:
            lane = self._open_one(number, self._over.is_set)
        except CancelledError:
            pass
        except PyploopError as e:
            with self._lock:
                self._failures += 1
            self._report.info(f"Lane {number} to {self._host} did not come about: {e}")
        with self._lock:
            self._opening -= 1
            over = self._over.is_set()
            if lane is not None and not over:
                self._opened += 1
                self._failures = 0
                self._all.append(lane)
                self._ready.put((number, lane))
                lane = None
        if lane is not None:  # it came too late
            lane.cut()
            lane.close()
