# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: warm memory, loop devices, runs in turns, tables.

Everything that is made here is a context manager, and `cleaned_up` turns
signals into exceptions: whatever ends a benchmark, nothing of it stays.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import re
import resource
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
GIB = 1 << 30
FALLOC_KEEP_SIZE_PUNCH_HOLE = 3
SHM = Path("/dev/shm")
TESTS = ROOT / "tests"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))  # `lab`, for those that need hosts


# ---- set-up and clean-up


@contextlib.contextmanager
def cleaned_up() -> Iterator[contextlib.ExitStack]:
    """An ExitStack that is unwound on signals too."""

    def handler(signum: int, frame: FrameType | None) -> None:
        for name in names:
            signal.signal(name, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    old = {name: signal.signal(name, handler) for name in names}
    try:
        with contextlib.ExitStack() as stack:
            yield stack
    finally:
        for name, previous in old.items():
            signal.signal(name, previous)


@contextlib.contextmanager
def steady_memory() -> Iterator[str]:
    """No free memory goes back to the hypervisor meanwhile; says what was done.

    Reports of free pages run on a CPU of ours, and take away pages that were
    warm; when they come, and hence which tool they hit, is chance.  They are of
    blocks from an order on: one above the largest that there is means none.
    The parameter is everybody's, so it gets its value back; where it cannot be
    written, the figures spread more.
    """
    knob = Path("/sys/module/page_reporting/parameters/page_reporting_order")
    zones = Path("/proc/buddyinfo").read_text().splitlines()
    largest = max(len(zone.split()) for zone in zones) - 5  # "Node 0, zone NAME", orders 0 ...
    try:
        before = knob.read_text()
        knob.write_text(str(largest + 1))
    except OSError as e:
        yield f"free pages are reported to the hypervisor, if it wants them ({e.strerror})"
        return
    try:
        yield "free pages are not reported to the hypervisor"
    finally:
        knob.write_text(before)


@contextlib.contextmanager
def warm_memory(size: int) -> Iterator[None]:
    """`size` bytes of free memory that the hypervisor really gave us.

    A balloon with free page reporting returns free memory to the host within
    seconds, and touching it again costs several times more than writing to it
    (0.3 instead of 3 GB/s here): that would be measured, not the copy.  Only
    whole 2 MiB blocks are reported, so one page of each is kept, and the rest
    is free: the allocator takes such broken blocks first.  Whole ones are for
    `heat` to warm.
    """
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    fd = os.open(SHM, os.O_TMPFILE | os.O_RDWR)
    try:
        for pos in range(0, size, MIB):
            os.pwrite(fd, bytes(MIB), pos)
        for pos in range(0, size, 2 * MIB):
            if fallocate(fd, FALLOC_KEEP_SIZE_PUNCH_HOLE, pos, 2 * MIB - 4096) != 0:
                raise OSError(ctypes.get_errno(), "fallocate")
        yield
    finally:
        os.close(fd)


def heat(size: int) -> None:
    """Touch `size` bytes of free memory in whole 2 MiB blocks, and free them.

    Just before a run, whatever it is of: the hypervisor takes such blocks back
    after about two seconds.
    """
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, np.uint8)[::4096] = 1


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A folder that is removed with the files in it."""
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        for child in sorted(path.rglob("*"), reverse=True):
            child.rmdir() if child.is_dir() and not child.is_symlink() else child.unlink()
        path.rmdir()


def random_file(path: Path, size: int) -> None:
    """Random bytes: no zero blocks, nothing to compress."""
    generator = np.random.default_rng(1)
    with path.open("wb") as f:
        for pos in range(0, size, 16 * MIB):
            f.write(generator.bytes(min(16 * MIB, size - pos)))
        os.fsync(f.fileno())


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """A loop device on the image."""
    command = ["losetup", "--find", "--show", str(image)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)


@contextlib.contextmanager
def mounted(device: str, at: Path) -> Iterator[Path]:
    at.mkdir()
    try:
        subprocess.run(["mount", device, str(at)], check=True)
        try:
            yield at
        finally:
            subprocess.run(["umount", str(at)], check=True)
    finally:
        at.rmdir()


# ---- running


def installed(scratch: Path) -> dict[str, str]:
    """The environment of the installed pyploop, with its bytecode kept also where it is
    installed as a link to a tree."""
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(scratch / "bytecode")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return env


@dataclass(frozen=True)
class Usage:
    """What the processes of one run took: seconds, MiB."""

    seconds: float
    cpu: float
    user: list[float]
    system: list[float]
    rss: list[float]


@dataclass
class Step:
    """One process of a run."""

    command: Sequence[str]
    env: Mapping[str, str] | None = None
    stdin: int | None = None
    stdout: int | None = None
    fds: Sequence[int] = ()


def run(steps: Sequence[Step], log: Path, ours: Sequence[int] = ()) -> Usage:
    """Start all, close `ours` (our copies of their descriptors), wait for all.

    RuntimeError when one fails, with what it said.
    """
    processes: list[subprocess.Popen[bytes]] = []
    usages: list[resource.struct_rusage] = []
    with log.open("w+b") as messages:
        start = time.monotonic()
        try:
            for step in steps:
                processes.append(
                    subprocess.Popen(
                        step.command,
                        env=step.env,
                        stdin=subprocess.DEVNULL if step.stdin is None else step.stdin,
                        stdout=messages if step.stdout is None else step.stdout,
                        stderr=messages,
                        pass_fds=step.fds,
                    )
                )
            for fd in ours:
                os.close(fd)
            peaks = _watch([process.pid for process in processes])
            for process in processes:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                usages.append(usage)
            seconds = time.monotonic() - start
        finally:
            for process in processes:
                if process.returncode is None:
                    process.kill()
                    process.wait()
        for process in processes:
            if process.returncode:
                messages.seek(0)
                said = messages.read().decode(errors="replace")
                raise RuntimeError(f"{process.args!r} ended with {process.returncode}: {said}")
    user = [usage.ru_utime for usage in usages]
    system = [usage.ru_stime for usage in usages]
    return Usage(seconds, sum(user) + sum(system), user, system, peaks)


def _watch(pids: Sequence[int]) -> list[float]:
    """Wait until all have ended; their peak RSS in MiB, seen 20 times a second.

    (ru_maxrss counts what the process was before exec: this one.)
    """
    peaks = dict.fromkeys(pids, 0.0)
    poll = select.poll()
    alive = {os.pidfd_open(pid): pid for pid in pids}
    try:
        for fd in alive:
            poll.register(fd, select.POLLIN)
        while alive:
            for fd, _ in poll.poll(50):
                poll.unregister(fd)
                del alive[fd]
                os.close(fd)
            for pid in alive.values():
                status = Path(f"/proc/{pid}/status").read_text()
                if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                    peaks[pid] = max(peaks[pid], int(found[1]) / 1024)
    finally:
        for fd in alive:
            os.close(fd)
    return list(peaks.values())


Sample = dict[str, Any]
Samples = dict[str, list[Sample]]


def in_turns(
    cases: Mapping[str, Callable[[], Sample]],
    repeat: int,
    note: Callable[[str], None],
) -> Samples:
    """Each case once per repetition, starting with another one each time.

    A first repetition is not counted: it warms caches, and may verify.
    """
    names = list(cases)
    samples: Samples = {name: [] for name in names}
    for turn in range(repeat + 1):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            sample = cases[name]()
            note(f"{turn}/{repeat} {name}: {sample}")
            if turn:
                samples[name].append(sample)
    return samples


# ---- figures


@dataclass(frozen=True)
class Figure:
    """Median and range of a handful of values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        array = np.asarray(values, dtype=np.float64)
        return cls(float(np.median(array)), float(array.min()), float(array.max()))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


def column(samples: Sequence[Sample], key: str) -> list[float]:
    return [float(sample[key]) for sample in samples if sample.get(key) is not None]


def ratio(over: Sequence[float], under: Sequence[float]) -> Figure:
    """Of values measured in the same repetition, one by one."""
    pairs = zip(over, under, strict=True)
    return Figure.of([a / b for a, b in pairs])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([line(head), rule, *map(line, rows)])


@dataclass
class Requirement:
    """A ratio that has to be reached."""

    what: str
    figure: Figure
    least: float

    @property
    def met(self) -> bool:
        return self.figure.median >= self.least

    def text(self) -> str:
        verdict = "met" if self.met else "NOT MET"
        return f"{self.what}: {self.figure.text()}, required >= {self.least:g}: {verdict}"


@dataclass
class Results:
    """Everything that goes into --json."""

    command: list[str] = field(default_factory=lambda: ["python3", *sys.argv])
    machine: dict[str, Any] = field(
        default_factory=lambda: {
            "kernel": os.uname().release,
            "machine": os.uname().machine,
            "cpus": os.cpu_count(),
            "load": os.getloadavg(),
        }
    )
    settings: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Samples] = field(default_factory=dict)
    requirements: list[Requirement] = field(default_factory=list)

    def write(self, path: Path) -> None:
        document = {
            **vars(self),
            "requirements": [
                {**vars(r), "figure": vars(r.figure), "met": r.met} for r in self.requirements
            ],
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


# ---- the head of a benchmark


def arguments(doc: str | None, *, repeat: int) -> argparse.ArgumentParser:
    """The options that all of them have.  doc: of the module; repeat: the default."""
    p = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    add = p.add_argument
    add("--repeat", type=int, default=repeat, metavar="N", help=f"counted repetitions ({repeat})")
    add("--json", type=Path, metavar="FILE", help="all raw figures")
    add("--check", action="store_true", help="exit 1 when a requirement is not met")
    add("-v", "--verbose", action="store_true", help="each run, on stderr")
    return p


def noter(o: argparse.Namespace) -> Callable[[str], None]:
    """What prints each run, if that was asked for."""

    def note(text: str) -> None:
        if o.verbose:
            print(text, file=sys.stderr, flush=True)

    return note


def finish(results: Results, o: argparse.Namespace) -> int:
    """Print the requirements and how to repeat it, and write the figures.  Returns the exit
    code."""
    print()
    for requirement in results.requirements:
        print(requirement.text())
    print("\nAgain: " + shlex.join(results.command))
    if o.json:
        results.write(o.json)
    return 1 if o.check and not all(r.met for r in results.requirements) else 0
