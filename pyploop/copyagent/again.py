# SPDX-License-Identifier: Apache-2.0
"""A copy whose connection has failed, at the agent: it waits for the other host, which opens
another one.

The other host asks `broken` until the copy waits here; both then know what has arrived.  A
lane is opened, and `resume` gives it to the copy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from pyploop.diskcopy.relink import Again
from pyploop.errors import CreateError, ProtocolError, PyploopError
from pyploop.system.jobs import TICK
from pyploop.transport.lane_handover import Lane

SLACK = 30.0
"""Seconds that the agent waits longer than the other host tries."""
Ends = Sequence[tuple[int, int]]


class Waiting:
    """Relink of the agent's copy.  Its requests come in another thread."""

    def __init__(self, retry: float, over: Callable[[], None]) -> None:
        """retry: seconds that the other host tries.  over: the lanes before the last one are
        not used any more."""
        self._retry, self._over = retry, over
        self._changed = threading.Condition()
        self._disconnect: Callable[[], None] | None = None
        self._given: Again | None = None
        self.wanted: Callable[[], bool] = lambda: False
        """Another copy needs what this one has: it ends then, since the one that began it may
        not exist any more."""
        self._theirs: Ends = ()
        self.ends: Ends = ()
        """What has arrived here; nothing at a sender."""
        self.waits = False
        """The connection has failed at this end, too."""

    # ---- the copy

    def begin(self, disconnect: Callable[[], None]) -> None:
        self._disconnect = disconnect

    def again(self, why: PyploopError, ends: Ends, gone: Callable[[], bool]) -> Again:
        until = time.monotonic() + self._retry + SLACK
        with self._changed:
            self.ends, self._given, self.waits = ends, None, True
            self._changed.notify_all()
            try:
                while self._given is None:
                    if gone() or time.monotonic() > until:
                        raise why
                    if self.wanted():
                        raise CreateError(
                            "another copy to the same target has begun, while this one waited for "
                            "its connection"
                        )
                    self._changed.wait(TICK)
                return self._given
            finally:
                self.waits = False

    def over(self) -> None:
        self._over()

    # ---- the requests

    def broken(self, timeout: float, theirs: Ends, committed: bool) -> bool:
        """The connection has failed at the other host.  theirs: what has arrived there.
        committed: all of it has, and its target is complete.  True: the copy waits here, or
        goes on to its end."""
        if self._disconnect is None:
            raise ProtocolError("agent protocol: the copy cannot go on over another connection")
        with self._changed:
            if not self.waits:
                self._disconnect()
                self._changed.wait_for(lambda: self.waits, timeout)
            if self.waits and committed:
                self._given = Again(committed=True)
                self._changed.notify_all()
            self._theirs = theirs
            return self.waits

    def resume(self, lane: Lane) -> None:
        """The copy goes on over this lane."""
        with self._changed:
            if not self.waits:
                raise ProtocolError("agent protocol: the copy does not wait for a connection")
            self._given = Again(lane.rfd, lane.wfd, self._theirs)
            self._changed.notify_all()
