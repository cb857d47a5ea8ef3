# SPDX-License-Identifier: Apache-2.0
"""Whether another round of memory pays before the freeze: a pure function of
what was measured.  No I/O, no clock of its own (docs/internals/migrate.md).

A round is a pre-dump: what was written to since the round before, on the target.
It costs the container a short standstill, and saves it the time in which the
dump inside the suspended time would take and send those pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEANINGFUL = 1 << 20
"""Bytes from which on a round shows the throughput."""


@dataclass(frozen=True)
class MemoryRound:
    """One finished round: `sent` bytes in `seconds`, until the target had them."""

    sent: int
    seconds: float
    window: float = 0.0
    """Seconds of writing that it covers: since the round before began.  Of the
    first, which has all memory, it says nothing."""
    frozen: float | None = None
    """Seconds that the container stood still for it; None: not known."""


@dataclass(frozen=True)
class MemoryPolicy:
    """What the user allows."""

    max_rounds: int = 5
    shrink: float = 0.8
    """A round must be smaller than this part of the one before, else what is
    written again and again is all that is left."""
    max_volume: float = 2.0
    """Bytes of all rounds over those of the memory: they lie in tmpfs, at both ends."""
    frozen: float = 0.05
    """Seconds of standstill, before one was measured."""
    wire: float = 100e6
    """Bytes per second of the connection, when nothing else shows it."""


@dataclass(frozen=True)
class Another:
    """The decision; `expected`: bytes of the round that would begin now."""

    pays: bool
    why: str
    expected: int = 0


def another(
    rounds: Sequence[MemoryRound],
    policy: MemoryPolicy,
    *,
    memory: int,
    wire: float,
    age: float,
) -> Another:
    """memory: bytes in use, 0 when not known.  wire: bytes per second of the
    connection, 0 when not known.  age: seconds since the last round began."""
    if len(rounds) >= policy.max_rounds:
        return Another(False, f"{len(rounds)} memory rounds done")
    if len(rounds) < 2:
        return _early(rounds, policy, memory or sum(r.sent for r in rounds), wire)
    before, last = rounds[-2:]
    speed = _speed(rounds, wire or policy.wire)
    rate = last.sent / last.window if last.window > 0 else 0.0
    expected = rate * age
    if memory:
        expected = min(expected, memory)
    total = sum(r.sent for r in rounds) + expected
    if total > policy.max_volume * (memory or rounds[0].sent):
        return Another(False, f"the memory was sent {policy.max_volume:g} times")
    if last.sent >= policy.shrink * before.sent:
        return Another(False, "the memory rounds have stopped shrinking")
    # What is written during the round goes with the dump in any case.  Some of a
    # round's time is there whatever it holds.
    takes = min(max(r.seconds - r.sent / speed, 0.0) for r in rounds) + expected / speed
    saves = (expected - min(expected, rate * takes)) / speed
    return _weigh(saves, _standstill(rounds, policy), int(expected))


def _early(
    rounds: Sequence[MemoryRound], policy: MemoryPolicy, memory: int, wire: float
) -> Another:
    """How fast memory is written to shows the second round: until then, what could
    be saved at most must be worth it."""
    speed = _speed(rounds, wire or policy.wire)
    if not memory:
        return Another(True, "nothing is known yet", memory)
    return _weigh(memory / speed, _standstill(rounds, policy), memory)


def _weigh(saves: float, costs: float, expected: int) -> Another:
    saving = f"saves {saves * 1000:.0f} ms, stands still for {costs * 1000:.0f} ms"
    if saves > costs:
        return Another(True, saving, expected)
    return Another(False, f"another memory round does not pay ({saving})", expected)


def _speed(rounds: Sequence[MemoryRound], wire: float) -> float:
    """Bytes per second of memory to the target: of the fastest round that is large enough."""
    rates = [r.sent / r.seconds for r in rounds if r.sent >= MEANINGFUL and r.seconds > 0]
    return max(rates, default=wire)


def _standstill(rounds: Sequence[MemoryRound], policy: MemoryPolicy) -> float:
    """The last that was measured: the first one's is that of all memory."""
    known = [r.frozen for r in rounds if r.frozen is not None]
    return known[-1] if known else policy.frozen
