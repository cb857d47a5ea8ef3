# SPDX-License-Identifier: Apache-2.0
"""When to stop iterating: a pure function of what was measured.  No I/O, no
clock of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyploop.units import MIB


@dataclass(frozen=True)
class Round:
    """One finished round: `sent` bytes in `seconds`, whose last marks were
    taken over `window` seconds of writing."""

    sent: int
    seconds: float
    window: float

    @property
    def rate(self) -> float:
        """Bytes per second on the wire."""
        return self.sent / self.seconds if self.seconds > 0 else 0.0

    @property
    def dirty_rate(self) -> float:
        """Bytes per second that were dirtied (and had to be sent again)."""
        return self.sent / self.window if self.window > 0 else 0.0


@dataclass(frozen=True)
class Policy:
    """small: bytes that may be left for the freeze whatever the rate;
    small_seconds: or what can be sent in so many seconds; shrink: a round must
    be smaller than this part of the one before; max_rounds: after the first
    pass (the C tool has 10)."""

    small: int = MIB
    small_seconds: float = 0.02
    shrink: float = 0.8
    max_rounds: int = 10


@dataclass(frozen=True)
class Decision:
    """freeze: stop iterating; why: for the log."""

    freeze: bool
    why: str


def decide(first: Round, rounds: Sequence[Round], policy: Policy) -> Decision:
    """After the rounds so far (the first pass apart), go on or freeze."""
    if not rounds:
        return Decision(False, "no round yet")
    last = rounds[-1]
    rate = max(first.rate, 1.0)
    if last.sent <= max(policy.small, int(rate * policy.small_seconds)):
        return Decision(True, "the rest is small")
    if len(rounds) >= policy.max_rounds:
        return Decision(True, f"{len(rounds)} rounds done")
    before = [r.sent for r in rounds[-3:-1]]
    if len(before) == 2 and last.sent >= policy.shrink * min(before):
        return Decision(True, "the rest has stopped shrinking")
    return Decision(False, "the rest is still shrinking")
