# SPDX-License-Identifier: Apache-2.0
"""A container that is started on its source while it moves, or after it has moved,
or that has come back: what runs is never ended for what moved before."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from anypair import Pair, any_pair
from test_other_device import amid, reached, stop


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with any_pair(tmp_path) as made:
        yield made


@pytest.mark.parametrize("mounted", [True, False], ids=["mounted", "not mounted"])
def test_a_stopped_container_that_is_started_meanwhile_goes_on_here(
    pair: Pair, mounted: bool
) -> None:
    """While it is checked there; the copy goes on with what it writes."""
    if mounted:
        pair.step(pair.a, "stop")
    else:
        stop(pair)
    (pair.b / "status-waits").touch()
    with pair.moving(pair.a, "-v") as moving:
        reached(pair.b, "status")
        if not mounted:
            for disk in ("one", "two"):
                support.run("mount", "-o", "loop", *pair.disk(disk))
        pair.step(pair.a, "start")
        (pair.b / "status-waits").unlink()
        said = moving.communicate(timeout=60)[0]
    assert moving.returncode == 6, said
    if mounted:  # else the copy may find first that the image has been attached
        assert "container box was started during the migration" in said
    pair.runs_only_on(pair.a)


def test_one_that_a_supervisor_starts_again_after_the_stop_goes_on_here(pair: Pair) -> None:
    path = pair.a / "migrate.toml"
    before = path.read_text()
    commands = tomllib.loads(before)["container"]["box"]["commands"]
    both = " && ".join(shlex.join(commands[step]) for step in ("stop", "start"))
    line = f"stop = {json.dumps(commands['stop'])}"
    assert line in before
    path.write_text(before.replace(line, f"stop = {json.dumps(['sh', '-c', both])}"))
    done = pair.migrate(pair.a)
    assert done.returncode == 6, done.stderr
    assert "container box was started during the migration" in done.stderr
    path.write_text(before)
    pair.runs_only_on(pair.a)


def test_recover_leaves_one_that_runs_on_the_source_again(pair: Pair) -> None:
    image, aside = pair.a / "one.img", pair.a / "aside"
    with amid(pair) as go_on:
        image.rename(aside)
        image.touch()
        code, said = go_on()
    assert code == 8, said
    aside.rename(image)
    pair.step(pair.a, "start")
    done = pair.migrate(pair.a, "--recover")
    assert done.returncode == 8, done.stderr
    assert "box runs here, although it has moved to other" in done.stderr
    assert pair.step(pair.a, "status") == "running"
    assert image.exists() and (pair.a / "two.img").exists()
    pair.step(pair.a, "stop")
    done = pair.migrate(pair.a, "--recover")
    assert done.returncode == 0, done.stderr
    pair.runs_only_on(pair.b)


@pytest.mark.invariant(number=4)
def test_one_that_comes_back_before_its_source_is_tidied_is_refused(pair: Pair) -> None:
    """By what is left of the first migration, its recovery would end it."""
    image = pair.a / "one.img"
    with amid(pair) as go_on:
        image.rename(pair.a / "aside")
        image.touch()
        code, said = go_on()
    assert code == 8, said
    for disk in ("one", "two"):
        support.run("umount", pair.a / disk)
    for name in ("one.img", "two.img", "aside"):
        (pair.a / name).unlink()
    for option in ("--check-only", "--live"):
        done = pair.migrate(pair.b, "--live", option)
        assert done.returncode == 20, done.stderr
        assert "which this host began, is not finished" in done.stderr
    pair.runs_only_on(pair.b)
    assert pair.migrate(pair.a, "--recover").returncode == 0
    done = pair.migrate(pair.b, "--live")
    assert done.returncode == 0, done.stderr
    assert pair.migrate(pair.a, "--recover").returncode == 0
    pair.runs_only_on(pair.a)
