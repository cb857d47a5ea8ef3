# SPDX-License-Identifier: Apache-2.0
"""What the campaigns against the agent's protocol found interesting, replayed, and
honest conversations with values of other kinds in them (docs/internals/testing.md)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import conversations
import pytest
from made_up import Finding, World
from scripts import agent_seeds, source_seeds

from pyploop.migration import undo_kinds

ODD: list[Any] = [None, True, -1, 0, 1.5, 1 << 62, "", "x", [], [[]], {}, {"id": 1}, "\0", 1e300]
MUTATED = 60
"""Conversations of each side; a campaign has as many as one likes."""


def corpus(name: str) -> list[bytes]:
    """Of a campaign, an input in hexadecimal digits on each line."""
    path = Path(__file__).with_name(f"{name}.corpus")
    return [bytes.fromhex(line) for line in path.read_text().split()]


@pytest.mark.parametrize("name", list(conversations.TARGETS))
@pytest.mark.invariant(number=4)
def test_every_conversation_ends_well(tmp_path: Path, name: str) -> None:
    run, seeds = conversations.TARGETS[name]
    world = World(tmp_path / "world")
    found = corpus(name)
    assert len(found) > 20
    for script in [*seeds(), *found]:
        run(world, script)


@pytest.mark.parametrize("name", ["agent", "source"])
def test_an_honest_conversation_moves_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for limit in ("ANSWER", "CALL"):
        monkeypatch.setattr(conversations, limit, 20.0)
    run, seeds = conversations.TARGETS[name]
    world = World(tmp_path / "world")
    run(world, seeds()[0])
    assert world.moved == 1


def mutated(value: Any, rng: random.Random) -> Any:
    """The same with one value of another kind, somewhere in it."""
    if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return rng.choice(ODD)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [mutated(v, rng) if n == at else v for n, v in enumerate(value)]
    name = rng.choice(list(value))
    return {k: mutated(v, rng) if k == name else v for k, v in value.items()}


@pytest.mark.parametrize("name", ["agent", "source"])
def test_no_value_of_another_kind_leaves_anything_behind(tmp_path: Path, name: str) -> None:
    rng = random.Random(11)
    world = World(tmp_path / "world")
    run = conversations.TARGETS[name][0]
    scripts = agent_seeds() if name == "agent" else source_seeds()
    for _ in range(MUTATED):
        lines = rng.choice(scripts).split(b"\n")
        at = rng.choice([n for n, line in enumerate(lines) if line[:2] in (b"A ", b"C ")])
        message = json.loads(lines[at][2:])
        lines[at] = lines[at][:2] + json.dumps(mutated(message, rng)).encode()
        run(world, b"\n".join(lines))


def test_the_invariants_are_not_blind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that does not undo does not pass."""
    world = World(tmp_path / "world")
    monkeypatch.setattr(undo_kinds, "undo_all", lambda *_, **__: [])
    with pytest.raises(Finding, match="files are left"):
        conversations.run_agent(world, agent_seeds()[2])
