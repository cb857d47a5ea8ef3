# SPDX-License-Identifier: Apache-2.0
"""How much of a repair is done inside a freeze, and what is left for later."""

from __future__ import annotations

from typing import Any, cast

import pytest

from pyploop._core import Extents
from pyploop.diskcopy.options import Summary
from pyploop.diskcopy.repairs import SLICE, Repairs
from pyploop.report.events import Reporter
from pyploop.trackers import Batch, Repair
from pyploop.units import MIB

DATA = [(4096, 8192), (MIB, 20 * MIB), (30 * MIB, 31 * MIB)]
HOLES = [(40 * MIB, 80 * MIB)]


class MadePump:
    """Compares at `rate` bytes per second of a clock of its own; all differs."""

    def __init__(self, rate: float) -> None:
        self.rate, self.now = rate, 100.0
        self.sent: list[Batch] = []

    def send(self, batches: list[Batch]) -> int:
        self.sent += batches
        size = sum(b.extents.bytes for b in batches if not b.holes)
        self.now += size / self.rate
        return size

    def extents(self, holes: bool) -> list[tuple[int, int]]:
        return [e for b in self.sent if b.holes == holes for e in b.extents]


@pytest.fixture
def pump(monkeypatch: pytest.MonkeyPatch) -> MadePump:
    made = MadePump(10.0 * MIB)
    monkeypatch.setattr("pyploop.diskcopy.repairs.time.monotonic", lambda: made.now)
    return made


def made(pump: MadePump, limited: bool = False) -> Repairs:
    summary = Summary("/dev/made", 80 * MIB, "bpf", "", "", "")
    return Repairs(cast(Any, pump), Reporter(), summary, limited=limited)


def everything() -> Repair:
    data = Batch(Extents.of(DATA), changed=True)
    return Repair([data, Batch(Extents.of(HOLES), changed=True, holes=True)], "all")


def joined(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, end in extents:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


def test_a_repair_that_fits_is_done_in_slices(pump: MadePump) -> None:
    r = made(pump)
    assert r.run(everything(), frozen=True, until=pump.now + 60) == 20 * MIB + 4096
    assert joined(pump.extents(holes=False)) == DATA
    assert pump.extents(holes=True) == HOLES, "a hole that is cut would lose a chunk"
    assert all(b.extents.bytes <= SLICE for b in pump.sent if not b.holes)
    assert r.left is None and r.rate == pytest.approx(10 * MIB)


def test_a_repair_that_turns_out_too_long_leaves_the_rest_for_later(pump: MadePump) -> None:
    r = made(pump)
    before = pump.now
    assert r.run(everything(), frozen=True, until=before + 1.5) is None
    assert pump.now - before == pytest.approx(SLICE / (10 * MIB)), "one slice told the rate"
    assert r.seconds_left == pytest.approx((20 * MIB + 4096 - SLICE) / (10 * MIB))
    r.run_left()
    assert r.left is None
    assert joined(pump.extents(holes=False)) == DATA
    assert pump.extents(holes=True) == HOLES


def test_a_repair_that_is_known_to_be_too_long_is_not_begun(pump: MadePump) -> None:
    r = made(pump)
    r.run(everything(), frozen=False)
    pump.sent.clear()
    assert r.run(everything(), frozen=True, until=pump.now + 1) is None
    assert not pump.sent
    assert r.left is not None and r.seconds_left == pytest.approx(2, rel=0.01)


def test_a_rate_under_bwlimit_says_nothing_about_the_freeze(pump: MadePump) -> None:
    r = made(pump, limited=True)
    pump.rate = 1000.0
    r.run(everything(), frozen=False)
    pump.rate = 100.0 * MIB
    assert r.run(everything(), frozen=True, until=pump.now + 1) == 20 * MIB + 4096
