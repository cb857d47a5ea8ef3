# SPDX-License-Identifier: Apache-2.0
"""When another round of memory pays, against a simulated container whose truth is
known; and the chain of images that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import MIB

from pyploop.errors import ProtocolError
from pyploop.migration.image_chain import LONGEST, Chain
from pyploop.migration.memory_policy import MemoryPolicy, MemoryRound, another
from pyploop.migration.source.memory import approach

GIB = 1 << 30
POLICY = MemoryPolicy()


@dataclass
class World:
    """A container that writes `rate` bytes a second into `working_set` of its memory."""

    memory: float
    rate: float
    working_set: float
    wire: float = 300 * MIB
    least: float = 0.15
    """Seconds of a pre-dump of nothing."""
    disk: float = 0.1
    """Seconds of the disks' rounds in between."""
    frozen: float = 0.05
    rounds: list[MemoryRound] = field(default_factory=list)
    age: float = 0.0

    def dirty(self) -> float:
        if not self.rounds:
            return self.memory
        return min(self.rate * self.age, self.working_set)

    def dump(self) -> float:
        """Seconds that a dump would take which begins now."""
        return self.dirty() / self.wire

    def round(self) -> None:
        sent = self.dirty()
        seconds = self.least + sent / self.wire
        self.rounds.append(MemoryRound(int(sent), seconds, self.age, self.frozen))
        self.age = seconds + self.disk

    def ask(self, policy: MemoryPolicy = POLICY) -> bool:
        wire, memory = self.wire, int(self.memory)
        return another(self.rounds, policy, memory=memory, wire=wire, age=self.age).pays

    def run(self, policy: MemoryPolicy = POLICY) -> World:
        while self.ask(policy):
            self.round()
        return self


def test_an_idle_container_s_memory_goes_once_and_is_looked_at_once_more() -> None:
    world = World(2 * GIB, 0, 0).run()
    assert [r.sent for r in world.rounds] == [2 * GIB, 0]


def test_rounds_go_on_until_what_is_left_is_what_a_round_leaves() -> None:
    world = World(4 * GIB, 100 * MIB, GIB).run()
    sizes = [r.sent for r in world.rounds]
    assert 3 <= len(sizes) <= POLICY.max_rounds
    assert sizes == sorted(sizes, reverse=True)
    # One more would save less than it stands still.
    before = world.dump()
    world.round()
    assert before - world.dump() < world.frozen


def test_a_container_that_rewrites_all_its_memory_is_not_chased() -> None:
    assert len(World(2 * GIB, 10 * GIB, 2 * GIB).run().rounds) <= 2


def test_little_memory_is_left_to_the_dump() -> None:
    assert World(8 * MIB, 0, 0).run().rounds == []
    assert World(8 * MIB, 0, 0, wire=20 * MIB).ask()


def test_a_standstill_that_costs_more_than_it_saves_ends_the_rounds() -> None:
    quick = World(GIB, 50 * MIB, GIB).run()
    slow = World(GIB, 50 * MIB, GIB, frozen=2.0).run()
    assert len(slow.rounds) < len(quick.rounds)


def test_no_more_rounds_nor_bytes_are_sent_than_allowed() -> None:
    assert len(World(4 * GIB, 100 * MIB, GIB).run(MemoryPolicy(max_rounds=2)).rounds) == 2
    world = World(GIB, 250 * MIB, GIB).run(MemoryPolicy(max_rounds=50, shrink=2.0))
    assert sum(r.sent for r in world.rounds) <= POLICY.max_volume * GIB


def test_what_a_round_saves_is_what_is_written_less_what_is_written_meanwhile() -> None:
    """By hand: 100 MiB/s of wire, and 20 that are written."""
    rounds = [MemoryRound(200 * MIB, 2.0), MemoryRound(60 * MIB, 0.8, window=3.0, frozen=0.1)]
    got = another(rounds, POLICY, memory=GIB, wire=0.0, age=1.0)
    assert (got.pays, got.expected) == (True, 20 * MIB)
    assert got.why == "saves 160 ms of downtime, freezes for 100 ms"
    got = another(rounds, POLICY, memory=4 * MIB, wire=0.0, age=1.0)
    assert not got.pays, "no more than all of the memory"
    # Rounds of next to nothing do not show the speed, but that each takes 80 ms.
    rounds = [MemoryRound(MIB // 2, 0.18), MemoryRound(MIB // 4, 0.13, window=0.25)]
    got = another(rounds, POLICY, memory=GIB, wire=5 * MIB, age=4.0)
    assert (got.expected, got.why) == (4 * MIB, "saves 624 ms of downtime, freezes for 50 ms")


def test_rounds_that_do_not_shrink_enough_are_the_last() -> None:
    shrink = MemoryPolicy(shrink=0.5)
    for last, pays in ((50, False), (49, True)):
        rounds = [MemoryRound(100 * MIB, 1.0), MemoryRound(last * MIB, 0.5, window=1.0)]
        got = another(rounds, shrink, memory=GIB, wire=0.0, age=1.0)
        assert got.pays == pays
        assert ("stopped shrinking" in got.why) != pays


def test_what_is_not_known_is_tried() -> None:
    assert another([], POLICY, memory=0, wire=0.0, age=0.0).pays
    one = [MemoryRound(100 * MIB, 1.0)]
    assert another(one, POLICY, memory=0, wire=0.0, age=1.0).pays
    assert not another([MemoryRound(MIB, 0.02)], POLICY, memory=0, wire=0.0, age=1.0).pays


# ---- taking turns with the disks


class Said:
    """Disks, or memory, that say what is asked of them."""

    def __init__(self, log: list[str], answers: list[bool] | None) -> None:
        self._log, self._answers = log, answers
        self.wanted = answers is not None

    def __getattr__(self, name: str) -> Callable[..., float]:
        def step(*args: float) -> float:
            if name == "round":
                assert args == (7.0,)
                answer = bool(self._answers and self._answers.pop(0))
                self._log.append("memory" if answer else "no memory")
                return answer
            self._log.append(name)
            return 7.0

        return step


@pytest.mark.parametrize(
    ("answers", "steps"),
    [
        (None, "copy_while_running"),
        ([], "first_pass, no memory, converge, no memory, prepare_freeze, no memory"),
        (
            [True, True, False, True],
            "first_pass, memory, converge, memory, converge, no memory, prepare_freeze, "
            "memory, prepare_freeze, no memory",
        ),
    ],
)
def test_after_each_memory_round_the_disks_have_theirs(
    answers: list[bool] | None, steps: str
) -> None:
    log: list[str] = []
    approach(Said(log, None), Said(log, answers))  # type: ignore[arg-type]
    assert ", ".join(log) == steps


# ---- the chain


def test_a_chain_links_each_folder_to_the_one_before(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    (chain.append(1, 0) / "x").write_text("1")
    chain.append(2, 1)
    last = chain.append(0, 2)
    assert (last / "parent" / "parent" / "x").read_text() == "1"
    assert last.name == "images"
    assert not (tmp_path / "1" / "parent").exists()


def test_a_dump_without_a_parent_drops_the_rounds(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.append(1, 0)
    chain.append(2, 1)
    chain.append(0, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    ("number", "parent"),
    [(2, 0), (0, 1), (-1, 0), (1, 1), ("1", 0), (1.0, 0), (True, 0), (1, "../.."), (None, 0)],
)
def test_numbers_that_are_not_the_next_ones_are_refused(
    tmp_path: Path, number: int, parent: int
) -> None:
    with pytest.raises(ProtocolError):
        Chain(tmp_path).append(number, parent)
    assert not any(tmp_path.iterdir())


def test_a_chain_is_not_endless(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    for number in range(1, LONGEST + 1):
        chain.append(number, number - 1)
    with pytest.raises(ProtocolError):
        chain.append(LONGEST + 1, LONGEST)
