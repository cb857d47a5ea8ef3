# SPDX-License-Identifier: Apache-2.0
"""Lanes: further streams for the data of one copy, at either end.

The program that opens a lane's connection adds its descriptor here, from any thread and at
any time.  The pump takes it as soon as both ends have agreed on lanes.  What a lane lost is
sent again by the copy itself (csrc/pump_lanes.c, csrc/recv_lanes.c).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from pyploop._core import PumpLane
from pyploop.errors import ParameterError

LANE_STALL = 20.0
"""Seconds in which a lane must move 64 KiB while others move, or while a barrier waits for
it.  Else it has ended.  Less than a freeze may last."""
CLOSED = (errno.ECANCELED, errno.EINVAL)


class Pumping(Protocol):
    """A sending or a receiving pump."""

    def add_lane(self, fd: int, number: int) -> None: ...


class Lanes:
    """The lanes of one copy.  Descriptors stay their owner's, and open until the copy has
    ended or the lane is not in `state` any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pump: Pumping | None = None
        self._moved: Callable[[], int] = lambda: 0
        self._waiting: list[tuple[int, int]] = []
        self._refused = ""
        self.agreed = False
        """Both ends take lanes."""
        self.used = False
        """A lane has taken part."""

    def add(self, fd: int, number: int) -> None:
        """Let this stream take part.  fd: non-blocking, or a socket, at the sender; where
        the lane is read from, at the receiver.  number: 1 to 65535, the same at both ends,
        used once in a copy.  ParameterError: this copy takes no lane (any more)."""
        with self._lock:
            if self._refused:
                raise ParameterError(f"lane {number} cannot be added: {self._refused}")
            if self._pump is None:
                self._waiting.append((fd, number))
            else:
                self._join(self._pump, fd, number)

    def open(self, pump: Pumping, moved: Callable[[], int]) -> None:
        """Both ends have agreed: lanes take part from now on.  moved: the bytes of all streams
        so far."""
        with self._lock:
            self._pump, self._moved = pump, moved
            self.agreed = True
            for fd, number in self._waiting:
                self._join(pump, fd, number)
            self._waiting.clear()

    def _join(self, pump: Pumping, fd: int, number: int) -> None:
        try:
            pump.add_lane(fd, number)
        except OSError as e:
            why = "the copy has ended" if e.errno in CLOSED else e.strerror
            raise ParameterError(f"lane {number} cannot be added: {why}") from e
        self.used = True

    def moved(self) -> int | None:
        """The bytes of all streams so far; None: no lane can be added now."""
        with self._lock:
            return None if self._pump is None else self._moved()

    def refuse(self, why: str) -> None:
        """No lane takes part, now or later."""
        with self._lock:
            self._refused = why
            self._pump = None
            self._waiting.clear()


def ended(before: Sequence[PumpLane], after: Sequence[PumpLane]) -> list[str]:
    """Sentences about the lanes that have left a sending pump."""
    left = {lane.number for lane in after}
    return [
        f"Lane {lane.number} has ended after {lane.sent} bytes"
        + (f" ({os.strerror(lane.error)})" if lane.error else " (at the receiver)")
        for lane in before
        if lane.number not in left
    ]
