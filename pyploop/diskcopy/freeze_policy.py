# SPDX-License-Identifier: Apache-2.0
"""When to go on, to freeze, or to give up: pure functions of what was
measured.  No I/O, no clock of its own (docs/internals/rounds.md has the formulae).

`forecast` says how long a freeze would last that began now; `decide` compares
that with what the user allows, or, when nothing was asked for, with what
further rounds can still save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pyploop.units import MIB

SMOOTH = 0.02
"""Seconds of writing that a dirty rate is taken over, at least."""
MEANINGFUL = MIB
"""Bytes from which on a round tells a throughput."""
PAUSE = 0.3
"""Seconds between two rounds at most."""
BURST = 4.0
"""Between the highest and the lowest dirty rate of a load that comes in bursts."""
HISTORY = 16
"""Rounds that are looked back on for bursts."""


@dataclass(frozen=True)
class Round:
    """One finished round: `sent` bytes in `seconds`, whose marks were taken
    over `window` seconds of writing."""

    sent: int
    seconds: float
    window: float
    dirty: int | None = None
    """Bytes that were marked; None: what was sent."""
    sync: float = 0.0
    """Seconds of the source's own write-back, at the beginning."""
    flushed: int = 0
    """Bytes that it wrote, as far as the tracker saw."""
    left: int = 0
    """Bytes of hot blocks that were left for last."""
    paused: bool = False
    """Nothing was done for a while before it."""

    @property
    def rate(self) -> float:
        """Bytes per second on the wire."""
        return self.sent / self.seconds if self.seconds > 0 else 0.0

    @property
    def dirty_rate(self) -> float:
        """Bytes per second that were dirtied."""
        dirty = self.sent if self.dirty is None else self.dirty
        return dirty / self.window if self.window > 0 else 0.0


@dataclass(frozen=True)
class Costs:
    """What a freeze costs whatever is left, in seconds: assumed until it is
    measured."""

    stop: float = 0.0
    """The stop command."""
    freeze: float = 0.002
    """FIFREEZE after the rehearsal, which measures it."""
    target: float = 0.005
    """One round trip with the peer's flush of nothing."""
    target_rate: float = 0.0
    """Bytes per second that the peer makes durable; 0: as fast as they come."""
    fixed: float = 0.003
    """The proof of completeness, and the passes themselves."""
    prelude: float = 0.002
    """From the last round's end to the stop command."""


@dataclass(frozen=True)
class Forecast:
    """A freeze that has not begun, in seconds by step; `left`: bytes to send in it."""

    stop: float
    sync: float
    freeze: float
    send: float
    target: float
    left: int
    floor: float
    """Of the total, what does not depend on what is left."""

    @property
    def total(self) -> float:
        return self.stop + self.sync + self.freeze + self.send + self.target

    @property
    def variable(self) -> float:
        """What further rounds could save at most."""
        return max(self.total - self.floor, 0.0)


OnDeadline = Literal["freeze", "abort"]


@dataclass(frozen=True)
class Policy:
    """What the user allows; times in seconds.

    max_freeze: the freeze begins only when its forecast fits; None: when
    further rounds save nothing.  deadline: from the end of the first pass on,
    with max_freeze; what happens then says on_deadline.
    """

    max_freeze: float | None = None
    deadline: float = 600.0
    on_deadline: OnDeadline = "abort"
    small: float = 0.005
    """Not worth another round."""
    large: float = 0.03
    """Worth waiting for a quieter moment."""
    shrink: float = 0.8
    """Without max_freeze, a round must save more than this leaves."""
    max_rounds: int = 10
    """Without max_freeze, after the first pass (the C tool's limit)."""
    max_volume: float = 2.0
    """Without max_freeze, bytes of all rounds over those of the source (the C tool's)."""
    patience: float = 2.0
    """Without max_freeze, seconds to wait for a quieter moment."""
    throttle_after: int = 5
    """Rounds that do not fit before the writer is slowed down, if it may be."""


Action = Literal["round", "freeze", "abort"]


@dataclass(frozen=True)
class Decision:
    """pause: seconds until the next round; throttle: slow the writer down."""

    action: Action
    why: str
    forecast: Forecast | None = None
    pause: float = 0.0
    throttle: bool = False

    @property
    def freeze(self) -> bool:
        return self.action == "freeze"


@dataclass(frozen=True)
class Measured:
    """All that a decision rests on.  elapsed: seconds since the first pass
    ended; size: bytes of the source."""

    first: Round
    rounds: Sequence[Round]
    costs: Costs = field(default_factory=Costs)
    elapsed: float = 0.0
    size: int = 0

    def until(self, n: int) -> Measured:
        """The same after `n` rounds, to see what has become of the forecast."""
        return Measured(self.first, self.rounds[:n], self.costs, self.elapsed, self.size)


def dirty_rate(rounds: Sequence[Round]) -> float:
    """Bytes per second to expect: of the last rounds that make up SMOOTH
    seconds, and more when it has been growing."""
    now, rest = _recent(rounds)
    before, rest = _recent(rest)
    earlier, _ = _recent(rest)
    if now > before > earlier > 0:
        return now + (now - before)
    return now


def _recent(rounds: Sequence[Round]) -> tuple[float, Sequence[Round]]:
    """The rate of the last rounds, and the rounds before those."""
    window, dirty, n = 0.0, 0.0, len(rounds)
    while n and window < SMOOTH:
        n -= 1
        window += rounds[n].window
        dirty += rounds[n].dirty_rate * rounds[n].window
    return (dirty / window if window else 0.0), rounds[:n]


def _throughput(parts: Sequence[tuple[int, float]], otherwise: float) -> float:
    """Bytes per second of the last parts that are large enough to tell."""
    large = [p for p in parts if p[0] >= MEANINGFUL and p[1] > 0][-4:]
    if not large:
        return max(otherwise, 1.0)
    return sum(n for n, _ in large) / sum(s for _, s in large)


def forecast(m: Measured, pending: int | None = None) -> Forecast:
    """A freeze that begins now, after the last round (there must be one).

    pending: bytes that are marked now, when the tracker can tell.
    """
    costs, last = m.costs, m.rounds[-1]
    rate = dirty_rate(m.rounds)
    wire = _throughput([(r.sent, r.seconds) for r in (m.first, *m.rounds)], m.first.rate)
    disk = _throughput([(r.flushed, r.sync) for r in m.rounds], wire)
    # What stays in the page cache until the sync inside the freeze: dirtied
    # since the last sync looked there.  What is to be sent: that, and what was
    # written since the last marks were taken.
    late = rate * (last.seconds + costs.prelude + costs.stop + last.left / wire)
    cached = late + rate * last.sync
    left = cached if pending is None else max(cached, pending + rate * costs.stop)
    recent = m.rounds[-4:]
    bare = sum(max(r.sync - r.flushed / disk, 0.0) for r in recent) / len(recent)
    at_target = left / costs.target_rate if costs.target_rate else 0.0
    floor = costs.stop + bare + costs.freeze + costs.fixed + costs.target
    return Forecast(
        stop=costs.stop,
        sync=bare + cached / disk,
        freeze=costs.freeze,
        send=costs.fixed + left / wire,
        target=costs.target + at_target,
        left=int(left),
        floor=floor,
    )


def in_burst(rounds: Sequence[Round]) -> bool:
    """The load comes in bursts, and now is one.

    Only rounds of like length are compared: a long one sees a block that is
    written again and again only once.
    """
    now, rest = _recent(rounds)
    if not now:
        return False
    window = max(sum(r.window for r in rounds[len(rest) :]), SMOOTH)
    like = [r.dirty_rate for r in rounds[-HISTORY:] if window / 8 <= r.window <= window * 8]
    if len(like) < 4:
        return False
    low, high = min(like), max(like)
    return high > BURST * low and now > (low * high) ** 0.5 if low else now > high / BURST


def _varies(rounds: Sequence[Round]) -> bool:
    """The load was not the same all along."""
    rates = [r.dirty_rate for r in rounds[-HISTORY:]]
    return max(rates) > 2 * min(rates)


def _pause(m: Measured) -> float:
    """Rounds that do not help must not take the disk from the container: it has
    as long for itself as a round took, within bounds, since a quiet moment may
    come.  After a pause comes a round without one: only that shows how short a
    round can be."""
    last = m.rounds[-1]
    return 0.0 if last.paused else min(max(last.sync + last.seconds, SMOOTH), PAUSE)


def decide(m: Measured, policy: Policy) -> Decision:
    """After the rounds so far (the first pass apart)."""
    if not m.rounds:
        return Decision("round", "no round yet")
    if policy.max_freeze is None:
        return _decide_free(m, policy)
    return _decide_bound(m, policy, policy.max_freeze)


def _decide_bound(m: Measured, policy: Policy, limit: float) -> Decision:
    """--max-freeze: a contract."""
    f = forecast(m)
    fits = f.total <= limit
    figures = f"{_ms(f.total)} expected, {_ms(limit)} allowed"
    if fits and not (in_burst(m.rounds) and f.variable > policy.small):
        return Decision("freeze", figures, f)
    if m.elapsed >= policy.deadline:
        why = f"no moment fitted within {policy.deadline:g} s ({figures})"
        return Decision(policy.on_deadline, why, f)
    if fits:
        return Decision("round", "a burst is under way", f, pause=_pause(m))
    before = [forecast(m.until(n)).total for n in range(max(1, len(m.rounds) - 2), len(m.rounds))]
    if not before or f.total < policy.shrink * min(before):
        return Decision("round", f"still shrinking ({figures})", f)
    stuck = m.rounds[-policy.throttle_after :]
    throttle = len(stuck) == policy.throttle_after and all(
        forecast(m.until(n)).total > limit
        for n in range(len(m.rounds) - policy.throttle_after + 1, len(m.rounds) + 1)
    )
    return Decision("round", f"does not fit ({figures})", f, pause=_pause(m), throttle=throttle)


def _decide_free(m: Measured, policy: Policy) -> Decision:
    """No limit was given: as short as a bounded number of rounds makes it."""
    n, f = len(m.rounds), forecast(m)
    if f.variable <= policy.small:
        return Decision("freeze", "the rest is small", f)
    volume = sum(r.sent for r in m.rounds)
    if m.size and volume >= policy.max_volume * m.size:
        return Decision("freeze", f"{policy.max_volume:g} times the source was sent again", f)
    before = [forecast(m.until(k)).variable for k in range(max(1, n - 2), n)]
    shrinks = len(before) < 2 or f.variable < policy.shrink * min(before)
    paused = [k for k, r in enumerate(m.rounds) if r.paused]
    if shrinks and n < policy.max_rounds + 2 * len(paused):
        return Decision("round", "the rest is still shrinking", f)
    # A burst may end; but how long it lasts, nobody knows.
    waited = sum(r.window for r in m.rounds[paused[0] :]) if paused else 0.0
    changes = len(paused) < 3 or _varies(m.rounds)
    if waited < policy.patience and f.variable > policy.large and changes:
        return Decision("round", "waiting for a quieter moment", f, pause=_pause(m))
    why = f"{n} rounds done" if shrinks else "the rest has stopped shrinking"
    return Decision("freeze", why, f)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
