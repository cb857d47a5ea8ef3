# SPDX-License-Identifier: Apache-2.0
"""When to do another round, to freeze, or to give up: pure functions of what was
measured.  No I/O, no clock (docs/internals/rounds.md has the formulae).

`forecast` says how long a freeze would last that began now.  `decide` compares that
with --max-freeze or, without it, with what further rounds could still save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pyploop.units import MIB

SMOOTH = 0.02
"""Seconds of writing that a dirty rate is averaged over, at least."""
MEANINGFUL = MIB
"""A round of fewer bytes does not measure a throughput."""
PAUSE = 0.3
"""Seconds of the longest pause between two rounds."""
BURST = 4.0
"""Ratio of the highest to the lowest dirty rate of a load that comes in bursts."""
HISTORY = 16
"""Rounds that are searched for bursts."""


@dataclass(frozen=True)
class Round:
    """One finished round: `sent` bytes in `seconds`.  Its marks were collected in
    `window` seconds of writing."""

    sent: int
    seconds: float
    window: float
    dirty: int | None = None
    """Bytes that were marked; None: as many as were sent."""
    sync: float = 0.0
    """Seconds of the source's own write-back, at the beginning."""
    flushed: int = 0
    """Bytes that the write-back wrote, as far as the tracker saw."""
    left: int = 0
    """Bytes of hot blocks that were left for last."""
    paused: bool = False
    """There was a pause before it."""

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
    """Seconds of a freeze that do not depend on what is left to send.  The defaults
    apply until they are measured."""

    stop: float = 0.0
    """The stop command."""
    freeze: float = 0.002
    """FIFREEZE; the rehearsal measures it."""
    target: float = 0.005
    """One round trip, in which the peer has nothing to sync."""
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
    """The part of the total that does not depend on what is left."""

    @property
    def total(self) -> float:
        return self.stop + self.sync + self.freeze + self.send + self.target

    @property
    def variable(self) -> float:
        """Seconds that further rounds could save at most."""
        return max(self.total - self.floor, 0.0)


OnDeadline = Literal["freeze", "abort"]


@dataclass(frozen=True)
class Policy:
    """What the user allows; times in seconds.

    max_freeze: the freeze begins only when its forecast fits; None: it begins when
    further rounds save nothing.  deadline: with max_freeze, seconds from the end of
    the first pass on, after which on_deadline says what happens.
    """

    max_freeze: float | None = None
    deadline: float = 600.0
    on_deadline: OnDeadline = "abort"
    small: float = 0.005
    """Seconds that are not worth another round."""
    large: float = 0.03
    """Seconds that are worth waiting for a quieter moment."""
    shrink: float = 0.8
    """Without max_freeze, a round that leaves more than this part saves too little."""
    max_rounds: int = 10
    """Without max_freeze, after the first pass (the C tool's limit)."""
    max_volume: float = 2.0
    """Without max_freeze, bytes of all rounds over those of the source (the C tool's)."""
    patience: float = 2.0
    """Without max_freeze, seconds to wait for a quieter moment."""
    throttle_after: int = 5
    """Rounds that do not fit until the writer is slowed down (--throttle)."""


Action = Literal["round", "freeze", "abort"]


@dataclass(frozen=True)
class Decision:
    """pause: seconds before the next round.  throttle: slow the writer down."""

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
    """What a decision is based on.  elapsed: seconds since the first pass ended.
    size: bytes of the source."""

    first: Round
    rounds: Sequence[Round]
    costs: Costs = field(default_factory=Costs)
    elapsed: float = 0.0
    size: int = 0

    def until(self, n: int) -> Measured:
        """The same after the first `n` rounds, to see how the forecast has changed."""
        return Measured(self.first, self.rounds[:n], self.costs, self.elapsed, self.size)


def dirty_rate(rounds: Sequence[Round]) -> float:
    """Bytes per second to expect: the rate of the last SMOOTH seconds, extrapolated when
    it has been growing."""
    now, rest = _recent(rounds)
    before, rest = _recent(rest)
    earlier, _ = _recent(rest)
    if now > before > earlier > 0:
        return now + (now - before)
    return now


def _recent(rounds: Sequence[Round]) -> tuple[float, Sequence[Round]]:
    """(the rate of the last SMOOTH seconds, the rounds before those)."""
    window, dirty, n = 0.0, 0.0, len(rounds)
    while n and window < SMOOTH:
        n -= 1
        window += rounds[n].window
        dirty += rounds[n].dirty_rate * rounds[n].window
    return (dirty / window if window else 0.0), rounds[:n]


def _throughput(parts: Sequence[tuple[int, float]], otherwise: float) -> float:
    """Bytes per second of the last parts that are large enough to measure it."""
    large = [p for p in parts if p[0] >= MEANINGFUL and p[1] > 0][-4:]
    if not large:
        return max(otherwise, 1.0)
    return sum(n for n, _ in large) / sum(s for _, s in large)


def forecast(m: Measured, pending: int | None = None) -> Forecast:
    """How long a freeze would last that begins now, after at least one round.

    pending: bytes that are marked now; None: not known.
    """
    costs, last = m.costs, m.rounds[-1]
    rate = dirty_rate(m.rounds)
    wire = _throughput([(r.sent, r.seconds) for r in (m.first, *m.rounds)], m.first.rate)
    disk = _throughput([(r.flushed, r.sync) for r in m.rounds], wire)
    # The sync inside the freeze writes what was dirtied in the page cache since the
    # last sync.  To be sent: that, and what was written since the last take.
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
    """The load comes in bursts, and this is one.

    Only rounds of similar length are compared: a long round counts a block that is
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
    """The load has changed during the rounds."""
    rates = [r.dirty_rate for r in rounds[-HISTORY:]]
    return max(rates) > 2 * min(rates)


def _pause(m: Measured) -> float:
    """Rounds that do not help must not take the disk from the container.  So it has the
    disk for as long as a round took, within bounds, while waiting for a quiet moment.
    After a pause comes a round without one, since only that shows how short a round
    can be."""
    last = m.rounds[-1]
    return 0.0 if last.paused else min(max(last.sync + last.seconds, SMOOTH), PAUSE)


def decide(m: Measured, policy: Policy) -> Decision:
    """What to do after the rounds so far (the first pass does not count)."""
    if not m.rounds:
        return Decision("round", "no round yet")
    if policy.max_freeze is None:
        return _decide_free(m, policy)
    return _decide_bound(m, policy, policy.max_freeze)


def _decide_bound(m: Measured, policy: Policy, limit: float) -> Decision:
    """With --max-freeze: the freeze must fit."""
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
    """Without --max-freeze: as short as a bounded number of rounds makes it."""
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
    # A burst may end, but it is not known when.
    waited = sum(r.window for r in m.rounds[paused[0] :]) if paused else 0.0
    changes = len(paused) < 3 or _varies(m.rounds)
    if waited < policy.patience and f.variable > policy.large and changes:
        return Decision("round", "waiting for a quieter moment", f, pause=_pause(m))
    why = f"{n} rounds done" if shrinks else "the rest has stopped shrinking"
    return Decision("freeze", why, f)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
