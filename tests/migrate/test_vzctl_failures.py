# SPDX-License-Identifier: Apache-2.0
"""Migrations of OpenVZ containers that go wrong, at each call of vzctl's on both
hosts: the call fails, hangs or is killed, done or not; or meanwhile the
orchestrator, ssh or the agent goes.  The container runs on exactly one host, has lost
no number, and nothing of it is left on the other; then it can be migrated."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import support
import table
from vzlab import CTID, VzHost, VzLab, runs_only_on, vz_lab

SECONDS = 2
"""For a command of vzctl's, where one hangs."""


@dataclass(frozen=True)
class Call:
    """The number-th call of a step on one host, in a migration without a fault."""

    host: str
    step: str
    number: int = 1
    committed: bool = False
    """After the commit point: the target keeps it."""
    stopped: bool = False
    """Of a migration without --live."""

    @property
    def connected(self) -> bool:
        """There is an agent at that time."""
        return self not in LIVE[:2]

    def __str__(self) -> str:
        where = {"a": "source", "b": "target"}[self.host]
        count = f" ({self.number})" if self.step == "status" else ""
        return f"{where}: {self.step}{count}" + (", stopped" if self.stopped else "")


LIVE = [
    Call("a", "status", 1),
    Call("a", "vzcptcheck version"),
    Call("b", "status", 1),
    Call("b", "vzlist -a"),
    Call("b", "vzcptcheck version"),
    Call("b", "status", 2),
    Call("a", "chkpnt --suspend"),
    Call("a", "chkpnt --dump"),
    Call("b", "restore --undump"),
    Call("b", "restore --resume", committed=True),
    Call("a", "status", 2, committed=True),
    Call("a", "chkpnt --kill", committed=True),
    Call("a", "status", 3, committed=True),
    Call("a", "umount", committed=True),
    Call("a", "status", 4, committed=True),
    Call("a", "status", 5, committed=True),
    Call("a", "destroy", committed=True),
]
STOPPED = [
    Call("a", "status", 2, stopped=True),
    Call("a", "stop", stopped=True),
    Call("b", "status", 3, stopped=True),
    Call("b", "start", stopped=True, committed=True),
]
"""What differs from LIVE until the container runs on the target."""

WRONG: dict[str, tuple[str, str | int]] = {
    "fails": ("before", 3),
    "done, but fails": ("after", 3),
    "hangs": ("before", "hang"),
    "killed": ("before", "die"),
}
"""What is wrong with the call, as VzHost.fail has it."""
GONE = {
    "orchestrator killed": ("a", " migrate ", signal.SIGKILL),
    "orchestrator interrupted": ("a", " migrate ", signal.SIGINT),
    "ssh cut": ("a", "/bin/ssh", signal.SIGKILL),
    "agent killed": ("b", " agent ", signal.SIGKILL),
}
"""What happens during the call: host whose process it is, pattern, signal."""

UNDOING = [
    # First fault, then one in what undoes it.
    ((Call("a", "chkpnt --dump"), "fails"), Call("a", "chkpnt --resume")),
    ((Call("b", "restore --undump"), "done, but fails"), Call("b", "restore --kill")),
    ((Call("b", "restore --undump"), "done, but fails"), Call("b", "umount")),
    ((Call("b", "restore --resume"), "fails"), Call("b", "restore --kill")),
    ((Call("b", "restore --resume"), "fails"), Call("a", "chkpnt --resume")),
    ((Call("b", "start", stopped=True), "fails"), Call("a", "start", stopped=True)),
]


class Labs:
    """One lab for many cells; a new one after a cell that failed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, contextlib.ExitStack()
        self._lab: VzLab | None = None
        self._number = 0
        self.spoiled = False

    def get(self) -> VzLab:
        if self._lab is None or self.spoiled:
            self.close()
            self._number += 1
            folder = self._folder / str(self._number)
            self._lab = self._stack.enter_context(vz_lab(folder))
        self.spoiled = True
        return self._lab

    def close(self) -> None:
        self._stack.close()
        self._lab = None


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Labs]:
    support.needs("root", "loop", "mkfs.ext4")
    made = Labs(tmp_path_factory.mktemp("failures"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def lab(labs: Labs) -> Iterator[VzLab]:
    """Its container runs on a."""
    made = labs.get()
    yield made
    made.a.mend()
    made.b.mend()


class Migration:
    """From a to b."""

    def __init__(self, lab: VzLab, stopped: bool) -> None:
        words = [*([] if stopped else ["--live"]), "hostb", CTID]
        self.process = subprocess.Popen(
            lab.command(lab.a, *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=support.pyploop_env(),
        )

    def wait(self) -> int:
        """Its exit code; its errors are lines for a person."""
        _, errors = self.process.communicate(timeout=90)
        assert "Traceback" not in errors, errors
        return self.process.returncode


@contextlib.contextmanager
def migration(lab: VzLab, stopped: bool = False) -> Iterator[Migration]:
    one = Migration(lab, stopped)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.communicate()


def kill(host: VzHost, pattern: str, how: signal.Signals) -> None:
    """The processes that belong to the host and have this in their command lines."""
    found = []
    for line in support.run("ps", "-eo", "pid=,args=", "ww").splitlines():
        number, args = line.split(None, 1)
        # The agent of b has b's configuration, ssh to it is a's, and names it.
        if pattern in f"{args} " and f"{host.folder}/" in args.split(" -- ")[0]:
            found.append(int(number))
    assert found, f"no {pattern!r} of {host.name}"
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)


def fail(lab: VzLab, call: Call, wrong: str) -> None:
    when, action = WRONG[wrong]
    host = lab.a if call.host == "a" else lab.b
    if action == "hang":
        hurry(lab)
    host.fail(call.step, action, when, call.number)


def hurry(lab: VzLab) -> None:
    for host in (lab.a, lab.b):
        config = host.folder / "migrate.toml"
        text = config.read_text()
        config.write_text(text.replace("command_timeout = 20", f"command_timeout = {SECONDS}"))


def happened(lab: VzLab, call: Call) -> None:
    """It was called at all."""
    host = lab.a if call.host == "a" else lab.b
    assert call.step in host.happened(), f"{call} was not reached"


def settle(lab: VzLab) -> tuple[VzHost, bool]:
    """(where it runs, whether that took --recover), all faults gone."""
    running = [h for h in (lab.a, lab.b) if h.status() == "running"]
    assert len(running) < 2, "it runs on both"
    for host in (lab.a, lab.b):
        host.mend()
        config = host.folder / "migrate.toml"
        config.write_text(
            config.read_text().replace(f"command_timeout = {SECONDS}\n", "command_timeout = 20\n")
        )
    done = lab.migrate(lab.a, "--recover")
    assert done.returncode == 0, done.stderr
    recovered = bool(done.stdout.strip())
    assert recovered or running, "it ran nowhere, and nobody was told"
    here = lab.a if lab.a.status() == "running" else lab.b
    runs_only_on(lab, here)
    assert not running or running == [here], "it had run, and was given back"
    return here, recovered


def judge(labs: Labs, lab: VzLab, row: str, column: str, code: int) -> tuple[str, bool]:
    """("source" or "target", recovered); a row for the table; then the next
    migration succeeds."""
    here, recovered = settle(lab)
    side = "source" if here is lab.a else "target"
    name = signal.Signals(-code).name if code < 0 else str(code)
    table.note("vzctl", row, column, f"{side}, {name}" + (", `--recover`" if recovered else ""))
    assert (code == 0) == (side == "target" and not recovered) or code in (8, -signal.SIGKILL)
    if here is lab.b:
        done = lab.migrate(lab.b, "--live", "hosta", CTID)
        assert done.returncode == 0, done.stderr
        runs_only_on(lab, lab.a)
    labs.spoiled = False
    return side, recovered


def some(cells: list[tuple[Call, str]], ordinary: set[tuple[str, str]]) -> list[tuple[Call, str]]:
    return [c for c in cells if table.ALL or (c[0].step, c[1]) in ordinary]


def test_these_are_all_calls(labs: Labs, lab: VzLab) -> None:
    before = len(lab.a.steps()), len(lab.b.steps())
    with migration(lab) as moving:
        assert moving.wait() == 0
    for host, name, seen in ((lab.a, "a", before[0]), (lab.b, "b", before[1])):
        assert host.steps()[seen:] == [c.step for c in LIVE if c.host == name]
    judge(labs, lab, "nothing", "", 0)


@pytest.mark.parametrize(
    ("call", "wrong"),
    some(
        [(call, wrong) for call in LIVE + STOPPED for wrong in WRONG],
        {
            ("chkpnt --dump", "hangs"),
            ("restore --resume", "done, but fails"),
            ("chkpnt --kill", "fails"),
        },
    ),
    ids=str,
)
@pytest.mark.invariant(number=4)
def test_a_call_that_goes_wrong(labs: Labs, lab: VzLab, call: Call, wrong: str) -> None:
    fail(lab, call, wrong)
    with migration(lab, call.stopped) as moving:
        code = moving.wait()
    happened(lab, call)
    side, recovered = judge(labs, lab, str(call), wrong, code)
    turning = call.step in ("restore --resume", "start")
    kept = wrong == "done, but fails" if turning else call.committed
    assert side == ("target" if kept else "source")
    # Only what is left at the source is for later.
    assert not recovered or (kept and not turning)


@pytest.mark.parametrize(
    ("call", "gone"),
    some(
        [(call, gone) for call in LIVE for gone in GONE if call.connected or "orch" in gone],
        {
            ("chkpnt --dump", "orchestrator killed"),
            ("restore --resume", "agent killed"),
            ("restore --undump", "ssh cut"),
        },
    ),
    ids=str,
)
def test_a_process_that_goes_during_a_call(labs: Labs, lab: VzLab, call: Call, gone: str) -> None:
    side, pattern, how = GONE[gone]
    host = lab.a if call.host == "a" else lab.b
    host.fail(call.step, "gate", number=call.number)
    with migration(lab) as moving:
        support.wait_until(host.reached, f"{call} is reached", 40)
        kill(lab.a if side == "a" else lab.b, pattern, how)
        host.open_gate()
        code = moving.wait()
    where, recovered = judge(labs, lab, str(call), gone, code)
    if call.committed:
        assert where == "target"
    elif call.step != "restore --undump" or gone != "orchestrator interrupted":
        assert where == "source"  # else it was just about to be asked
    assert recovered <= (gone == "orchestrator killed")


def test_a_signal_while_a_failure_is_undone_changes_nothing(labs: Labs, lab: VzLab) -> None:
    lab.a.fail("chkpnt --dump", 3, "before")
    lab.a.fail("chkpnt --resume", "gate")
    with migration(lab) as moving:
        support.wait_until(lab.a.reached, "the undoing is reached", 40)
        moving.process.terminate()
        lab.a.open_gate()
        code = moving.wait()
    assert code == 8
    assert judge(labs, lab, "undoing", "orchestrator ended", code) == ("source", False)


def test_both_ends_killed_before_the_restore_are_tidied_by_recover(labs: Labs, lab: VzLab) -> None:
    lab.a.fail("chkpnt --dump", "gate")
    with migration(lab) as moving:
        support.wait_until(lab.a.reached, "the dump is reached", 40)
        kill(lab.b, " agent ", signal.SIGSTOP)
        moving.process.kill()
        kill(lab.b, " agent ", signal.SIGKILL)
        lab.a.open_gate()
        code = moving.wait()
    assert any("private" in path for path in lab.b.files()), "nothing was left to tidy"
    side, recovered = judge(labs, lab, "source: chkpnt --dump", "both ends killed", code)
    assert (side, recovered) == ("source", True)


def test_recover_says_when_there_is_nothing_for_a_container(labs: Labs, lab: VzLab) -> None:
    done = lab.migrate(lab.a, "--recover", "hostb", "999")
    assert (done.returncode, done.stdout) == (
        0,
        "There is no unfinished migration of 999 from this host\n",
    )
    labs.spoiled = False


@pytest.mark.parametrize(
    ("first", "call", "wrong"),
    [
        (first, call, wrong)
        for first, call in UNDOING
        for wrong in WRONG
        if table.ALL
        or (first[0].step, call.step, wrong) == ("chkpnt --dump", "chkpnt --resume", "killed")
    ],
    ids=lambda x: f"{x[0]} {x[1]}" if isinstance(x, tuple) else str(x),
)
def test_an_undoing_call_that_goes_wrong_too(
    labs: Labs, lab: VzLab, first: tuple[Call, str], call: Call, wrong: str
) -> None:
    fail(lab, *first)
    fail(lab, call, wrong)
    with migration(lab, call.stopped) as moving:
        code = moving.wait()
    happened(lab, first[0])
    happened(lab, call)
    side, _ = judge(labs, lab, f"{first[0]} {first[1]}; {call}", wrong, code)
    assert side == "source"
