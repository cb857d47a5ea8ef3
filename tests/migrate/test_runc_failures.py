# SPDX-License-Identifier: Apache-2.0
"""Live migrations of a runc container that go wrong, at each command on both
hosts: it fails, hangs or is killed, done or not; or meanwhile the
orchestrator, ssh or the agent goes.  One client sees it all through one
connection.  The container runs on exactly one host, nothing acknowledged is lost,
nothing is left over; then it can be migrated."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import table
from gates import Gates, gates
from lab import container, hosts, requirements, verify
from lab.hosts import Lab
from moving import DEAD_LOCK, files, judge, kill, migrate, migration, only_side, recover
from reused import Reused
from support import wait_until

SIZE = 192 << 20
SECONDS = 10
"""For a command, where one hangs; none of the real ones takes that long."""

WRONG: dict[str, tuple[str, str | int]] = {
    "fails": ("before", 3),
    "done, but fails": ("after", 3),
    "hangs": ("before", "hang"),
    "killed": ("before", "die"),
}
"""What is wrong with a command, as Gates.fail has it."""
COMMANDS = {
    ("source", "criu-version"): "source",
    ("source", "criu-check"): "source",
    ("source", "criu-dump"): "source",
    ("target", "criu-version"): "source",
    ("target", "criu-check"): "source",
    ("target", "criu-dump"): "source",
    ("target", "link-down"): "source",
    ("source", "link-down"): "source",
    ("source", "checkpoint"): "source",
    ("target", "restore"): "turning",
    ("target", "link-up"): "source",
    ("source", "delete"): "target",
}
"""Command -> where the container is then; turning: where the restore has brought it."""
UNDOING = [
    # What fails first, then the n-th call of what undoes it.
    (("source", "checkpoint", "fails"), ("source", "link-up", 1)),
    (("target", "link-up", "fails"), ("target", "link-down", 2)),
    (("target", "link-up", "fails"), ("source", "link-up", 1)),
]

PLACES = {
    "while checking": ("target", "criu-check-before"),
    "while copying": ("", ""),
    "link going down": ("source", "link-down-before"),
    "dump started ahead": ("source", "checkpoint-before"),
    "suspended, before the dump": ("source", "criu-before"),
    "dump made": ("source", "checkpoint-after"),
    "restore started ahead": ("target", "restore-before"),
    "before the restore": ("target", "criu-before"),
    "committed, not yet running": ("target", "link-up-before"),
    "restored, not yet told": ("target", "restore-after"),
    "source being removed": ("source", "delete-before"),
}
"""Where, and the gate that stops the migration there."""
DISTURBANCES = {
    "orchestrator killed": (signal.SIGKILL, "source", "pyploop.cli.main migrate"),
    "orchestrator interrupted": (signal.SIGINT, "source", "pyploop.cli.main migrate"),
    "ssh cut": (signal.SIGKILL, "source", "ssh -"),
    "agent killed": (signal.SIGKILL, "target", "pyploop.cli.main agent"),
}
ASKED = ("before the restore", "committed, not yet running")
"""The target decides, by who is there to be asked."""
COMMITTED = ("restored, not yet told", "source being removed")
"""After the commit point: it must run on the target."""
ORDINARY = {
    ("while copying", "orchestrator killed"),
    ("before the restore", "ssh cut"),
    ("dump made", "agent killed"),
    ("committed, not yet running", "agent killed"),
    ("restored, not yet told", "orchestrator killed"),
    ("restore", "done, but fails"),
}
"""The rest with PYPLOOP_MATRIX=1."""


@dataclass
class Scene:
    """The container runs on a; in use by the client, as since the first migration."""

    lab: Lab
    client: verify.Client
    gates: dict[str, Gates]
    before: set[str]

    def patience(self, seconds: int | None) -> None:
        """command_timeout of both hosts."""
        line = f"command_timeout = {seconds}\n" if seconds else ""
        for host in (self.lab.a, self.lab.b):
            container.write_pyploop_config(host)
            path = host.outside(container.PYPLOOP_CONFIG)
            path.write_text(line + path.read_text())

    def settle(self) -> tuple[str, bool]:
        """(where it runs, whether that took --recover), all faults gone."""
        states = {container.state(h) for h in (self.lab.a, self.lab.b)}
        running = [h for h in (self.lab.a, self.lab.b) if container.state(h) == "running"]
        assert len(running) < 2, "it runs on both"
        for one in self.gates.values():
            one.mend()
        self.patience(None)
        recovered = bool(recover(self.lab.a).strip())
        assert recovered or running, f"it ran nowhere, and nobody was told: {states}"
        here = only_side(self.lab)
        assert not running or running == [here], "it had run, and was given back"
        return "source" if here is self.lab.a else "target", recovered


@contextlib.contextmanager
def scene(number: int) -> Iterator[Scene]:
    requirements.check()
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(hosts.lab())
        before = files(lab.b)
        stack.enter_context(container.container(lab, size=SIZE))
        client = stack.enter_context(verify.client(lab))
        at = {
            "source": stack.enter_context(gates(lab.a)),
            "target": stack.enter_context(gates(lab.b)),
        }
        client.load(2)
        yield Scene(lab, client, at, before)


@pytest.fixture(scope="module")
def scenes() -> Iterator[Reused[Scene]]:
    before = set(os.listdir("/proc/self/fd"))
    made = Reused(scene)
    try:
        yield made
    finally:
        made.close()
    gc.collect()
    left = set(os.listdir("/proc/self/fd")) - before
    assert not left, f"descriptors left open: {left}"


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> None:
    """Not after each test: the lab has its own (`scenes`)."""


@pytest.fixture
def here(scenes: Reused[Scene]) -> Scene:
    """With no call seen yet."""
    taken = scenes.take()
    for one in taken.gates.values():
        one.mend()
    return taken


def end(
    scenes: Reused[Scene],
    s: Scene,
    row: str,
    column: str,
    code: int,
    *,
    stays: frozenset[str] = frozenset(),
) -> tuple[str, bool]:
    """(where it runs, recovered), judged; a cell of the table; then the next migration
    succeeds."""
    side, recovered = s.settle()
    host = s.lab.a if side == "source" else s.lab.b
    assert judge(s.lab, s.client, s.before | stays) is host
    name = signal.Signals(-code).name if code < 0 else str(code)
    table.note("runc", row, column, f"{side}, {name}" + (", `--recover`" if recovered else ""))
    assert (code == 0) == (side == "target" and not recovered) or code in (8, -signal.SIGKILL)
    if side == "target":
        assert migrate(s.lab, host).code == 0
        assert judge(s.lab, s.client, s.before) is s.lab.a
    scenes.fit()
    return side, recovered


def fail(s: Scene, side: str, step: str, wrong: str, number: int = 0) -> None:
    when, action = WRONG[wrong]
    if action == "hang" and not step.startswith("criu"):
        s.patience(SECONDS)
    s.gates[side].fail(step, action, when, number)


@pytest.mark.parametrize(
    ("side", "step", "wrong"),
    [
        (side, step, wrong)
        for side, step in COMMANDS
        for wrong in WRONG
        if table.ALL or (step, wrong) in ORDINARY
    ],
)
@pytest.mark.invariant(number=4)
def test_a_command_that_goes_wrong(
    scenes: Reused[Scene], here: Scene, side: str, step: str, wrong: str
) -> None:
    # A restore that was started ahead and has failed is tried again when it is time.
    fail(here, side, step, wrong, 0 if step == "restore" else 1)
    done = migrate(here.lab, here.lab.a)
    assert "Traceback" not in done.errors
    assert step in here.gates[side].happened(), f"{step} was not reached"
    where, recovered = end(scenes, here, f"{side}: {step}", wrong, done.code)
    expected = COMMANDS[side, step]
    if expected == "turning":
        expected = "target" if wrong == "done, but fails" else "source"
    assert where == expected
    # Only what is left at the source is for later.
    assert not recovered or step == "delete"


@pytest.mark.parametrize(
    ("place", "disturbance"),
    [(p, d) for p in PLACES for d in DISTURBANCES if table.ALL or (p, d) in ORDINARY],
)
@pytest.mark.invariant(number=4)
def test_a_process_that_goes(
    scenes: Reused[Scene], here: Scene, place: str, disturbance: str
) -> None:
    how, whose, pattern = DISTURBANCES[disturbance]
    side, gate = PLACES[place]
    lab = here.lab
    if gate:
        here.gates[side].close_gate(gate)
    with migration(lab, lab.a, *(() if gate else ("--bwlimit", "2M"))) as moving:
        if gate:
            here.gates[side].wait(gate)
        else:
            wait_until(lambda: moving.phase() == "first pass", "the copy has begun", 40)
        kill(lab.a if whose == "source" else lab.b, pattern, how)
        if gate:
            here.gates[side].open_gate(gate)
        done = moving.wait()
    assert "Traceback" not in done.errors
    unrecorded = (place, disturbance) == ("while checking", "agent killed")
    stays = frozenset({DEAD_LOCK} if unrecorded else ())
    where, recovered = end(scenes, here, place, disturbance, done.code, stays=stays)
    if place in COMMITTED:
        assert where == "target"
    elif place not in ASKED:
        assert where == "source"
    assert recovered <= (disturbance == "orchestrator killed")


if table.ALL:

    @pytest.mark.parametrize(
        ("first", "then", "wrong"),
        [(first, then, wrong) for first, then in UNDOING for wrong in WRONG],
        ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else x,
    )
    def test_a_command_that_undoes_and_goes_wrong_too(
        scenes: Reused[Scene],
        here: Scene,
        first: tuple[str, str, str],
        then: tuple[str, str, int],
        wrong: str,
    ) -> None:
        fail(here, *first, 1)
        fail(here, then[0], then[1], wrong, then[2])
        done = migrate(here.lab, here.lab.a)
        assert "Traceback" not in done.errors
        assert first[1] in here.gates[first[0]].happened()
        assert then[1] in here.gates[then[0]].happened(), f"{then[1]} was not reached"
        row = f"{first[0]}: {first[1]} {first[2]}; {then[0]}: {then[1]}"
        where, _ = end(scenes, here, row, wrong, done.code)
        assert where == "source"
