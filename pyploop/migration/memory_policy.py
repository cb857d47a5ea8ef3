# SPDX-License-Identifier: Apache-2.0
"""Whether another memory round pays before the container is suspended: a pure function of
what was measured.  No I/O, no clock of its own (docs/internals/migrate.md).

A round is a pre-dump: it copies the pages that were written since the round before.  For
it the container is frozen for a short time.  It saves the time that the dump, in the
suspended time, would need for those pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEANINGFUL = 1 << 20
"""Bytes that a round must have sent to show the throughput."""


@dataclass(frozen=True)
class MemoryRound:
    """One finished round: `sent` bytes in `seconds`, until the target had them."""

    sent: int
    seconds: float
    window: float = 0.0
    """Seconds of writing that it covers: since the round before began.  It has no meaning
    for the first round, which sends all of the memory."""
    frozen: float | None = None
    """Seconds for which the container was frozen; None: not known."""


@dataclass(frozen=True)
class MemoryPolicy:
    """The limits for memory rounds."""

    max_rounds: int = 5
    shrink: float = 0.8
    """A round must be smaller than this part of the one before.  Otherwise only pages are
    left that are written again and again."""
    max_volume: float = 2.0
    """Bytes of all rounds, over the bytes of the memory.  They lie in tmpfs at both ends."""
    frozen: float = 0.05
    """Seconds of a round's freeze, before one was measured."""
    wire: float = 100e6
    """Bytes per second of the connection, before it was measured."""


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
        return Another(False, f"{len(rounds)} memory rounds were made, which is the limit")
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
        return Another(False, f"it would send more than {policy.max_volume:g} times the memory")
    if last.sent >= policy.shrink * before.sent:
        return Another(False, "the memory rounds have stopped shrinking")
    # Pages that are written during the round are sent with the dump in any case.  A part of
    # a round's time does not depend on how much it sends.
    takes = min(max(r.seconds - r.sent / speed, 0.0) for r in rounds) + expected / speed
    saves = (expected - min(expected, rate * takes)) / speed
    return _weigh(saves, _standstill(rounds, policy), int(expected))


def _early(
    rounds: Sequence[MemoryRound], policy: MemoryPolicy, memory: int, wire: float
) -> Another:
    """Only the second round shows how fast the memory is written.  Until then a round is made
    if it could save more than it costs at best."""
    speed = _speed(rounds, wire or policy.wire)
    if not memory:
        return Another(True, "the size of the memory is not known yet", memory)
    return _weigh(memory / speed, _standstill(rounds, policy), memory)


def _weigh(saves: float, costs: float, expected: int) -> Another:
    saving = f"saves {saves * 1000:.0f} ms of downtime, freezes for {costs * 1000:.0f} ms"
    if saves > costs:
        return Another(True, saving, expected)
    return Another(False, f"it does not pay ({saving})", expected)


def _speed(rounds: Sequence[MemoryRound], wire: float) -> float:
    """Bytes of memory per second to the target, by the fastest round that is large enough."""
    rates = [r.sent / r.seconds for r in rounds if r.sent >= MEANINGFUL and r.seconds > 0]
    return max(rates, default=wire)


def _standstill(rounds: Sequence[MemoryRound], policy: MemoryPolicy) -> float:
    """Seconds of the last measured freeze.  The last, because the first round's freeze is for
    all of the memory."""
    known = [r.frozen for r in rounds if r.frozen is not None]
    return known[-1] if known else policy.frozen
