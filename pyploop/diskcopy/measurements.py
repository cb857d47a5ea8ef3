# SPDX-License-Identifier: Apache-2.0
"""What one copy has measured so far.  The freeze policy decides on it."""

from __future__ import annotations

import time

from pyploop.diskcopy.context import Context
from pyploop.diskcopy.freeze_policy import MEANINGFUL, Costs, Measured, Round
from pyploop.units import MIB

TARGET_WINDOW = 32 * MIB
"""Bytes that a pyploop receiver leaves dirty while it receives, about (its WINDOW)."""
COLD_FREEZE = 0.03
"""Seconds of a FIFREEZE that was not rehearsed: RCU grace periods."""


class Measurements:
    """Filled by the pre-copy and the approach."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.first = Round(0, 0, 0)
        self.first_end = time.monotonic()
        """time.monotonic() from which on --deadline counts."""
        self.rounds: list[Round] = []
        self.freeze_time: float | None = None
        """Seconds of a FIFREEZE; None: not rehearsed."""
        self._target_times: list[tuple[int, float]] = []
        """(bytes, seconds) of each sync of the target."""

    @property
    def elapsed(self) -> float:
        """Seconds since the first pass ended."""
        return time.monotonic() - self.first_end

    @property
    def target_was_synced(self) -> bool:
        return bool(self._target_times)

    def add_target_sync(self, sent: int, seconds: float) -> None:
        """The target made `sent` bytes durable in so many seconds.  It writes back
        while it receives, so at most TARGET_WINDOW of them were left."""
        self._target_times.append((min(sent, TARGET_WINDOW), seconds))

    def measured(self) -> Measured:
        """What is known so far."""
        c = self._context
        large = [(n, s) for n, s in self._target_times if n >= MEANINGFUL][-4:]
        quick = [s for _, s in self._target_times[-4:]]
        fixed = Costs.fixed
        if c.tracker.compares_everything and self.rounds:
            fixed = self.rounds[-1].seconds  # it always reads everything
        freeze = COLD_FREEZE if c.out.framing.exact else Costs.freeze
        costs = Costs(
            stop=c.session.expected,
            freeze=0.0 if not c.mounts else self.freeze_time or freeze,
            target=min(quick) if quick else Costs.target,
            target_rate=sum(n for n, _ in large) / sum(s for _, s in large) if large else 0.0,
            fixed=fixed,
        )
        return Measured(self.first, self.rounds, costs, self.elapsed, c.source.size)
