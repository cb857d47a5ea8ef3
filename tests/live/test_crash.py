# SPDX-License-Identifier: Apache-2.0
"""E: processes that die at the worst moment.  Afterwards the file system is
thawed, no target and no process is left, no BPF program is attached, and the
next copy works."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from support import MIB, is_frozen, loop_device, needs, telling, wait_until
from support_live import (
    REPEAT,
    Copy,
    bpf_holders,
    comparison,
    copy,
    file_system,
    fio,
    open_files,
    sparse_file,
    succeeded,
    work_dir,
)

pytestmark = pytest.mark.root

SIZE = 64 * MIB
WRITES = ["--rw=randwrite", "--bsrange=4k-64k", "--fsync=16", "--ioengine=psync"]
BPF = ("--tracker", "bpf")


@dataclass
class Bench:
    folder: Path
    image: Path
    device: str
    point: Path

    @property
    def target(self) -> Path:
        return self.folder / "target"


@pytest.fixture
def bench() -> Iterator[Bench]:
    needs("loop", "fio", "mkfs.ext4")
    with work_dir() as folder:
        image = sparse_file(folder / "image", SIZE)
        with (
            loop_device(image) as device,
            file_system(device, folder / "mnt") as point,
            fio(point, "w", *WRITES, f"--size={SIZE // 4}"),
        ):
            yield Bench(folder, image, device, point)


def processes_of(folder: Path) -> list[str]:
    """Command lines that name the folder, except the writer's."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (proc / "cmdline").read_bytes().split(b"\0")
            line = b" ".join(words).decode(errors="replace")
            if str(folder) in line and "fio" not in line:
                found.append(f"{proc.name}: {line}")
    return found


def writes_wait(point: Path, probes: list[subprocess.Popen[bytes]]) -> bool:
    """A write to the file system does not end: what a freeze is for."""
    probe = subprocess.Popen(["touch", str(point / "probe")])
    probes.append(probe)
    with contextlib.suppress(subprocess.TimeoutExpired):
        probe.wait(0.5)
    return probe.poll() is None


def watchdogs_on(point: Path) -> list[str]:
    """Processes that hold the mount point open."""
    return [fd.parts[2] for fd, name in open_files() if name == str(point)]


def recovered(bench: Bench, copies: Callable[[], None] | None = None) -> None:
    """Everything is as if no copy had been tried."""
    # A frozen file system makes no write; the writer's own counter tells.
    wait_until(lambda: not watchdogs_on(bench.point), "the watchdog has gone")
    assert not is_frozen(bench.point)
    assert not bench.target.exists()
    left = [p.name for p in bench.folder.iterdir() if ".part" in p.name]
    assert not left, left
    wait_until(lambda: not processes_of(bench.folder), "no process is left", 5)
    assert not bpf_holders_of_ours()
    (copies or (lambda: again(bench)))()


def bpf_holders_of_ours() -> list[str]:
    """BPF descriptors in processes that tests did not start at the same time:
    those of a pyploop that has no parent any more."""
    found = []
    for fd in bpf_holders():
        with contextlib.suppress(OSError, ValueError):
            stat = Path(*Path(fd).parts[:3], "stat").read_text()
            if int(stat.rpartition(")")[2].split()[1]) == 1:
                found.append(fd)
    return found


def again(bench: Bench) -> None:
    check = comparison(bench.image, bench.target, SIZE)
    got = copy(bench.device, bench.target, *BPF, "--before-thaw", check)
    succeeded(got)
    assert got.summary["completeness"] == "complete"
    bench.target.unlink()


ways = pytest.mark.parametrize("via", ["pipe", "local"])


@ways
@pytest.mark.invariant(number=7)
def test_a_sender_killed_at_any_moment_leaves_nothing(bench: Bench, via: str) -> None:
    dice = random.Random(via)
    for _ in range(3 * REPEAT):
        with Copy(bench.device, bench.target, *BPF, via=via) as running:
            time.sleep(dice.uniform(0.0, 0.6))
            running.sender.kill()
            running.sender.wait()
            if running.receiver is not None:
                running.receiver.wait(10)
        if bench.target.exists():  # it was quicker
            bench.target.unlink()
        recovered(bench)


KILLED = [("pipe", False), ("pipe", True), ("local", False), ("local", True)]
"""How it is copied, and whether the sender's process group is killed, too."""


@pytest.mark.parametrize(("via", "group"), telling(KILLED, 0, 3))
@pytest.mark.invariant(number=3)
def test_a_sender_killed_while_frozen_is_thawed_by_its_watchdog(
    bench: Bench, via: str, group: bool
) -> None:
    """-F is run unfrozen; the second freeze holds the copy at its last step."""
    marker = bench.folder / "stopped"
    with Copy(
        bench.device,
        bench.target,
        *BPF,
        "--before-thaw",
        f": >{marker}; exec sleep 3.1415",
        via=via,
    ) as running:
        wait_until(marker.exists, "the copy is at its end")
        assert is_frozen(bench.point)
        bench.target.unlink()  # it is finished, so it has its name
        if group:
            os.killpg(running.sender.pid, signal.SIGKILL)
        else:
            running.sender.kill()
        running.sender.wait()
        if running.receiver is not None:
            running.receiver.wait(10)
    # The command is the user's own, in a session of its own: it ends by itself.
    recovered(bench)


def test_a_sender_killed_in_its_last_blocks_is_thawed(bench: Bench) -> None:
    """The receiver stands still, so the sender waits while frozen."""
    for _ in range(REPEAT):
        marker = bench.folder / "stopping"
        marker.unlink(missing_ok=True)
        with Copy(bench.device, bench.target, *BPF, "-F", f": >{marker}; sleep 0.2") as running:
            assert running.receiver is not None
            wait_until(marker.exists, "the stop command runs")
            running.receiver.send_signal(signal.SIGSTOP)
            # Not by is_frozen: it would be in the way of the sender's own.
            probes: list[subprocess.Popen[bytes]] = []
            wait_until(partial(writes_wait, bench.point, probes), "it is frozen")
            assert is_frozen(bench.point)
            running.sender.kill()
            running.sender.wait()
            running.receiver.send_signal(signal.SIGCONT)
            assert running.receiver.wait(10) == 6
            for probe in probes:
                probe.wait(10)
        recovered(bench)


@pytest.mark.parametrize("when", ["first pass", "frozen"])
@pytest.mark.invariant(number=3)
def test_a_killed_receiver_ends_the_sender_with_7_and_thaws(bench: Bench, when: str) -> None:
    marker = bench.folder / "stopping"
    options = ["-F", f": >{marker}; sleep 0.3"] if when == "frozen" else ["--bwlimit", "4M"]
    with Copy(bench.device, bench.target, *BPF, *options) as running:
        assert running.receiver is not None
        if when == "frozen":
            wait_until(marker.exists, "the stop command runs")
        else:
            wait_until(lambda: running.in_phase("first pass"), "the first pass runs")
        running.receiver.kill()
        got = running.wait(20)
    assert got.code == 7, got.errors
    recovered(bench)


SIGNALS = [
    (when, signum)
    for when in ("first pass", "frozen")
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
]


@pytest.mark.parametrize(("when", "signum"), telling(SIGNALS, 2, 3, 4))
@pytest.mark.invariant(number=3)
def test_a_signal_undoes_everything(bench: Bench, signum: signal.Signals, when: str) -> None:
    marker = bench.folder / "stopping"
    options = ["--before-thaw", f": >{marker}; exec sleep 30"]
    options = options if when == "frozen" else ["--bwlimit", "4M"]
    with Copy(bench.device, bench.target, *BPF, *options, via="local") as running:
        if when == "frozen":
            wait_until(marker.exists, "it is frozen")
            bench.target.unlink()
        else:
            wait_until(lambda: running.in_phase("first pass"), "the first pass runs")
        running.sender.send_signal(signum)
        got = running.wait(20)
    assert got.code == -signum, got.errors
    recovered(bench)
