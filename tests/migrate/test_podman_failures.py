# SPDX-License-Identifier: Apache-2.0
"""Live migrations of a container of Podman that go wrong, at each command on both hosts; or
meanwhile the orchestrator, ssh or the agent goes.  The container runs on exactly one host,
nothing that was acknowledged is lost, and neither Podman has anything left of it on the
other host; then it can be migrated."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import table
from gates import STEPS, Gates, gates
from lab import container, hosts, podman, verify
from lab.hosts import Host, Lab
from moving import DEAD_LOCK, kill, migration, recover
from podmen import CONTAINER, POD, Moved, judge, migrate, only_side
from reused import Reused
from support import wait_until

SECONDS = 20
"""For a command, where one hangs."""
PODMAN = {
    "* container checkpoint *": "podman-export",
    "* container restore *": "podman-restore",
    "* container stop *": "podman-stop",
    "* container rm *": "podman-rm",
    "* volume rm *": "volume-rm",
    "* image save *": "image-save",
    "* image load *": "image-load",
    "* info *": "podman-info",
    "* pod create *": "pod-create",
    "* container start *": "infra-start",
    "* pod rm *": "pod-rm",
}
PROGRAMS = {"podman": PODMAN, "runc": STEPS["runc"], "criu": STEPS["criu"]}
WRONG: dict[str, tuple[str, str | int]] = {
    "fails": ("before", 3),
    "done, but fails": ("after", 3),
    "hangs": ("before", "hang"),
    "killed": ("before", "die"),
}
COMMANDS = {
    ("source", "podman-info"): "source",
    ("source", "podman-export"): "source",
    ("target", "podman-info"): "source",
    ("source", "image-save"): "source",
    ("target", "image-load"): "source",
    ("source", "checkpoint"): "source",
    ("target", "podman-restore"): "turning",
    ("source", "podman-stop"): "target",
    ("source", "podman-rm"): "target",
    ("source", "volume-rm"): "target",
}
"""Command -> where the container is then; turning: where the restore has brought it."""
OF_PODS = {
    **COMMANDS,
    ("target", "pod-create"): "source",
    ("target", "infra-start"): "source",
    ("source", "pod-rm"): "target",
}
PLACES = {
    "while checking": ("target", "criu-check-before"),
    "while copying": ("", ""),
    "image loaded": ("target", "image-load-after"),
    "restore started ahead": ("target", "podman-restore-before"),
    "dump started ahead": ("source", "checkpoint-before"),
    "suspended, before the dump": ("source", "criu-before"),
    "dump made": ("source", "checkpoint-after"),
    "before the restore": ("target", "criu-before"),
    "restored, not yet told": ("target", "podman-restore-after"),
    "source being removed": ("source", "podman-rm-before"),
}
DISTURBANCES = {
    "orchestrator killed": (signal.SIGKILL, "source", "pyploop.cli.main migrate"),
    "orchestrator interrupted": (signal.SIGINT, "source", "pyploop.cli.main migrate"),
    "ssh cut": (signal.SIGKILL, "source", "ssh -"),
    "agent killed": (signal.SIGKILL, "target", "pyploop.cli.main agent"),
}
COMMITTED = ("restored, not yet told", "source being removed")
ASKED = ("before the restore",)
ORDINARY = {
    ("container", "dump made", "agent killed"),
    ("container", "restored, not yet told", "orchestrator killed"),
    ("container", "podman-restore", "fails"),
    ("pod", "before the restore", "agent killed"),
    ("pod", "podman-restore", "fails"),
}


KINDS = {"container": CONTAINER, "pod": POD}
LAST = {("pod", step): 2 for step in ("podman-restore", "checkpoint", "podman-stop", "podman-rm")}
"""Of a pod the second container's command goes wrong."""


@dataclass
class Scene:
    """The container runs on a; in use by the client, as since the first migration."""

    kind: str
    lab: Lab
    client: verify.Client
    gates: dict[str, Gates]

    @property
    def what(self) -> Moved:
        return KINDS[self.kind]

    def patience(self, seconds: int | None) -> None:
        """command_timeout of both hosts."""
        line = f"command_timeout = {seconds}\n" if seconds else ""
        for host in (self.lab.a, self.lab.b):
            path = host.outside(container.PYPLOOP_CONFIG)
            path.write_text(line + podman.CONFIG)

    def mend(self) -> None:
        for one in self.gates.values():
            one.mend()
        self.patience(None)

    def settle(self) -> tuple[Host, bool]:
        """(where it runs, whether that took --recover), all faults gone."""
        self.mend()
        recovered = bool(recover(self.lab.a).strip())
        return only_side(self.lab, self.what), recovered


@contextlib.contextmanager
def scene(kind: str) -> Iterator[Scene]:
    podman.check()
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(hosts.lab())
        run = podman.running_pod if kind == "pod" else podman.running
        stack.enter_context(run(lab, "--restart=always"))
        client = stack.enter_context(verify.client(lab))
        at = {
            "source": stack.enter_context(gates(lab.a, PROGRAMS)),
            "target": stack.enter_context(gates(lab.b, PROGRAMS)),
        }
        client.load(2)
        yield Scene(kind, lab, client, at)


def _scenes_of(kind: str) -> Callable[[int], contextlib.AbstractContextManager[Scene]]:
    return lambda _: scene(kind)


@pytest.fixture(scope="module")
def every() -> Iterator[dict[str, Reused[Scene]]]:
    before = set(os.listdir("/proc/self/fd"))
    made = {kind: Reused(_scenes_of(kind)) for kind in KINDS}
    try:
        yield made
    finally:
        for one in made.values():
            one.close()
    gc.collect()
    left = set(os.listdir("/proc/self/fd")) - before
    assert not left, f"descriptors left open: {left}"


@pytest.fixture
def scenes(every: dict[str, Reused[Scene]], kind: str) -> Reused[Scene]:
    for other, one in every.items():
        if other != kind:
            one.close()  # two labs at once are too much for a small machine
    return every[kind]


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> None:
    """Not after each test: the lab has its own (`every`)."""


@pytest.fixture
def here(scenes: Reused[Scene]) -> Scene:
    """With no call seen yet, and without the image on the target."""
    taken = scenes.take()
    taken.mend()
    taken.lab.b.run("podman", "rmi", "--all")
    return taken


def dead_lock(kind: str) -> str:
    """Of an agent that was killed before it had a record."""
    return DEAD_LOCK.replace("ct.lck", f"{podman.POD}.lck") if kind == "pod" else DEAD_LOCK


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
    host, recovered = s.settle()
    side = "source" if host is s.lab.a else "target"
    assert judge(s.lab, s.client, stays, s.what) is host
    if side == "source":
        assert not podman.images(s.lab.b), "the image stayed on the target"
    name = signal.Signals(-code).name if code < 0 else str(code)
    title = "podman, a pod" if s.what is POD else "podman"
    table.note(title, row, column, f"{side}, {name}" + (", `--recover`" if recovered else ""))
    assert (code == 0) == (side == "target" and not recovered) or code in (8, -signal.SIGKILL)
    if side == "target":
        assert migrate(s.lab, host, what=s.what).code == 0
        assert judge(s.lab, s.client, what=s.what) is s.lab.a
    scenes.fit()
    return side, recovered


@pytest.mark.parametrize(
    ("kind", "side", "step", "wrong"),
    [
        (kind, side, step, wrong)
        for kind in KINDS
        for side, step in (OF_PODS if kind == "pod" else COMMANDS)
        for wrong in WRONG
        if table.ALL or (kind, step, wrong) in ORDINARY
    ],
)
@pytest.mark.invariant(number=4)
def test_a_command_of_podman_that_goes_wrong(
    scenes: Reused[Scene], here: Scene, side: str, step: str, wrong: str
) -> None:
    when, action = WRONG[wrong]
    if action == "hang":
        here.patience(SECONDS)
    here.gates[side].fail(step, action, when, LAST.get((here.kind, step), 1))
    done = migrate(here.lab, here.lab.a, what=here.what)
    assert "Traceback" not in done.errors
    assert step in here.gates[side].happened(), f"{step} was not reached: {done.errors}"
    where, recovered = end(scenes, here, f"{side}: {step}", wrong, done.code)
    expected = OF_PODS[side, step]
    if expected == "turning":
        expected = "target" if wrong == "done, but fails" else "source"
    assert where == expected
    assert not recovered or expected == "target"


@pytest.mark.parametrize(
    ("kind", "place", "disturbance"),
    [
        (kind, place, how)
        for kind in KINDS
        for place in PLACES
        for how in DISTURBANCES
        if table.ALL or (kind, place, how) in ORDINARY
    ],
)
@pytest.mark.invariant(number=4)
def test_a_process_that_goes_while_podman_s_container_moves(
    scenes: Reused[Scene], here: Scene, place: str, disturbance: str
) -> None:
    how, whose, pattern = DISTURBANCES[disturbance]
    side, gate = PLACES[place]
    lab = here.lab
    if gate:
        here.gates[side].close_gate(gate)
    slowly = () if gate else ("--bwlimit", "200K")
    with migration(lab, lab.a, *slowly, name=here.what.word) as moving:
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
    stays = frozenset({dead_lock(here.kind)} if unrecorded else ())
    where, recovered = end(scenes, here, place, disturbance, done.code, stays=stays)
    if place in COMMITTED:
        assert where == "target"
    elif place not in ASKED:
        assert where == "source"
    assert recovered <= (disturbance == "orchestrator killed")


@pytest.mark.skipif(not table.ALL, reason="with PYPLOOP_MATRIX=1")
@pytest.mark.parametrize("kind", ["pod"])
def test_a_container_that_comes_to_the_pod_meanwhile_stays_and_so_does_the_pod(
    scenes: Reused[Scene], here: Scene
) -> None:
    lab = here.lab
    here.gates["source"].close_gate("checkpoint-before")
    with migration(lab, lab.a, name=here.what.word) as moving:
        here.gates["source"].wait("checkpoint-before")
        podman.start(lab.a, "--pod", podman.POD, name="late", script=podman.COUNTING)
        here.gates["source"].open_gate("checkpoint-before")
        done = moving.wait()
    assert "has other containers now than when the migration began" in done.errors
    assert podman.states(lab.a)["late"] == "running"
    lab.a.run("podman", "rm", "--force", "--time", "0", "late")
    assert end(scenes, here, "dump started ahead", "another container", done.code)[0] == "source"
