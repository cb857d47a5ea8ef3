# SPDX-License-Identifier: Apache-2.0
"""How long a container would stay suspended, and whether that is allowed: pure functions of
what was measured.  No I/O, no clock (docs/internals/suspended-time.md).

    total = suspend + max(dump + transfer, disk) + restore

Each step of the memory takes a fixed time, and a time for each byte.  Both begin with a
model of an idle host (MODEL).  How busy the hosts are now is measured, and earlier
migrations between the same two hosts correct the rest (`learn`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

from pyploop.diskcopy.freeze_policy import OnDeadline
from pyploop.units import GIB, format_size

Later = Literal["", "lazy", "post-copy"]
"""When private memory is loaded: before the container runs; after that, from images on the
target; after that, from the source."""


@dataclass(frozen=True)
class Line:
    """Seconds of a step: `fixed`, and for each GiB of memory."""

    fixed: float
    per_gib: float = 0.0


MODEL: dict[str, Line] = {
    "suspend": Line(0.015),
    "dump": Line(0.085, 0.6),
    "post-copy dump": Line(0.07, 0.13),
    "transfer": Line(0.01),
    "restore": Line(0.09, 0.75),
    "lazy restore": Line(0.1, 0.02),
}
"""Seconds on two idle cores (docs/internals/suspended-time.md).  The
transfer's part for each byte comes from the connection."""
OVERLAP = 0.5
"""Part of the dump's time for each byte in which its bytes already cross."""
SLOW = 100e6
"""Bytes per second of a connection of which nothing is known."""
SAMPLES = 8
"""Earlier migrations that count: the last ones."""
CLAMP = 10.0
"""A correction is at most this factor, either way."""
LEAST = 0.5
"""A sample corrects the part of a step that makes up this much of it, at least."""


@dataclass(frozen=True)
class Facts:
    """What a forecast is made from.  Sizes in bytes, times in seconds."""

    memory: int
    """In the dump, if the container were suspended now."""
    ahead: int = 0
    """On the target already, by memory rounds.  A restore copies it in any case."""
    later: Later = ""
    deferrable: int = 0
    """Of `memory`, what can be loaded after the container runs."""
    wire: float = 0.0
    """Bytes per second of the connection; 0: not known."""
    wire_from: str = ""
    """What has shown it, in words."""
    disk: float = 0.0
    """The forecast of the disks' and trees' last pass, which runs beside the dump."""
    busy: float = 1.0
    """How many times longer work takes on the source than if it were idle."""
    busy_there: float = 1.0
    """The same on the target."""
    shrinks: bool = False
    """Memory rounds can make `memory` smaller."""


@dataclass(frozen=True)
class Step:
    """Seconds by the model alone: what an actual time is compared with later."""

    name: str
    fixed: float
    variable: float

    def times(self, factor: float) -> Step:
        return Step(self.name, self.fixed * factor, self.variable * factor)


@dataclass(frozen=True)
class Factors:
    """The corrections of one step, and how many migrations have shown them."""

    fixed: float = 1.0
    variable: float = 1.0
    samples: int = 0


@dataclass(frozen=True)
class Sample:
    """One step of an earlier migration: the model's two parts, for what was really sent, and
    the seconds that it took."""

    fixed: float
    variable: float
    actual: float


Learned = Mapping[str, Factors]
"""Step -> its corrections."""


@dataclass(frozen=True)
class SuspendForecast:
    """A suspended time that has not begun, in seconds by step."""

    suspend: float
    dump: float
    transfer: float
    """After the dump: what has not crossed by then."""
    restore: float
    disk: float
    """Beside dump and transfer."""
    facts: Facts
    learned: dict[str, int] = field(default_factory=dict)
    """Step -> number of earlier migrations that corrected it; 0: the model alone."""
    floor: float = 0.0
    """The part of the total that no round can make shorter."""

    @property
    def total(self) -> float:
        return self.suspend + max(self.dump + self.transfer, self.disk) + self.restore

    @property
    def steps(self) -> dict[str, float]:
        names = ("suspend", "dump", "transfer", "disk", "restore")
        return {name: getattr(self, name) for name in names}

    def in_words(self) -> str:
        f = self.facts
        wire = f"{format_size(f.wire)}/s ({f.wire_from})" if f.wire else "a speed not known"
        known = min(self.learned.values(), default=0)
        basis = f"{known} earlier migrations" if known else "a model, as none has gone there yet"
        return (
            f"{self.total:.3f} s (suspend {self.suspend:.3f}, dump {self.dump:.3f}, "
            f"transfer {self.transfer:.3f}, restore {self.restore:.3f}; "
            f"disks {self.disk:.3f} beside dump and transfer), for {format_size(f.memory)} of "
            f"memory at {wire}, by {basis}"
        )


def model(facts: Facts) -> dict[str, Step]:
    """Each step by the model alone: `suspend`, `dump`, `transfer`, `restore` -> the step, whose
    name also says which kind it is."""
    crossing = facts.memory - (facts.deferrable if facts.later == "post-copy" else 0)
    at_once = facts.memory - (facts.deferrable if facts.later else 0)
    dump = "post-copy dump" if facts.later == "post-copy" else "dump"
    restore = "lazy restore" if facts.later else "restore"
    beside = OVERLAP * _step(dump, crossing).variable * facts.busy
    crosses = crossing / (facts.wire or SLOW)
    # What a lazy restore still copies is copied as an eager one does it.
    copied = _step("restore", at_once + facts.ahead).variable
    behind = _step("lazy restore", facts.memory - at_once).variable
    return {
        "suspend": _step("suspend", 0).times(facts.busy),
        "dump": _step(dump, facts.memory).times(facts.busy),
        "transfer": Step("transfer", MODEL["transfer"].fixed, max(crosses - beside, 0.0)),
        "restore": Step(restore, MODEL[restore].fixed, copied + behind).times(facts.busy_there),
    }


def _step(name: str, size: int) -> Step:
    line = MODEL[name]
    return Step(name, line.fixed, line.per_gib * size / GIB)


def forecast(facts: Facts, learned: Learned | None = None) -> SuspendForecast:
    """How long a suspended time would last that begins now."""
    seconds, known = _corrected(facts, learned or {})
    least, _ = _corrected(_at_best(facts), learned or {})
    floor = sum(least.values())
    return SuspendForecast(**seconds, disk=facts.disk, facts=facts, learned=known, floor=floor)


def _at_best(facts: Facts) -> Facts:
    """After rounds that have left nothing."""
    best = replace(facts, disk=0.0)
    if facts.shrinks:
        best = replace(best, memory=0, deferrable=0, ahead=facts.ahead + facts.memory)
    return best


def _corrected(facts: Facts, learned: Learned) -> tuple[dict[str, float], dict[str, int]]:
    """(seconds, number of samples) by step."""
    seconds, known = {}, {}
    for name, step in model(facts).items():
        factors = learned.get(step.name, Factors())
        seconds[name] = step.fixed * factors.fixed + step.variable * factors.variable
        known[name] = factors.samples
    return seconds, known


def learn(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Factors]:
    """Step -> corrections, from its samples, the oldest first.  A step that was mostly fixed
    shows how long that is; one that was mostly for its bytes shows their speed."""
    return {name: _learn(of_step[-SAMPLES:]) for name, of_step in samples.items() if of_step}


def _learn(samples: Sequence[Sample]) -> Factors:
    small = [s for s in samples if s.fixed >= LEAST * (s.fixed + s.variable)]
    large = [s for s in samples if s.variable > LEAST * (s.fixed + s.variable)]
    fixed = _clamped(median(s.actual / s.fixed for s in small)) if small else 1.0
    variable = 1.0
    if large:
        variable = _clamped(median((s.actual - fixed * s.fixed) / s.variable for s in large))
    return Factors(fixed, variable, len(samples))


def _clamped(factor: float) -> float:
    return min(max(factor, 1 / CLAMP), CLAMP)


def samples_of(facts: Facts, actual: Mapping[str, float]) -> dict[str, Sample]:
    """What a migration has shown.  facts: with what was really sent.  actual: step ->
    seconds."""
    return {
        step.name: Sample(step.fixed, step.variable, actual[name])
        for name, step in model(facts).items()
        if name in actual
    }


# ---- --max-suspend


@dataclass(frozen=True)
class Contract:
    """What the user allows; seconds.  max_suspend: None allows any."""

    max_suspend: float | None = None
    deadline: float = 600.0
    on_deadline: OnDeadline = "abort"


Action = Literal["suspend", "again", "abort"]


@dataclass(frozen=True)
class Verdict:
    """suspend: now.  again: what is left may be less after another round.  abort: the
    container goes on here."""

    action: Action
    why: str
    fits: bool


def decide(f: SuspendForecast, contract: Contract, elapsed: float) -> Verdict:
    """The last decision before the container is suspended.  elapsed: since the first one."""
    limit = contract.max_suspend
    if limit is None:
        return Verdict("suspend", "", True)
    figures = f"{_ms(f.total)} expected, {_ms(limit)} allowed"
    if f.total <= limit:
        return Verdict("suspend", figures, True)
    last: Action = "suspend" if contract.on_deadline == "freeze" else "abort"
    if f.floor > limit:
        why = f"{figures}; {_ms(f.floor)} of it would be left after any number of rounds"
        return Verdict(last, why, False)
    if elapsed >= contract.deadline:
        return Verdict(last, f"no moment fitted within {contract.deadline:g} s ({figures})", False)
    return Verdict("again", figures, False)


def expected_memory(whole: int, rounds: Sequence[tuple[int, float]], age: float) -> int:
    """Bytes of the next dump.  whole: of one without rounds, 0 when not known.  rounds: (bytes
    sent, seconds of writing covered) of the memory rounds on which the dump builds.  age:
    seconds since the last of them began."""
    if not rounds:
        return whole
    if len(rounds) == 1:
        # It has shown nothing of the speed of writing; what came since is not less than this.
        return max(whole - rounds[0][0], 0)
    sent, window = rounds[-1]
    expected = int(sent / window * age) if window > 0 else sent
    return min(expected, whole) if whole else expected


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
