# SPDX-License-Identifier: Apache-2.0
"""SIGKILL to each process of a copy at each of its steps.

Afterwards the container runs, nothing is frozen, tracked, throttled
or journaled, no target has its name unless it is complete, and the source is
as it was.  All steps, three times, with a table:

    PYPLOOP_KILL_MATRIX=3 tests/run -s tests/live/test_kill_matrix.py
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import stepper
from support import MIB, is_frozen, loop_device, missing, needs, pyploop_env, run, wait_until
from support_hold import Container, cgroup, container, hierarchy
from support_live import end, file_system, sparse_file, work_dir
from support_ssh import ssh_here

from pyploop.diskcopy import undo_kinds
from pyploop.errors import DeviceControlError
from pyploop.undo.journal import ENVIRONMENT, start_time

pytestmark = pytest.mark.root
ROUNDS = int(os.environ.get("PYPLOOP_KILL_MATRIX", "0"))
"""0: a few cells, once."""
SIZE = 24 * MIB
VICTIMS = ("sender", "group", "receiver", "ssh")
STEPS = tuple(stepper.STEPS)
SOME = (
    ("first pass sent", "sender"), ("target synced", "receiver"), ("warm-up", "sender"),
    ("cgroup frozen", "group"), ("cgroup frozen", "ssh"), ("freeze begins", "sender"),
    ("frozen", "group"), ("frozen", "receiver"), ("last blocks sent", "sender"),
    ("END may go", "ssh"), ("END sent", "receiver"), ("END sent", "group"),
    ("acknowledged", "sender"), ("thawed", "group"),
)  # fmt: skip
DONE = ("END may go", "END begins", "END sent", "acknowledged", "thawed", "released")
"""Steps from which on the target may be complete."""
SECONDS = 20.0
"""More is a failure: a fourth of the limit at which the watchdog thaws anyway."""

ARRIVAL = 60.0
"""Seconds until a copy stands at its step, by ssh on a busy machine."""


@dataclass
class Bench:
    folder: Path
    device: str
    point: Path
    container: Container
    throttle: Path
    ssh: list[str]
    reference: bytes
    runs: int = 0
    slowest: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    @property
    def iostats(self) -> Path:
        return Path("/sys/block") / Path(self.device).name / "queue/iostats"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with work_dir() as folder:
        yield from make_bench(monkeypatch, folder, folder)


def make_bench(monkeypatch: pytest.MonkeyPatch, folder: Path, images: Path) -> Iterator[Bench]:
    """images: where the source's image lies."""
    needs("loop", "mkfs.ext4", "e2fsck")
    root, blkio = hierarchy(1), Path("/sys/fs/cgroup/blkio")
    if root is None or not (blkio / "blkio.throttle.write_bps_device").exists():
        missing("needs cgroup v1 with freezer and blkio")
    with contextlib.ExitStack() as stack:
        monkeypatch.setenv(ENVIRONMENT, str(folder / "run"))
        monkeypatch.setenv("STEPPER_IMAGE", str(images / "image"))
        ssh = stack.enter_context(ssh_here(folder / "ssh"))
        device = stack.enter_context(loop_device(sparse_file(images / "image", SIZE)))
        with contextlib.ExitStack() as mounted:
            point = mounted.enter_context(file_system(device, folder / "m"))
            reference = os.urandom(MIB)
            (point / "reference").write_bytes(reference)
            limited = mounted.enter_context(cgroup(blkio, "kill"))
            made = mounted.enter_context(container(root, "kill", point, folder / "beat"))
            for pid in (made.cgroup / "cgroup.procs").read_text().split():
                (limited / "cgroup.procs").write_text(pid)
            found = Bench(folder, device, point, made, limited, ssh, reference)
            before = found.iostats.read_text()
            mounted.callback(found.iostats.write_text, before)
            found.iostats.write_text("0")
            yield found
            assert (point / "reference").read_bytes() == reference
        # Unmounted: what the copies have left of the file system is sound.
        run("e2fsck", "-f", "-n", device)


class Run:
    """One copy that stands still at a step."""

    def __init__(self, bench: Bench, step: str, victim: str, *options: str) -> None:
        self.bench, self.step, self.victim = bench, step, victim
        bench.runs += 1
        self.folder = bench.folder / f"run{bench.runs}"
        self.folder.mkdir()
        self.target = self.folder / "target"
        receive = [sys.executable, "-m", "pyploop.cli.main", "copy", "-d", str(self.target)]
        remote = f"exec {shlex.join(receive)}"
        send = [
            *(sys.executable, stepper.__file__, step, str(self.folder), "copy", "-s", bench.device),
            *("--freeze", f"cgroup:{bench.container.cgroup.parent}", "--resume"),
            *("--throttle", f"4M:{bench.throttle}", "--tracker", "bpf"),
            *(options or ("--freeze-limit", "80")),
        ]
        with contextlib.ExitStack() as fds:
            inp, out = os.pipe()
            back, answer = os.pipe()
            for fd in (inp, out, back, answer):
                fds.callback(os.close, fd)
            self.log = fds.enter_context((self.folder / "log").open("wb"))
            over_ssh = victim in ("ssh", "group")
            self.sender = subprocess.Popen(
                [*send, "-o", str(out), "-f", str(back)],
                pass_fds=[out, back],
                env=pyploop_env(),
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                process_group=0,
            )
            self.receiver = subprocess.Popen(
                [*bench.ssh, remote + " -f 1"] if over_ssh else [*receive, "-f", "1"],
                env=pyploop_env(),
                stdin=inp,
                stdout=answer,
                stderr=self.log,
                # In a shell's pipeline ssh is of the sender's group.
                process_group=self.sender.pid if victim == "group" else 0,
            )

    def strike(self) -> float:
        """Kill at the step; seconds until the container runs again."""
        with contextlib.suppress(AssertionError):  # the log as it is by then says more
            wait_until(lambda: self.at_step() or self.sender.poll() is not None, "arrives", ARRIVAL)
        assert self.at_step(), self.words("arrives")
        if self.victim == "group":
            os.killpg(self.sender.pid, signal.SIGKILL)
        elif self.victim == "sender":
            self.sender.kill()
        else:
            self.receiver.kill()
        start = time.monotonic()
        (self.folder / "go").touch()
        assert self.bench.container.running(SECONDS), self.words("the container runs")
        return time.monotonic() - start

    def watchdog(self) -> int:
        """The sender's child that is no command."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                line = stat.with_name("cmdline").read_bytes()
                if parent == self.sender.pid and b"watchdog.py" in line:
                    return int(stat.parts[2])
        raise AssertionError(self.words("a watchdog is there"))

    def kill_watchdog(self) -> None:
        wait_until(self.at_step, self.words("arrives"), ARRIVAL)
        pid = self.watchdog()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: start_time(pid) is None, "the watchdog is dead")

    def at_step(self) -> bool:
        return (self.folder / "at").exists()

    def words(self, what: str) -> str:
        log = (self.folder / "log").read_text(errors="replace")
        return f"{self.victim} killed at {self.step!r}: {what}\n{log}"

    def check(self) -> None:
        bench, words = self.bench, self.words
        code = self.sender.wait(ARRIVAL)
        self.receiver.wait(ARRIVAL)
        journal = bench.folder / "run"
        wait_until(lambda: not list(journal.glob("*")), words("the journal is empty"), SECONDS)
        wait_until(lambda: not self.processes(), words("processes end"), SECONDS)
        assert not is_frozen(bench.point), words("thawed")
        assert bench.container.running(SECONDS), words("the container still runs")
        assert (bench.throttle / "blkio.throttle.write_bps_device").read_text() == "", words(
            "throttle"
        )
        assert bench.iostats.read_text() == "0\n", words("accounting is off again")
        assert "Traceback" not in (self.folder / "log").read_text(errors="replace"), words("plain")
        left = [p.name for p in self.folder.iterdir() if ".part" in p.name]
        assert not left, words(f"left: {left}")
        if self.target.exists():
            assert self.step in DONE, words("no target before its time")
            with self.target.open("rb") as f:
                found = hashlib.file_digest(f, "sha1").hexdigest()
            assert found == (self.folder / "frozen").read_text(), words("the target is complete")
        else:
            assert code != 0, words("success means a target")

    def processes(self) -> list[str]:
        """All whose command line names this run: no tracker without one."""
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (proc / "cmdline").read_bytes()
                if bytes(self.folder) + b"/" in line or bytes(self.folder) + b"\0" in line:
                    found.append(line.replace(b"\0", b" ").decode(errors="replace"))
        return found

    def close(self) -> None:
        for process in (self.sender, self.receiver):
            end(process)
        shutil.rmtree(self.folder)


def cell(bench: Bench, step: str, victim: str) -> None:
    run = Run(bench, step, victim)
    try:
        seconds = run.strike()
        run.check()
        bench.slowest[step, victim] = max(bench.slowest[step, victim], seconds)
    finally:
        run.close()


def table(bench: Bench) -> str:
    lines = [
        f"{'seconds until the container runs (slowest)':43}" + "".join(f"{v:>10}" for v in VICTIMS)
    ]
    for step in STEPS:
        cells = [bench.slowest.get((step, v)) for v in VICTIMS]
        lines.append(
            f"{step:43}" + "".join(f"{'-' if c is None else f'{c:.3f}':>10}" for c in cells)
        )
    return "\n".join(lines)


@pytest.mark.invariant(number=3)
def test_whoever_is_killed_at_whatever_step_the_container_runs_and_nothing_is_left(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [(s, v) for s in STEPS for v in VICTIMS] if ROUNDS else list(SOME)
    failures = []
    for _ in range(max(ROUNDS, 1)):
        for step, victim in cells:
            try:
                cell(bench, step, victim)
            except (AssertionError, subprocess.TimeoutExpired) as e:
                failures.append(str(e))
    if ROUNDS:
        with capsys.disabled():
            print(f"\n{bench.runs} kills, {len(failures)} failures\n{table(bench)}")
    assert not failures, "\n".join(failures)


@contextlib.contextmanager
def stopped_at(bench: Bench, step: str, *options: str) -> Iterator[Run]:
    made = Run(bench, step, "sender", *options)
    try:
        yield made
    finally:
        made.close()


def test_a_watchdog_that_dies_before_the_freeze_is_replaced(bench: Bench) -> None:
    with stopped_at(bench, "watchdog ready") as made:
        made.kill_watchdog()
        (made.folder / "go").touch()
        assert made.sender.wait(20) == 0, made.words("it ends well")
        made.step = "released"
        made.check()


def test_a_watchdog_that_dies_when_the_target_is_complete_changes_nothing(bench: Bench) -> None:
    with stopped_at(bench, "acknowledged") as made:
        made.kill_watchdog()
        (made.folder / "go").touch()
        assert made.sender.wait(20) == 0, made.words("it ends well")
        made.step = "released"
        made.check()


@pytest.mark.parametrize("step", ["cgroup frozen", "last blocks sent"])
def test_a_sender_whose_watchdog_dies_in_the_freeze_undoes_and_sends_no_end(
    bench: Bench, step: str
) -> None:
    with stopped_at(bench, step) as made:
        made.kill_watchdog()
        (made.folder / "go").touch()
        assert made.sender.wait(20) == 3, made.words("it gives up")
        assert "watchdog has died" in made.words("")
        assert made.receiver.wait(20) == 6, made.words("no END")
        made.check()


def test_what_both_leave_behind_is_thawed_by_hand(bench: Bench) -> None:
    with stopped_at(bench, "frozen") as made:
        made.kill_watchdog()
        made.sender.kill()
        made.sender.wait()
        assert is_frozen(bench.point) and not bench.container.running(0.2)
        code, listed = thaw("--list")
        assert (code, f"thaw {bench.point}" in listed, "thaw cgroup" in listed) == (0, True, True)
        code, told = thaw(str(made.sender.pid))
        assert code == 0, told
        made.check()
        assert thaw("--all") == (0, "")


def thaw(*args: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pyploop.cli.main", "thaw", *args]
    done = subprocess.run(command, env=pyploop_env(), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_file_system_is_thawed_by_its_device_wherever_it_is_mounted(bench: Bench) -> None:
    other, st = bench.folder / "other", bench.point.stat()
    entry = {"mount": str(other), "dev": f"{os.major(st.st_dev)}:{os.minor(st.st_dev)}"}
    other.mkdir()
    undo_kinds.thaw(entry)  # not frozen: nothing to do
    run("fsfreeze", "-f", bench.point)
    try:
        # At its old place there is another file system now, or none.
        undo_kinds.thaw({**entry, "mount": str(bench.point), "dev": "7:4095"})  # that has gone
        with pytest.raises(DeviceControlError, match="not mounted any more"):
            undo_kinds.thaw({**entry, "fsid": 1})
        assert is_frozen(bench.point)
        undo_kinds.thaw(entry)
        assert not is_frozen(bench.point)
    finally:
        subprocess.run(["fsfreeze", "-u", str(bench.point)], capture_output=True, check=False)


def test_a_freeze_that_hangs_in_the_kernel_is_undone_when_the_kernel_lets_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The source's image lies on a file system that is frozen itself."""
    needs("loop", "mkfs.ext4", "fsfreeze")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(work_dir())
        disk = stack.enter_context(loop_device(sparse_file(folder / "outer", 4 * SIZE)))
        outer = stack.enter_context(file_system(disk, folder / "o"))
        bench = stack.enter_context(
            contextlib.contextmanager(make_bench)(monkeypatch, folder, outer)
        )
        with stopped_at(bench, "freeze begins", "--freeze-limit", "1") as made:
            wait_until(made.at_step, made.words("arrives"))
            watchdog = made.watchdog()
            run("fsfreeze", "-f", outer)
            try:
                (made.folder / "go").touch()
                # It has come to undo, and waits for the kernel as well.
                wait_until(lambda: state(watchdog) == "D", made.words("the limit passes"), 5)
            finally:
                run("fsfreeze", "-u", outer)
            assert made.sender.wait(20) == 14, made.words("it gives up")
            made.check()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
