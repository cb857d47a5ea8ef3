# SPDX-License-Identifier: Apache-2.0
"""Memory that is copied ahead, in rounds.

Where the kernel does not track memory, CRIU's part is played by predumps.py: real
dumps made into a chain, from which a real CRIU restores; that the real one says no
there, and the container moves without, is tested first.  tests/lab/emulated runs the
same test on a kernel that tracks, with nothing but runc and CRIU."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from anypair import Pair
from gates import gates
from lab import container, criu, verify
from lab.hosts import SLOWNESS, Host, Lab
from lab.pipes import large_pipes
from moving import Outcome, files, judge, kill, migrate, migration, recover
from test_command import pair  # noqa: F401 - a fixture
from test_runc_failures import DISTURBANCES

from pyploop.runtimes.runc.memory_tracking import problem

HERE = Path(__file__).parent
SIZE = 192 << 20
MEMORY = 48 << 20
"""Bytes that the container holds, and of which it rewrites an eighth."""
MATRIX = bool(os.environ.get("PYPLOOP_MATRIX"))
"""Also what takes long."""


# ---- runc


@contextlib.contextmanager
def tracking(*hosts: Host, spoiled: str = "none") -> Iterator[None]:
    """CRIU and runc of these hosts can pre-dump, by themselves or played; `spoiled`:
    the pre-dump that is made, but reported as a failure, and leaves the container
    frozen."""
    real = {"criu": criu.program() or "", "runc": shutil.which("runc") or ""}
    when = {
        "criu": "check*mem_dirty_track*|pre-dump*",
        "runc": "*' checkpoint '*'--pre-dump '*|*' checkpoint '*' --parent-path '*",
    }
    if spoiled == "none" and not problem(real["criu"]):
        yield
        return
    play = shlex.join([sys.executable, str(HERE / "predumps.py")])
    for host in hosts:
        for name, program in real.items():
            script = host.folder / "bin" / name
            script.unlink(missing_ok=True)
            script.write_text(
                f'#!/bin/sh\ncase "$*" in\n{when[name]}) {play} {name} {program} "$@" || exit 1\n'
                f'  case "$*" in *"/{spoiled} --work-path"*) {program} pause {container.NAME}\n'
                f'    exit 1 ;; esac ;;\n*) exec {program} "$@" ;;\nesac\n'
            )
            script.chmod(0o755)
    try:
        yield
    finally:
        for host in hosts:
            (host.folder / "bin" / "runc").unlink()
            (host.folder / "bin" / "criu").unlink()
            (host.folder / "bin" / "criu").symlink_to(real["criu"])


def loaded_lazily(host: Host) -> int:
    """Bytes, by the record of the last restore."""
    record = host.outside("/var/lib/pyploop/migrate/runc-ct.lazy")
    return int(json.loads(record.read_text())["total"])


def told(done: Outcome, event: str) -> list[dict[str, Any]]:
    return [e for e in done.events if e["event"] == event]


def test_memory_goes_ahead_where_it_is_tracked_and_not_where_it_is_not(two_hosts: Lab) -> None:
    a, b = two_hosts.a, two_hosts.b
    before = files(b)
    with (
        container.container(two_hosts, 5 * SLOWNESS, size=SIZE, memory=MEMORY),
        verify.client(two_hosts, 5 * SLOWNESS) as client,
    ):
        client.load(2 if SLOWNESS == 1 else 0)
        # What this kernel says by itself.
        done = migrate(two_hosts, a)
        assert done.code == 0, done.errors
        (probe,), (move,) = told(done, "pre-dump"), told(done, "moved")
        print(done.out)
        assert judge(two_hosts, client, before) is b
        if probe["works"]:
            assert_sent_ahead(done)
            return
        assert "Dirty tracking is OFF" in probe["why"]
        assert (move["parent"], move["memory_rounds"]) == (0, [])
        assert move["dump_bytes"] > MEMORY

        with tracking(a, b):
            done = migrate(two_hosts, b)
        assert done.code == 0, done.errors
        assert judge(two_hosts, client, before) is a
        assert_sent_ahead(done)


def test_what_was_sent_ahead_is_loaded_lazily_like_the_last_dump(two_hosts: Lab) -> None:
    a, b = two_hosts.a, two_hosts.b
    before = files(b)
    with (
        container.container(two_hosts, 5 * SLOWNESS, size=SIZE, memory=MEMORY),
        verify.client(two_hosts, 5 * SLOWNESS) as client,
    ):
        with tracking(a, b):
            done = migrate(two_hosts, a, "--lazy-restore", "always")
        assert done.code == 0, done.errors
        (move,) = told(done, "moved")
        assert move["lazy"] and move["parent"] > 0
        assert loaded_lazily(b) > MEMORY > 4 * move["dump_bytes"]
        assert judge(two_hosts, client, before) is b

        # Here that is little, and it would not pay.
        with tracking(a, b):
            done = migrate(two_hosts, b)
        assert done.code == 0, done.errors
        (move,) = told(done, "moved")
        assert not move["lazy"] and move["why_not_lazy"].startswith("it does not pay: ")
        assert judge(two_hosts, client, before) is a


def test_with_post_copy_only_what_the_last_round_does_not_have_follows(two_hosts: Lab) -> None:
    a, b = two_hosts.a, two_hosts.b
    before = files(b)
    with (
        large_pipes(),
        container.container(two_hosts, 5 * SLOWNESS, size=SIZE, memory=MEMORY),
        verify.client(two_hosts, 5 * SLOWNESS) as client,
    ):
        with tracking(a, b):
            done = migrate(two_hosts, a, "--post-copy", "always")
        assert done.code == 0, done.errors
        (move,), (complete,) = told(done, "moved"), told(done, "memory complete")
        assert move["post_copy"] and move["parent"] > 0
        assert loaded_lazily(b) > MEMORY > 4 * complete["sent"] > 0
        assert judge(two_hosts, client, before) is b


def assert_sent_ahead(done: Outcome) -> None:
    """The dump had few pages and a parent, and memory and disk took turns."""
    (move,) = told(done, "moved")
    assert move["parent"] == len(move["memory_rounds"]) >= 2
    assert move["memory_rounds"][0]["sent"] > MEMORY > 4 * move["dump_bytes"]
    assert all(r["frozen"] > 0 for r in move["memory_rounds"])
    phases = [e["phase"] for e in told(done, "phase")]
    assert phases.index("memory 1") < phases.index("round 1") < phases.index("memory 2")
    assert phases.index("memory 2") < len(phases) - 1 - phases[::-1].index("sync")


PLACES = ("pre-dump-before", "pre-dump-after", "checkpoint-before", "restore-before")

if MATRIX:

    def test_a_pre_dump_that_fails_and_leaves_the_container_frozen_costs_no_more_than_its_round(
        two_hosts: Lab,
    ) -> None:
        a, b = two_hosts.a, two_hosts.b
        before = files(b)
        with (
            container.container(two_hosts, size=SIZE, memory=MEMORY),
            verify.client(two_hosts) as client,
            tracking(a, b, spoiled="2"),
        ):
            done = migrate(two_hosts, a)
            assert done.code == 0, done.errors
            assert "so the memory is dumped whole" in done.out
            (move,) = told(done, "moved")
            assert (move["parent"], len(move["memory_rounds"])) == (0, 1)
            assert move["dump_bytes"] > MEMORY
            assert judge(two_hosts, client, before) is b

    @pytest.mark.parametrize("disturbance", DISTURBANCES)
    @pytest.mark.parametrize("place", PLACES)
    def test_a_migration_disturbed_amid_memory_rounds_leaves_one_container_and_no_debris(
        two_hosts: Lab, place: str, disturbance: str
    ) -> None:
        how, side, pattern = DISTURBANCES[disturbance]
        a, b = two_hosts.a, two_hosts.b
        before = files(b)
        with (
            container.container(two_hosts, 5 * SLOWNESS, size=SIZE, memory=MEMORY),
            verify.client(two_hosts, 5 * SLOWNESS) as client,
            tracking(a, b),
            gates(a) as on_source,
            gates(b) as on_target,
        ):
            client.load(2 if SLOWNESS == 1 else 0)
            stops = on_target if place.startswith("restore") else on_source
            stops.close_gate(place)
            with migration(two_hosts, a) as moving:
                stops.wait(place)
                kill(a if side == "source" else b, pattern, how)
                stops.open_gate(place)
                done = moving.wait()
            assert "Traceback" not in done.errors
            if how is signal.SIGKILL and pattern.endswith("migrate"):
                recover(a)
            here = judge(two_hosts, client, before)
            if not place.startswith("restore"):
                assert here is a
                assert done.code != 0
            assert migrate(two_hosts, here).code == 0


# ---- commands of one's own


@pytest.fixture
def able(pair: Pair) -> Pair:  # noqa: F811
    """Both hosts have a pre_dump command."""
    for host in (pair.a, pair.b):
        command = [sys.executable, str(HERE / "anyhost.py"), str(host), "pre_dump"]
        config = host / "migrate.toml"
        head = "[container.box.commands]\n"
        text = config.read_text().replace(head, f"{head}pre_dump = {json.dumps(command)}\n")
        config.write_text(text)
    return pair


def moved(
    pair: Pair,  # noqa: F811
    source: Path,
    *options: str,
    fails: str = "none",
) -> tuple[str, list[Any]]:
    """A live migration, of which one pre-dump fails: what it said, and its events;
    it succeeds."""
    log, bad = pair.a.parent / "events", source / "pre_dump-fails"
    bad.write_text(fails)
    done = pair.migrate(source, "--live", "--json", str(log), *options)
    bad.unlink()
    assert done.returncode == 0, done.stderr
    pair.runs_only_on(pair.b if source is pair.a else pair.a)
    return done.stdout, [json.loads(line) for line in log.read_text().splitlines()]


def rounds(events: list[Any]) -> tuple[int, int, int]:
    """(memory rounds that the target has, the dump's parent, bytes of the dump)"""
    last = next(e for e in events if e["event"] == "moved")
    return len(last["memory_rounds"]), last["parent"], last["dump_bytes"]


def test_the_dump_builds_upon_the_last_of_as_many_rounds_as_are_wanted(able: Pair) -> None:
    trace = able.a.parent / "trace"
    _, events = moved(able, able.a, "--trace", str(trace))
    made, parent, size = rounds(events)
    assert made == parent >= 2
    assert size == 0  # the target found it in the first round's folder
    assert '"memory 2"' in trace.read_text()
    assert rounds(moved(able, able.b, "--pre-dumps", "1")[1]) == (1, 1, 0)


def test_without_a_wish_for_it_nothing_is_tried(able: Pair) -> None:
    log = able.a.parent / "events"
    options = ("--live", "--check-only", "--no-pre-dump", "--json", str(log))
    assert able.migrate(able.a, *options).returncode == 0
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["why"] for e in told if e["event"] == "pre-dump"] == ["--pre-dumps is 0"]


@pytest.mark.parametrize("number", ["1", "2"] if MATRIX else ["2"])
def test_after_a_pre_dump_that_failed_the_memory_is_dumped_whole(able: Pair, number: str) -> None:
    said, events = moved(able, able.a, fails=number)
    assert "pre_dump was made to fail" in said
    assert rounds(events) == (int(number) - 1, 0, len("box"))


def test_a_target_without_room_for_a_round_gets_the_whole_dump(able: Pair) -> None:
    with support.tmpfs(able.b / "images", 4 << 20):
        assert rounds(moved(able, able.a)[1]) == (0, 0, len("box"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT] if MATRIX else [signal.SIGKILL])
def test_a_migration_ended_amid_a_round_leaves_the_container_where_it_was(
    able: Pair, how: signal.Signals
) -> None:
    gate = able.a / "pre_dump-2-waits"
    gate.touch()
    words = ["migrate", "--config", str(able.a / "migrate.toml"), "--live", "other", "box"]
    moving = subprocess.Popen(
        [*support.pyploop_cmd(), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=support.pyploop_env(),
    )
    try:
        support.wait_until((able.a / "pre_dump-reached").exists, "the second round has begun")
        moving.send_signal(how)
    finally:
        if how is signal.SIGKILL:
            moving.wait(30)
        gate.unlink()
        _, said = moving.communicate(timeout=30)
    assert moving.returncode == -how, said
    (able.a / "pre_dump-reached").unlink()
    if how is signal.SIGKILL:
        support.run(
            *support.pyploop_cmd(), "migrate", "--config", able.a / "migrate.toml", "--recover"
        )
    able.runs_only_on(able.a)
    assert not any((able.a / "images").iterdir())
