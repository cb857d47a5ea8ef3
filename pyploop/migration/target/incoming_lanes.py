# SPDX-License-Identifier: Apache-2.0
"""Lanes of one migration, at its target: further connections of the same source, each for
one disk.

The source asks for a token, starts the agent's own command once more, and that process hands
its connection over (transport/lane_handover.py).  Only then is it said what the lane is for.

Invariants: no more than LANES_AT_ONCE are open.  Each is used for one thing, once.  When the
source's main connection has ended, so have they: `end` is called for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyploop.diskcopy.lanes import Lanes
from pyploop.errors import ProtocolError
from pyploop.migration import deadlines
from pyploop.system.jobs import Job
from pyploop.transport.lane_handover import Awaited, Lane
from pyploop.wire import channels


class IncomingLanes:
    """From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coming: dict[int, tuple[Awaited, Job[Lane]]] = {}
        """Those that are not used yet, by their numbers."""
        self._used: list[Lane] = []
        self._numbers: set[int] = set()
        self._disks: dict[int, Lanes] = {}
        """Disk -> where its further lanes are added."""
        self._cancels: list[Callable[[], None]] = []
        """What ends those that read from lanes."""
        self._ended = False

    def expect(self, number: int) -> str:
        """A lane of this number may come.  Returns its token.  ProtocolError."""
        with self._lock:
            if self._ended:
                raise ProtocolError("agent protocol: no lane is taken any more")
            if number in self._numbers:
                raise ProtocolError(f"agent protocol: lane {number} was asked for before")
            self._coming = {n: one for n, one in self._coming.items() if not one[1].failure}
            if len(self._coming) + len(self._used) >= channels.LANES_AT_ONCE:
                raise ProtocolError(
                    f"agent protocol: {channels.LANES_AT_ONCE} lanes are open, which is the limit"
                )
            self._numbers.add(number)
            awaited = Awaited()
            job = Job(awaited.take)
            self._coming[number] = (awaited, job)
        job.start()
        return awaited.token

    def take(self, number: int) -> Lane:
        """A lane that has come, for one use.  It is closed by `close`.  ProtocolError: there
        is none of that number."""
        with self._lock:
            if number not in self._coming:
                raise ProtocolError(f"agent protocol: there is no lane {number}")
            _, job = self._coming[number]
        # Its source has heard that it is ready, so it is nearly here.
        if not job.over.wait(deadlines.LANE) or job.failure is not None:
            raise ProtocolError(f"agent protocol: lane {number} has not come")
        lane = job.join()
        with self._lock:
            del self._coming[number]
            if not self._ended:
                self._used.append(lane)
                return lane
        lane.close()
        raise ProtocolError("agent protocol: no lane is taken any more")

    def of_disk(self, index: int) -> Lanes:
        """Where further lanes of this disk are added."""
        with self._lock:
            return self._disks.setdefault(index, Lanes())

    def use(self, number: int, disk: int) -> None:
        """Let a lane that has come take part in the copy of a disk.  ParameterError: that
        takes none."""
        with self._lock:
            door = self._disks.get(disk)
        if door is None:
            raise ProtocolError(f"agent protocol: no disk {disk} is received by a lane")
        door.add(self.take(number).rfd, number)

    def drop(self, lane: Lane) -> None:
        """Close a lane that was taken: nothing reads from it any more."""
        with self._lock:
            if lane not in self._used:
                return
            self._used.remove(lane)
        lane.close()

    def reads(self, cancel: Callable[[], None]) -> None:
        """cancel: from any thread, ends what reads from lanes.  Called at once when they have
        ended already."""
        with self._lock:
            self._cancels.append(cancel)
            ended = self._ended
        if ended:
            cancel()

    def end(self) -> None:
        """Nothing more is received by a lane; what still reads from one fails."""
        with self._lock:
            self._ended = True
            cancels = list(self._cancels)
            for awaited, _ in self._coming.values():
                awaited.close()
        for cancel in cancels:
            cancel()

    def close(self) -> None:
        """Nothing reads from them any more: close them all."""
        self.end()
        with self._lock:
            coming, self._coming = list(self._coming.values()), {}
            used, self._used = self._used, []
        for _, job in coming:
            job.end(deadlines.LANE)
            if job.over.is_set() and job.failure is None:
                used.append(job.join())
        for lane in used:
            lane.close()
