# SPDX-License-Identifier: Apache-2.0
"""A second connection between the same two ends, whose bytes go over several lanes
(csrc/bundle.h): one ssh moves no more than its window in each round trip.  It has frames and
channels as the first one has.  Lanes may come, stall and die; as long as one lives, or another
one comes in time, nothing of it is lost.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from pyploop._core import Bundle
from pyploop.errors import PyploopError, ReadError
from pyploop.system.jobs import Job
from pyploop.transport import deadlines
from pyploop.transport.mux import Mux
from pyploop.units import MIB
from pyploop.wire import mux as wire
from pyploop.wire.channels import BULK_AT_ONCE


class Bulk:
    """`mux` is the connection.  Call `close` on every path."""

    def __init__(
        self,
        on_dead: Callable[[PyploopError], None] | None = None,
        *,
        at_once: int = BULK_AT_ONCE,
    ) -> None:
        """on_dead, at_once: as of Mux."""
        self._ours, self._theirs = socket.socketpair()
        for end in (self._ours, self._theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
        self._ours.setblocking(False)
        self._core = Bundle(self._ours.fileno(), stall_ms=int(deadlines.LANE_STALL * 1000))
        self._job: Job[None] = Job(self._run)
        fd = self._theirs.fileno()
        self.mux = Mux(fd, fd, on_dead=on_dead, window=wire.IMAGE_WINDOW, at_once=at_once)
        self._job.start()

    def _run(self) -> None:
        try:
            self._core.run()
        except OSError as e:
            self.mux.end(ReadError.of("the peer sent what no lane carries", e))
        self._ours.shutdown(socket.SHUT_RDWR)

    def add(self, rfd: int, wfd: int, number: int) -> None:
        """One lane more.  The descriptors stay the caller's, and open until the lane is among
        `ended`, or this is closed.  number: the same at both ends.  OSError."""
        for fd in (rfd, wfd):
            os.set_blocking(fd, False)
        self._core.add(rfd, wfd, number)

    @property
    def moved(self) -> int:
        """Bytes so far, in both directions."""
        return self._core.moved

    @property
    def ended(self) -> list[int]:
        """Numbers of lanes that have ended, the last ones of them."""
        return self._core.ended

    def close(self) -> None:
        """When this returns, no lane is used any more."""
        self.mux.close()
        self._core.stop()
        self._job.end()
        self._ours.close()
        self._theirs.close()
