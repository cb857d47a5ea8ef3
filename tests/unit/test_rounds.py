# SPDX-License-Identifier: Apache-2.0
"""The decision to freeze, against a simulated writer, disk, wire and target
whose truth is known (steady, bursty, growing and hot loads) and against rounds
of real copies; and what is left for last."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pyploop._core import Extents
from pyploop.diskcopy.freeze_policy import (
    Costs,
    Decision,
    Forecast,
    Measured,
    Policy,
    Round,
    decide,
    forecast,
)
from pyploop.diskcopy.hot_blocks import HotBlocks
from pyploop.trackers import Batch

MIB = 1 << 20
GIB = 1 << 30
FIRST = Round(GIB, 2.0, 2.0)
COSTS = Costs(stop=0.01, freeze=0.001, target=0.002, target_rate=400 * MIB)

Load = Callable[[float], float]
"""Seconds -> bytes per second that are dirtied then."""


@dataclass
class World:
    """A writer into a page cache, which syncs move to a disk; marks follow."""

    load: Load
    working_set: int = 4 * GIB
    """Bytes that the writer touches: no more than that is ever dirty."""
    disk: float = 600 * MIB
    wire: float = 800 * MIB
    bare_sync: float = 0.002
    costs: Costs = COSTS
    now: float = 0.0
    cached: float = 0.0
    marked: float = 0.0
    since_take: float = 0.0
    rounds: list[Round] = field(default_factory=list)

    def write(self, seconds: float) -> None:
        steps = max(int(seconds / 0.001), 1)
        for _ in range(steps):
            self.cached += self.load(self.now) * seconds / steps
            self.now += seconds / steps
        self.cached = min(self.cached, self.working_set)

    def sync(self, writing: bool = True) -> float:
        flushed, self.cached = self.cached, 0.0
        self.marked = min(self.marked + flushed, self.working_set)
        seconds = self.bare_sync + flushed / self.disk
        if writing:
            self.write(seconds)
        return seconds

    def round(self, pause: float = 0.0) -> None:
        self.write(pause)
        before = self.marked
        sync = self.sync()
        taken, flushed = self.marked, self.marked - before
        window, self.since_take = self.now - self.since_take, self.now
        self.marked = 0.0
        seconds = 0.0005 + taken / self.wire
        self.write(seconds)
        made = Round(int(taken), seconds, window, dirty=int(taken), sync=sync, flushed=int(flushed))
        self.rounds.append(replace(made, paused=pause > 0))

    def freeze(self) -> float:
        """Seconds that a freeze takes which begins now."""
        c = self.costs
        self.write(c.prelude)
        self.write(c.stop)
        sync = self.sync(writing=False)
        send = c.fixed + self.marked / self.wire
        target = c.target + self.marked / c.target_rate
        return c.stop + sync + c.freeze + send + target


@dataclass
class Outcome:
    decision: Decision
    actual: float
    at: float
    rounds: int

    @property
    def forecast(self) -> Forecast:
        assert self.decision.forecast is not None
        return self.decision.forecast

    @property
    def kept(self) -> bool:
        """Within what the forecast promises."""
        return self.actual <= 1.5 * self.forecast.total + 0.02


def simulate(world: World, policy: Policy) -> Outcome:
    """From the end of the first pass, in which the writer wrote, too."""
    world.write(2.0)
    start = world.now
    decision = Decision("round", "")
    while decision.action == "round":
        world.round(decision.pause)
        elapsed = world.now - start
        decision = decide(Measured(FIRST, world.rounds, world.costs, elapsed, GIB), policy)
        assert len(world.rounds) < 100_000
    return Outcome(decision, world.freeze(), world.now - start, len(world.rounds))


def steady(rate: float) -> Load:
    return lambda t: rate


def bursty(high: float, low: float, period: float, phase: float = 0.0) -> Load:
    return lambda t: high if ((t + phase) % period) < period / 2 else low


def growing(start: float, per_second: float) -> Load:
    return lambda t: start + per_second * t


LOADS = {
    "idle": steady(0),
    "4 MiB/s": steady(4 * MIB),
    "100 MiB/s": steady(100 * MIB),
    "200 MiB/s": steady(200 * MIB),
    "bursts": bursty(250 * MIB, 2 * MIB, 1.0),
    "quick bursts": bursty(200 * MIB, 0, 0.1),
    "growing": growing(10 * MIB, 10 * MIB),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_without_a_limit_rounds_are_few_and_the_freeze_short(load: Load) -> None:
    got = simulate(World(load), Policy())
    assert got.decision.action == "freeze"
    assert got.rounds <= Policy.max_rounds + 20  # most of them waiting for a quiet moment
    assert got.actual < 0.06 and got.kept
    assert got.at < 6


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("limit", [0.025, 0.04, 0.1])
def test_a_freeze_that_begins_before_the_deadline_ends_within_the_limit(
    name: str, limit: float
) -> None:
    got = simulate(World(LOADS[name]), Policy(max_freeze=limit, deadline=20))
    if got.decision.action == "freeze":
        assert got.forecast.total <= limit and got.at < 20.5
        # Bursts that are shorter than a round may begin in the freeze.
        assert got.actual <= (1.5 * limit if name == "quick bursts" else limit)
    else:
        assert got.decision.action == "abort" and got.at >= 20
        assert got.actual > limit, "it would have ended within the limit"


@pytest.mark.parametrize("phase", [0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8])
def test_bursts_are_waited_out(phase: float) -> None:
    load = bursty(400 * MIB, 1 * MIB, 2.0, phase)
    world = World(load)
    got = simulate(world, Policy(max_freeze=0.025, deadline=30))
    assert got.decision.action == "freeze" and got.kept
    assert load(world.now) < 2 * MIB, "it began in a burst"


@pytest.mark.parametrize("on_deadline", ["freeze", "abort"])
def test_what_never_fits_ends_at_the_deadline_as_asked(on_deadline: Any) -> None:
    policy = Policy(max_freeze=0.02, deadline=5, on_deadline=on_deadline)
    got = simulate(World(steady(500 * MIB), working_set=256 * MIB), policy)
    assert got.decision.action == on_deadline
    assert 5 <= got.at < 7
    assert "no moment fitted within 5 s" in got.decision.why


def test_a_limit_shorter_than_a_freeze_that_was_not_rehearsed_can_be_met() -> None:
    quiet = [Round(0, 0.001, 0.02, sync=0.001)] * 3
    decision = decide(Measured(FIRST, quiet, Costs(stop=0.01)), Policy(max_freeze=0.03))
    assert decision.action == "freeze"


def test_a_writer_that_is_too_fast_is_to_be_throttled() -> None:
    world = World(steady(500 * MIB))
    world.write(2.0)
    asked = []
    pause = 0.0
    for _ in range(20):
        world.round(pause)
        decision = decide(
            Measured(FIRST, world.rounds, COSTS, world.now, GIB), Policy(max_freeze=0.03)
        )
        asked.append(decision.throttle)
        pause = decision.pause
        if decision.throttle:
            world.load = steady(MIB)
    assert not any(asked[:4]) and any(asked)
    assert decision.action == "freeze"


def test_rounds_that_do_not_help_leave_the_disk_to_the_container() -> None:
    world = World(steady(500 * MIB), working_set=256 * MIB)
    simulate(world, Policy(max_freeze=0.02, deadline=20))
    late = world.rounds[len(world.rounds) // 2 :]
    busy = sum(r.sync + r.seconds for r in late)
    assert busy < 0.9 * sum(r.window for r in late)
    assert any(r.paused for r in late)


def test_a_hot_spot_is_forecast_by_its_short_rounds() -> None:
    """Few blocks, rewritten all the time: a long round sees each only once."""
    world = World(steady(100 * MIB), working_set=3 * MIB)
    got = simulate(world, Policy(max_freeze=0.05, deadline=20))
    assert got.decision.action == "freeze" and got.kept


def test_most_freezes_end_within_the_forecast() -> None:
    kept, all_of_them = 0, 0
    phases = [n / 7 for n in range(7)]
    for phase, high, low, period in itertools.product(
        phases, (20 * MIB, 80 * MIB, 200 * MIB), (0, 10 * MIB), (0.05, 0.4, 3.0)
    ):
        got = simulate(
            World(bursty(high, low, period, phase * period)),
            Policy(max_freeze=0.05, deadline=10, on_deadline="freeze"),
        )
        kept += got.kept
        all_of_them += 1
    assert kept >= 0.95 * all_of_them, f"{kept} of {all_of_them}"


def test_a_growing_load_is_forecast_ahead() -> None:
    def history(rates: list[float]) -> list[Round]:
        return [Round(int(r * 0.1), 0.01, 0.1, sync=0.005) for r in rates]

    rates = [10e6, 20e6, 30e6]
    flat = forecast(Measured(FIRST, history([30e6] * 3), COSTS))
    grown = forecast(Measured(FIRST, history(rates), COSTS))
    shrunk = forecast(Measured(FIRST, history(rates[::-1]), COSTS))
    assert shrunk.left < flat.left < grown.left
    assert math.isclose(grown.left, flat.left * 40 / 30, rel_tol=0.01)


def test_a_forecast_adds_up_as_the_document_says() -> None:
    """docs/internals/rounds.md, by hand: 100 MiB/s of wire, 40 of disk, 10 are dirtied."""
    costs = Costs(0.05, freeze=0.002, target=0.03, target_rate=50 * MIB, fixed=0.004, prelude=0.006)
    last = Round(10 * MIB, 0.1, 1.0, sync=0.25, flushed=8 * MIB)
    before = replace(last, sync=0.15)
    f = forecast(Measured(Round(100 * MIB, 1.0, 1.0), [before, last], costs))
    late = 10 * (0.1 + 0.006 + 0.05)
    cached = late + 10 * 0.25  # MiB
    bare = (0.25 - 0.2) / 2
    assert f.left / MIB == pytest.approx(cached)
    assert f.sync == pytest.approx(bare + cached / 40)
    assert f.send == pytest.approx(0.004 + cached / 100)
    assert f.target == pytest.approx(0.03 + cached / 50)
    assert f.total == pytest.approx(0.05 + f.sync + 0.002 + f.send + f.target)
    assert f.floor == pytest.approx(0.05 + bare + 0.002 + 0.004 + 0.03)
    assert f.variable == pytest.approx(f.total - f.floor)


def test_what_is_marked_already_counts() -> None:
    m = Measured(FIRST, [Round(4096, 0.001, 0.1)], COSTS)
    assert forecast(m, pending=50 * MIB).left >= 50 * MIB
    assert forecast(m, pending=0).left < MIB


def test_rounds_without_a_limit_are_bounded_as_the_c_tools_are() -> None:
    ever_less = [Round(int(2**40 * 0.5**n), 10 * 0.5**n, 100 * 0.5**n) for n in range(20)]
    m = Measured(FIRST, ever_less, COSTS, elapsed=100)
    assert next(n for n in range(1, 21) if decide(m.until(n), Policy(patience=0)).freeze) == 10
    twice = replace(m, size=2**40).until(2)
    assert not decide(twice, Policy()).freeze
    assert "2 times the source" in decide(replace(m, size=2**39).until(2), Policy()).why


def test_a_round_without_time_has_no_rate() -> None:
    assert (Round(5, 0, 0).rate, Round(5, 0, 0).dirty_rate) == (0, 0)
    assert decide(Measured(Round(0, 0, 0), []), Policy()).action == "round"
    assert decide(Measured(Round(0, 0, 0), [Round(0, 0, 0)]), Policy()).freeze


# ---- hot blocks


def batches(*blocks: int) -> list[Batch]:
    return [Batch(Extents.of([(4096 * b, 4096 * (b + 1)) for b in sorted(blocks)]))]


def numbers(of: list[Batch]) -> set[int]:
    return {n for b in of for s, e in b.extents for n in range(s // 4096, e // 4096)}


def test_a_block_that_is_written_in_every_round_is_left_for_last() -> None:
    hot = HotBlocks(100 * 4096)
    sent = [numbers(hot.sift(batches(7, 10 + n))) for n in range(4)]
    assert sent == [{7, 10}, {7, 11}, {12}, {13}]
    assert hot.left == 4096
    assert numbers(hot.all(batches(20))) == {7, 20}
    assert hot.left == 0


def test_a_block_that_cools_down_is_sent_with_the_next_round() -> None:
    hot = HotBlocks(100 * 4096)
    for _ in range(3):
        hot.sift(batches(7, 8))
    assert hot.left == 8192
    assert numbers(hot.sift(batches(8, 9))) == {7, 9}
    assert numbers(hot.sift(batches())) == {8}
    assert hot.left == 0


def test_nothing_that_was_taken_is_lost_or_kept_for_a_comparison() -> None:
    hot = HotBlocks(100 * 4096)
    taken: set[int] = set()
    sent: set[int] = set()
    for n in range(30):
        blocks = {n % 5, 10 + n % 3, 40 + n}
        taken |= blocks
        sent |= numbers(hot.sift(batches(*blocks)))
    assert taken == sent | numbers(hot.all([]))
    compared = [Batch(Extents.of([(0, 4096)]), changed=True)]
    assert hot.sift(compared) is compared


# ---- recorded

RECORDED = json.loads(Path(__file__).with_name("rounds.json").read_text())
"""Copies of an ext4 of 1 GiB on a busy two-core machine: `first` (bytes,
seconds), `rounds` (sent, seconds, window, dirty, sync, flushed, left), the
forecast of the copy itself, the freeze that followed and FIFREEZE's part of it
(other copies on that machine switched the expediting of RCU off), in seconds."""


def recorded(copy: dict[str, Any]) -> Measured:
    sent, seconds = copy["first"]
    rounds = [
        Round(sent, seconds, window, dirty, sync, flushed, left)
        for sent, seconds, window, dirty, sync, flushed, left in copy["rounds"]
    ]
    costs = Costs(stop=0.01, freeze=0, target=0.005)
    return Measured(Round(sent, seconds, seconds), rounds, costs, size=copy["size"])


def test_recorded_freezes_ended_within_their_forecasts() -> None:
    """Within that of the copy, and, apart from FIFREEZE, within that which its
    rounds give today."""
    own = [c["frozen"] <= 1.5 * c["predicted"] + 0.02 for c in RECORDED]
    today = [
        c["frozen"] - c["fifreeze"] <= 1.5 * forecast(recorded(c)).total + 0.02 for c in RECORDED
    ]
    assert sum(own) >= 0.95 * len(own), f"{sum(own)} of {len(own)}"
    assert sum(today) >= 0.95 * len(today), f"{sum(today)} of {len(today)}"


@pytest.mark.parametrize(("limit", "begun"), [(0.01, 0), (0.02, 4), (0.04, 22), (0.5, 23)])
def test_recorded_freezes_that_the_limit_lets_begin_ended_within_it(
    limit: float, begun: int
) -> None:
    """Apart from FIFREEZE, and nine of ten of them: the machine was busy."""
    policy = Policy(max_freeze=limit)
    seconds = [c["frozen"] - c["fifreeze"] for c in RECORDED if decide(recorded(c), policy).freeze]
    assert len(seconds) == begun
    assert sum(s <= limit for s in seconds) >= 0.9 * begun


def test_a_limit_that_no_recorded_freeze_has_kept_lets_none_begin() -> None:
    shortest = min(c["frozen"] - c["fifreeze"] for c in RECORDED)
    for copy in RECORDED:
        m = recorded(copy)
        for n in range(1, len(m.rounds) + 1):
            assert decide(m.until(n), Policy(max_freeze=shortest / 2)).action == "round"
