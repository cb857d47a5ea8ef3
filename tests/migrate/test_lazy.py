# SPDX-License-Identifier: Apache-2.0
"""Live migrations whose memory is loaded while the container runs on the target already.
The container compares all of its memory with what it has written to it, in the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import table
from gates import gates
from lab import container, verify
from lab.hosts import SLOWNESS, Host, Lab
from memory_scene import Scene, scene, status
from moving import SECONDS, files, judge, kill, migrate, migration, recover
from reused import Reused
from support import MIB, telling, wait_until

MEMORY = 96 * MIB
KILLS = 10 if table.ALL else 1
GUARD, DAEMON = "runc.lazy_guard", "lazy-pages"
ALWAYS = ("--lazy-restore", "always")


OTHER = "other"


@contextlib.contextmanager
def another_container(host: Host) -> Iterator[int]:
    """A container that no migration may touch; its process."""
    bundle = host.folder / "srv" / OTHER
    (bundle / "rootfs").mkdir(parents=True)
    config: dict[str, Any] = container.config(5)
    config["process"]["args"] = ["/guest", "5", "0"]
    config["annotations"] = {}
    config["root"] = {"path": "rootfs", "readonly": False}
    for namespace in config["linux"]["namespaces"]:
        namespace.pop("path", None)
    container.make_root(bundle / "rootfs", container.build_guest(host.folder.parent))
    (bundle / "config.json").write_text(json.dumps(config))
    null = subprocess.DEVNULL
    words = host.command("runc", "run", "-d", "-b", f"/srv/{OTHER}", OTHER)
    subprocess.run(words, stdin=null, stdout=null, stderr=null, timeout=60, check=True)
    try:
        yield int(json.loads(host.run("runc", "state", OTHER))["pid"])
    finally:
        host.run("runc", "delete", "--force", OTHER)
        host.run("rm", "-rf", f"/srv/{OTHER}")


@pytest.fixture(scope="module")
def scenes() -> Iterator[Reused[Scene]]:
    made = Reused(lambda number: scene(MEMORY))
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


def pid_of(host: Host, what: str) -> int | None:
    """A process of the host, by its own number for it."""
    found = [pid for pid, line in host.processes().items() if what in line and "gates" not in line]
    return found[0] if found else None


def send(host: Host, what: str, how: signal.Signals) -> None:
    pid = pid_of(host, what)
    assert pid is not None, f"no {what} on {host.name}: {host.processes()}"
    host.run("kill", f"-{how.value}", pid)


def loaded(host: Host) -> None:
    wait_until(lambda: status(host)["state"] == "complete", "all memory is loaded", 30)


def chosen(events: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (e for e in events if e["event"] == "lazy-restore")
    return found


def moved(events: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (e for e in events if e["event"] == "moved")
    return found


def back(s: Scene, scenes: Reused[Scene]) -> None:
    """The container returns to host a, as it was, and nothing of it is left on b."""
    done = migrate(s.lab, s.lab.b, "--lazy-restore", "never")
    assert done.code == 0, done.errors
    assert judge(s.lab, s.client, s.before) is s.lab.a
    assert not s.lab.b.outside("/var/lib/pyploop/migrate/runc-ct.lazy").exists()
    scenes.fit()


@contextlib.contextmanager
def loading(s: Scene, *options: str) -> Iterator[None]:
    """The container runs on b, and nothing more of its memory is loaded until the gate
    `memory` opens: the restore itself needs some of it."""
    s.gates.close_gate("link-up-before")
    with migration(s.lab, s.lab.a, *ALWAYS, *options) as one:
        s.gates.wait("link-up-before")
        s.gates.close_gate("memory")
        s.gates.open_gate("link-up-before")
        done = one.wait()
        assert done.code == 0, done.errors
        assert moved(done.events)["lazy"]
        yield


def test_memory_is_loaded_while_the_container_runs_and_its_images_go_then(
    scenes: Reused[Scene], here: Scene
) -> None:
    target = here.lab.b
    with loading(here):
        now = status(target)
        assert now["state"] == "loading" and MEMORY // 2 < now["left"] <= now["total"], now
        assert target.outside(now["images"]).is_dir()
        said = target.run(
            *("pyploop", "status", "--config", container.PYPLOOP_CONFIG, container.NAME),
            check=False,
        )
        assert "still to come" in said
        send(target, DAEMON, signal.SIGTERM)  # politely: it does not end
        here.gates.open_gate("memory")
        loaded(target)
    assert judge(here.lab, here.client, here.before) is target
    assert not target.outside(now["images"]).exists()
    after = status(target)
    assert (after["left"], after["daemon"], after["images"]) == (0, 0, ""), after
    back(here, scenes)


def test_a_container_with_little_memory_is_restored_eagerly_and_it_is_said_why(
    two_hosts: Lab,
) -> None:
    before = files(two_hosts.b)
    with container.container(two_hosts, size=192 * MIB), verify.client(two_hosts) as client:
        done = migrate(two_hosts, two_hosts.a)
        assert done.code == 0, done.errors
        assert not moved(done.events)["lazy"]
        assert chosen(done.events)["why"].startswith("it does not pay: ")
        assert judge(two_hosts, client, before) is two_hosts.b


def test_the_configuration_of_the_target_wins(scenes: Reused[Scene], here: Scene) -> None:
    config = here.lab.b.outside(container.PYPLOOP_CONFIG)
    was = config.read_text()
    config.write_text('lazy_restore = "never"\n' + was)
    try:
        done = migrate(here.lab, here.lab.a, *ALWAYS)
    finally:
        config.write_text(was)
    assert done.code == 0, done.errors
    assert chosen(done.events)["why"] == "not wanted"
    assert moved(done.events)["why_not_lazy"] == "not wanted"
    assert judge(here.lab, here.client, here.before) is here.lab.b
    back(here, scenes)


@pytest.mark.parametrize(
    ("step", "action"),
    telling([("criu-lazy-pages", 3), ("criu-lazy-pages", "die"), ("restore", 3)], 1, 2),
)
def test_what_cannot_be_restored_lazily_is_restored_eagerly_from_the_same_images(
    scenes: Reused[Scene], here: Scene, step: str, action: str | int
) -> None:
    # The first call of a restore is the one that waits for the images.
    here.gates.fail(step, action, "before", "1,2" if step == "restore" else 1)
    done = migrate(here.lab, here.lab.a, *ALWAYS)
    assert done.code == 0, done.errors
    assert step in here.gates.happened()
    assert chosen(done.events)["lazy"] and not moved(done.events)["lazy"]
    assert moved(done.events)["why_not_lazy"]
    assert judge(here.lab, here.client, here.before) is here.lab.b
    assert pid_of(here.lab.b, GUARD) is None
    back(here, scenes)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_container_whose_daemon_is_killed_is_ended_and_reads_no_zeroes(
    two_hosts: Lab, number: int
) -> None:
    """The kernel would let it read zeroes from then on.  Its disk is as after a power
    failure, and it can be started from it."""
    lab, chance = two_hosts, random.Random(number)
    with (
        another_container(lab.b) as other,
        container.container(lab, size=192 * MIB, memory=MEMORY),
        gates(lab.b) as at,
        contextlib.ExitStack() as stack,
    ):
        s = Scene(lab, stack.enter_context(verify.client(lab)), at, set())
        with loading(s):
            answers: list[Any] = []

            def ask() -> None:
                try:
                    answers.append(s.client.order("verify"))
                except AssertionError as e:  # the connection has ended
                    answers.append(e)

            asking = threading.Thread(target=ask)
            asking.start()
            if number:  # else nothing more was loaded
                at.open_gate("memory")
                asking.join(chance.uniform(0, 0.1))
                at.close_gate("memory")
            with contextlib.suppress(AssertionError, RuntimeError):  # it may be done already
                send(lab.b, DAEMON, signal.SIGKILL)
            wait_until(lambda: pid_of(lab.b, GUARD) is None, "the guard has ended", 30)
            asking.join(SECONDS)
        now = status(lab.b)
        if now["state"] == "complete":
            assert number, "it was stopped, and could not be complete"
            assert answers[0]["wrong"] == 0
        else:
            assert now["state"] == "lost" and "killed by signal 9" in now["text"], now
            assert isinstance(answers[0], AssertionError), answers
            assert container.state(lab.b) == "stopped"
            assert lab.b.outside(now["images"]).is_dir(), "they are for a person to remove"
            forget = ["pyploop", "status", "--config", container.PYPLOOP_CONFIG, "--forget"]
            lab.b.run(*forget, container.NAME)
            assert not lab.b.outside(now["images"]).exists()
            lab.b.run("runc", "delete", container.NAME)
            container.start(lab.b)
            assert container.state(lab.b) == "running"
        table.note("lazy restore", "its daemon killed", str(number), now["state"])
        assert json.loads(lab.b.run("runc", "state", OTHER))["pid"] == other
        os.stat(lab.b.outside(f"/proc/{other}"))


def test_a_migration_away_waits_until_all_memory_is_there(
    scenes: Reused[Scene], here: Scene
) -> None:
    with loading(here), migration(here.lab, here.lab.b, "--lazy-restore", "never") as away:
        threading.Timer(4.0 * SLOWNESS, lambda: here.gates.open_gate("memory")).start()
        done = away.wait()
    assert done.code == 0, done.errors
    assert "is still being loaded: waiting for it" in done.errors + done.out
    assert judge(here.lab, here.client, here.before) is here.lab.a
    scenes.fit()


@pytest.mark.parametrize("place", ["link-up-before", "restore-after"])
def test_an_agent_that_is_killed_leaves_the_daemon_exactly_when_the_container_runs(
    scenes: Reused[Scene], here: Scene, place: str
) -> None:
    here.gates.close_gate(place)
    with migration(here.lab, here.lab.a, *ALWAYS) as one:
        here.gates.wait(place)
        kill(here.lab.b, "pyploop.cli.main agent")
        here.gates.open_gate(place)
        done = one.wait()
    recover(here.lab.a)
    side = here.lab.b if place == "restore-after" else here.lab.a
    assert (done.code == 0) == (side is here.lab.b), done.errors
    wait_until(lambda: pid_of(here.lab.b, GUARD) is None, "the guard has ended", 30)
    assert status(here.lab.b)["state"] == "complete"
    assert judge(here.lab, here.client, here.before) is side
    if side is here.lab.b:
        back(here, scenes)
    else:
        scenes.fit()


def test_a_guard_that_is_killed_is_reported_and_harms_nothing(
    scenes: Reused[Scene], here: Scene
) -> None:
    with loading(here):
        send(here.lab.b, GUARD, signal.SIGKILL)
        wait_until(lambda: status(here.lab.b)["state"] == "unguarded", "it is reported", 10)
        here.gates.open_gate("memory")
        wait_until(lambda: pid_of(here.lab.b, DAEMON) is None, "all memory is loaded", 30)
    now = status(here.lab.b)
    assert now["state"] == "unknown" and now["images"], now
    forget = ["pyploop", "status", "--config", container.PYPLOOP_CONFIG, "--forget"]
    here.lab.b.run(*forget, container.NAME)
    assert judge(here.lab, here.client, here.before) is here.lab.b
    back(here, scenes)
