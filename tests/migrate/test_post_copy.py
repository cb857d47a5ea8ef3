# SPDX-License-Identifier: Apache-2.0
"""Live migrations whose memory follows from the source while the container runs on the
target.  The container compares all of its memory with what it has written to it, in the end."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import table
from gates import gates
from lab import container, verify
from lab.hosts import Host, Lab
from lab.pipes import large_pipes
from memory_scene import Scene, scene, status
from moving import Migration, files, judge, kill, migrate, migration, recover
from reused import Reused
from support import MIB, wait_until

MEMORY, LARGE = 64 * MIB, 256 * MIB
ALWAYS = ("--post-copy", "always")


@contextlib.contextmanager
def with_large_pipes(number: int) -> Iterator[Scene]:
    with large_pipes(), scene(MEMORY) as made:
        yield made


@pytest.fixture(scope="module")
def scenes() -> Iterator[Reused[Scene]]:
    made = Reused(with_large_pipes)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> None:
    """Not after each test: the lab has its own (`scenes`)."""


@pytest.fixture
def here(scenes: Reused[Scene]) -> Scene:
    taken = scenes.take()
    taken.gates.mend()
    return taken


OURS = ("page_keeper", "page_relay", "lazy_guard", "lazy-pages", " checkpoint ", "--recover")


def at_work(host: Host) -> list[str]:
    """Processes of a post-copy on the host."""
    return [line for line in host.processes().values() if any(o in line for o in OURS)]


def over(lab: Lab) -> None:
    """Both ends finish by themselves.  The keeper becomes `--recover`, by two more programs,
    and between two of them a process has no command line for a moment: so look three times."""
    looks = (lab.a, lab.b) * 3
    wait_until(lambda: not any(map(at_work, looks)), "both ends have ended", 60)


def cut(host: Host) -> None:
    host.run("ip", "link", "set", "up0", "down")


def mend(host: Host) -> None:
    host.run("ip", "link", "set", "up0", "up")


@contextlib.contextmanager
def following(s: Scene, *options: str) -> Iterator[Migration]:
    """The container runs on b, and no more of its memory comes until the gate `memory` opens."""
    s.gates.close_gate("link-up-before")
    with migration(s.lab, s.lab.a, *ALWAYS, *options) as one:
        s.gates.wait("link-up-before")
        s.gates.close_gate("memory")
        s.gates.open_gate("link-up-before")
        wait_until(lambda: any(e["event"] == "moved" for e in one.events()), "it moved", 60)
        yield one


def back(s: Scene, scenes: Reused[Scene]) -> None:
    done = migrate(s.lab, s.lab.b)
    assert done.code == 0, done.errors
    assert judge(s.lab, s.client, s.before) is s.lab.a
    scenes.fit()


def moved(events: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (e for e in events if e["event"] == "moved")
    return found


def test_memory_follows_while_the_container_runs_and_the_source_is_tidied_then(
    scenes: Reused[Scene], here: Scene
) -> None:
    done = migrate(here.lab, here.lab.a, *ALWAYS)
    assert done.code == 0, done.errors
    assert moved(done.events)["post_copy"]
    (complete,) = (e for e in done.events if e["event"] == "memory complete")
    assert complete["complete"], complete
    (chosen,) = (e for e in done.events if e["event"] == "post-copy")
    assert chosen["chosen"] and "is lost" in chosen["risk"]
    assert moved(done.events)["dump_bytes"] < MEMORY // 4
    assert judge(here.lab, here.client, here.before) is here.lab.b
    done = migrate(here.lab, here.lab.b, *ALWAYS)
    assert done.code == 0, done.errors
    assert judge(here.lab, here.client, here.before) is here.lab.a
    scenes.fit()


def test_a_cut_connection_is_survived_and_status_says_what_is_to_come(
    scenes: Reused[Scene], here: Scene
) -> None:
    with following(here) as one:
        cut(here.lab.a)
        try:
            here.gates.open_gate("memory")
            time.sleep(3)  # a cut is a time: what was on its way arrives
            assert container.state(here.lab.b) == "running"
            there, source = status(here.lab.b), status(here.lab.a)
            assert there["state"] == "loading" and 0 < there["left"] < there["total"], there
            assert source["state"] == "serving", source
        finally:
            mend(here.lab.a)
        done = one.wait()
    assert done.code == 0, done.errors
    over(here.lab)
    assert judge(here.lab, here.client, here.before) is here.lab.b
    back(here, scenes)


def test_both_ends_finish_by_themselves_when_the_orchestrator_is_killed(
    scenes: Reused[Scene], here: Scene
) -> None:
    with following(here) as one:
        kill(here.lab.a, "migrate --live")
        assert "This host serves the memory" in recover(here.lab.a)
        here.gates.open_gate("memory")
        assert one.wait().code
    over(here.lab)
    assert judge(here.lab, here.client, here.before) is here.lab.b
    back(here, scenes)


def test_an_orchestrator_that_is_killed_before_the_commit_leaves_it_on_the_source(
    scenes: Reused[Scene], here: Scene
) -> None:
    here.gates.close_gate("link-up-before")
    with migration(here.lab, here.lab.a, *ALWAYS) as one:
        here.gates.wait("link-up-before")
        kill(here.lab.b, "pyploop.cli.main agent --config", signal.SIGKILL)
        kill(here.lab.a, "migrate --live")
        here.gates.open_gate("link-up-before")
        one.wait()
    over(here.lab)
    recover(here.lab.a)
    assert judge(here.lab, here.client, here.before) is here.lab.a
    scenes.fit()


def test_a_restore_that_fails_is_undone(scenes: Reused[Scene], here: Scene) -> None:
    here.gates.fail("restore", 3)
    done = migrate(here.lab, here.lab.a, *ALWAYS)
    assert done.code == 7, done.errors
    over(here.lab)
    assert judge(here.lab, here.client, here.before) is here.lab.a
    scenes.fit()


def test_a_cut_that_lasts_too_long_loses_the_container_and_nobody_runs_it(
    two_hosts: Lab,
) -> None:
    lab = two_hosts
    with (
        large_pipes(),
        container.container(lab, size=192 * MIB, memory=MEMORY),
        gates(lab.b) as at,
        verify.client(lab) as client,
    ):
        s = Scene(lab, client, at, set())
        with following(s, "--post-copy-timeout", "4") as one:
            cut(lab.a)
            try:
                at.open_gate("memory")
                wait_until(lambda: container.state(lab.b) == "stopped", "it is ended", 60)
            finally:
                mend(lab.a)
            done = one.wait()
        assert done.code == 8, done.errors
        assert "did not all come to" in done.errors
        over(lab)
        now = status(lab.b)
        assert now["state"] == "lost" and "could not be reached for 4 s" in now["text"], now
        assert container.state(lab.a) == "absent"
        assert lab.a.outside(container.IMAGE).exists(), "its disk here is for a person to remove"
        lab.b.run("runc", "delete", container.NAME)
        container.start(lab.b)
        assert container.state(lab.b) == "running"


def await_event(one: Migration, name: str) -> None:
    wait_until(lambda: any(e["event"] == name for e in one.events()), f"event {name!r}", 60)


def disturbed(
    lab: Lab, what: str, times: int, memory: int, how: Callable[[Migration, random.Random], None]
) -> None:
    """The container goes to and fro, and each migration is disturbed at a random moment: from
    the start of the page server on, or from the commit on."""
    with (
        large_pipes(),
        container.container(lab, size=192 * MIB, memory=memory),
        verify.client(lab) as client,
    ):
        source, before = lab.a, files(lab.b)
        for number in range(times):
            chance = random.Random(number)
            with migration(lab, source, *ALWAYS) as one:
                # Every second time its memory follows already.
                await_event(one, "moved" if number % 2 else "post-copy")
                time.sleep(chance.uniform(0, 1 if number % 2 else 3))
                how(one, chance)
                done = one.wait()
            over(lab)
            recover(source)
            side = judge(lab, client, before)
            assert (side is source) <= bool(done.code), done.errors
            came = next((e for e in done.events if e["event"] == "memory complete"), None)
            ended = "moved" if side is not source else "undone"
            table.note("post-copy", what, f"{number}", f"{ended}{' at once' if came else ''}")
            source = side


def test_a_cut_at_a_random_moment_is_survived(two_hosts: Lab) -> None:
    def cut_and_mend(one: Migration, chance: random.Random) -> None:
        if table.ALL and chance.random() < 0.2:
            for pid, line in one.source.processes().items():
                if line.startswith("ssh "):
                    one.source.run("kill", "-9", pid, check=False)
            return
        host = chance.choice((one.source, one.target))
        cut(host)
        time.sleep(chance.uniform(0, 30 if table.ALL else 2))
        mend(host)

    times = 100 if table.ALL else 1
    disturbed(two_hosts, "a cut", times, LARGE if table.ALL else MEMORY, cut_and_mend)


def test_an_orchestrator_killed_at_a_random_moment_leaves_one_that_runs(two_hosts: Lab) -> None:
    def kill_it(one: Migration, chance: random.Random) -> None:
        for pid, line in one.source.processes().items():
            if "migrate --live" in line:
                one.source.run("kill", "-9", pid, check=False)

    times = 20 if table.ALL else 1
    disturbed(two_hosts, "the orchestrator killed", times, LARGE if table.ALL else MEMORY, kill_it)
