# SPDX-License-Identifier: Apache-2.0
"""How many lanes a copy should have: a pure function of what was measured.  No I/O, no
clock of its own.

One more lane is opened while the last one made the goodput grow by a tenth, and there is CPU
time left for it.  On a long line one lane moves no more than its window in each round trip
(OpenSSH's channels: 2 MiB).  So it begins with as many as a usual line needs, and when lanes
are at that limit, their number is doubled at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MOST = 8
"""Streams, the main one included: more of them do not help on the lines that were measured
(docs/internals/design.md)."""
GROWS = 0.1
"""Part by which the goodput must grow for one lane more to pay."""
WINDOW = 2 << 20
"""Bytes that one lane may have under way: OpenSSH's channel window."""
FULL = 0.6
"""Part of window / round trip at which a lane counts as limited by its window: ssh returns
credit in steps."""
LINE = 125e6
"""Bytes per second of a line that is worth filling, as long as nothing was measured: 1 Gb/s."""
FILLED = 0.75
"""Part of window / round trip that a lane of ssh moves on a long line, for that."""
SHORT = 2.0
"""Seconds for which one stream is enough."""
SOONEST = 3.0
"""Seconds from the first byte to the first try of another lane that is not known to pay:
its ssh costs CPU time, which a short copy does not get back."""
IDLE = 0.15
"""Part of the CPUs that must be idle for another lane to be tried."""
SAMPLE = 1.0
"""Seconds of one measurement, at least: some round trips, and several windows."""
AGAIN = 30.0
"""Seconds after which another lane is tried although the last one did not pay."""
FALLEN = 0.7
"""Part of the best goodput below which the measurements are out of date."""


@dataclass
class LanePolicy:
    """The decisions of one copy.  Times in seconds."""

    round_trip: float = 0.0
    """0: not known."""
    most: int = MOST
    _first_byte: float | None = None
    _begin: float | None = None
    _sent: int = 0
    _lanes: int = 1
    _before: float = field(default=0.0)
    """Goodput before the last lane was opened; 0: none was."""
    _settled: float | None = None
    """Since when another lane does not pay."""
    _best: float = 0.0

    def first(self, size: int) -> int:
        """How many lanes to open before anything was measured.  size: bytes of the source;
        0: not known."""
        one = WINDOW / self.round_trip if self.round_trip else math.inf
        if size and size < SHORT * one:
            return 0
        return max(min(math.ceil(LINE / (FILLED * one)), self.most) - 1, 0)

    def sample(self, now: float, sent: int, lanes: int, idle: float = 1.0) -> int:
        """How many lanes to open now.  now: a monotonic clock.  sent: bytes on the wire so
        far.  lanes: streams that take part, the main one included.  idle: part of this
        host's CPUs that was idle since the last sample."""
        if self._first_byte is None and sent:
            self._first_byte = now
        if self._begin is None or lanes != self._lanes:
            self._restart(now, sent, lanes)
            return 0
        if now - self._begin < max(SAMPLE, 5 * self.round_trip):
            return 0
        rate = (sent - self._sent) / (now - self._begin)
        self._restart(now, sent, lanes)
        return self._decide(now, rate, lanes, idle)

    def pause(self) -> None:
        """Nothing is sent for a while (a sync, a freeze): measure anew."""
        self._begin = None

    def _restart(self, now: float, sent: int, lanes: int) -> None:
        if lanes < self._lanes:
            # One has ended: what the remaining ones can do is not known.
            self._before, self._settled = 0.0, None
        self._begin, self._sent, self._lanes = now, sent, lanes

    def _decide(self, now: float, rate: float, lanes: int, idle: float) -> int:
        if not rate:
            return 0
        self._best = max(self._best, rate)
        if self._settled is not None:
            if now - self._settled < AGAIN and rate >= FALLEN * self._best:
                return 0
            self._settled, self._before, self._best = None, 0.0, rate
        room = self.most - lanes
        if room <= 0:
            return 0
        if self.round_trip and rate >= FULL * lanes * WINDOW / self.round_trip:
            self._before = rate
            return min(lanes, room)
        if idle < IDLE or self._first_byte is None or now - self._first_byte < SOONEST:
            return 0
        if self._before and rate < (1 + GROWS) * self._before:
            self._settled, self._before = now, 0.0
            return 0
        self._before = rate
        return 1
