# SPDX-License-Identifier: Apache-2.0
"""How long a freeze may last.

`Limits` are the moments of one freeze at which this process or the watchdog
gives up.  `Deadline` counts them down.  Everything that waits inside the freeze
asks it: the pump's passes, the target's answers, repairs, the user's commands.
Each copy has one.  No I/O, and no clock but the given one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pyploop.errors import LoopError


@dataclass(frozen=True)
class Limits:
    """Seconds from the first stop on.

    own: this process gives up.  watchdog: the watchdog undoes, unless END may have
    been sent.  last: this process stops waiting for the peer's answer to END.
    hard: the watchdog undoes in any case (--freeze-limit).
    """

    own: float
    watchdog: float
    last: float
    hard: float

    @classmethod
    def of(cls, hard: float) -> Limits:
        return cls(
            own=hard - min(1.0, hard / 4),
            watchdog=hard - min(0.5, hard / 8),
            last=hard - min(0.2, hard / 16),
            hard=hard,
        )


class Deadline:
    """The moment at which this process gives up the freeze of one copy.

    There is none before `begin` and after `clear`.  `cancel` is final, and may be
    called from any thread.  The other methods are for the copy's own thread.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds, as time.monotonic has them."""
        self._clock = clock
        self._limits: Limits | None = None
        self._start = 0.0
        self._at = math.inf
        self._watch: Callable[[], None] = lambda: None
        self._cancelled = False

    def begin(self, limits: Limits, watch: Callable[[], None]) -> None:
        """The freeze begins now.  watch: raises when the watchdog has thawed."""
        self._limits, self._watch = limits, watch
        self._start = self._clock()
        self._at = self._start + limits.own

    def commit(self) -> None:
        """END may be sent: from now on the limit is that of its answer, `last`."""
        if self._limits is not None:
            self._at = self._start + self._limits.last

    def clear(self) -> None:
        """The freeze is over: no limit of it applies any more."""
        self._limits, self._at = None, math.inf
        self._watch = lambda: None

    def cancel(self) -> None:
        """The copy is cancelled: nothing is waited for any more."""
        self._cancelled = True

    @property
    def at(self) -> float:
        """The time on the clock when waiting ends; inf: never, 0.0: cancelled."""
        return 0.0 if self._cancelled else self._at

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def passed(self) -> bool:
        """The limit has passed; false for a cancelled copy, whose steps fail anyway."""
        return not self._cancelled and self._clock() > self._at

    @property
    def left(self) -> float | None:
        """Seconds until this process gives up, at least 0; None: there is no limit."""
        return None if self._limits is None else max(self._at - self._clock(), 0.0)

    @property
    def left_to_watchdog(self) -> float | None:
        """Seconds until the watchdog undoes in any case; None: there is no limit."""
        if self._limits is None:
            return None
        return max(self._start + self._limits.hard - self._clock(), 0.0)

    def check(self) -> None:
        """Raises LoopError when the limit has passed, and whatever `watch` raises."""
        if self._limits is not None and self._clock() > self._at:
            raise LoopError(
                f"the freeze has almost reached its limit of {self._limits.hard:g} s "
                "(--freeze-limit); the source was thawed, and no target was made",
                hint="allow a longer freeze with --freeze-limit",
            )
        self._watch()
