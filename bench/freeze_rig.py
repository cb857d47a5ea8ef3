# SPDX-License-Identifier: Apache-2.0
"""One frozen window of each kind, measured the same way.

    1.10     C pair that syncs nothing before the freeze (modelled, see below)
    1.11     C pair that sends SYNC and sleeps 5 s (Debian's 1.15 without -f)
    1.15     C pair with feedback
    pyploop  our pair with feedback
    other    the same of another pyploop, say an older version

The C tool runs on the faked device of tests/fakeploop, with real tracking of
writes.  1.10 is the 1.11 kind without the sleep, whose receiver does not sync
at SYNC (freeze_peer.c).  The window begins with the stop command's first act
(freeze_stop.c) and ends when the target is durable: when the C receiver's last
fdatasync has returned, when pyploop's sender has the acknowledgement.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shlex
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from common import ROOT, Sample, Step
from freeze_loads import Load
from freeze_report import OTHER, OURS

sys.path.insert(0, str(ROOT / "tests" / "fakeploop"))
import fakeploop

HERE = Path(__file__).resolve().parent
PATIENCE = 120.0
"""Seconds for one copy."""
PYPLOOPS = (OURS, OTHER)
SYS_CACHESTAT = 451
STAMP = struct.Struct("Q")
CARELESS = 4096
"""Bytes at the start that thawing changes (the superblock)."""


def compile_helpers(folder: Path) -> tuple[Path, Path]:
    """The stop command and the C receiver's preload."""
    stop, peer = folder / "freeze_stop", folder / "freeze_peer.so"
    cc = [os.environ.get("CC", "cc"), "-O2", "-Wall", "-Wextra", "-std=gnu11"]
    subprocess.run([*cc, "-static", "-o", str(stop), str(HERE / "freeze_stop.c")], check=True)
    flags = ["-shared", "-fPIC", "-o", str(peer)]
    subprocess.run([*cc, *flags, str(HERE / "freeze_peer.c")], check=True)
    return stop, peer


@dataclass
class Rig:
    """The source, and where targets and logs go."""

    device: str
    image: Path
    mount: Path
    target: Path
    scratch: Path
    pyploop: Sequence[str]
    extra: Sequence[str] = ()
    """Options for our sender."""
    other: Sequence[str] = ()
    other_extra: Sequence[str] = ()
    c_sleep: bool = True
    _stop: Path = field(init=False)
    _peer: Path = field(init=False)
    _library: Path = field(init=False)

    def __post_init__(self) -> None:
        self._stop, self._peer = compile_helpers(self.scratch)
        self._library = fakeploop.build(self.scratch)
        self._fifo = self.scratch / "stamps"
        os.mkfifo(self._fifo)
        self._events, self._received = self.scratch / "sent", self.scratch / "received"
        self._synced = self.scratch / "synced"
        self._messages = self.scratch / "messages"
        (self.scratch / "fake").mkdir()

    def sample(self, mode: str, load: Load) -> Sample:
        """Copy while the load runs, which stays stopped; compared afterwards."""
        for path in (self.target, self._events, self._received, self._synced):
            path.unlink(missing_ok=True)
        (self.scratch / "log").unlink(missing_ok=True)
        try:
            run = self._run(mode, load)
            tool = self._ours(run) if mode in PYPLOOPS else self._c(run)
            compare = ["cmp", f"--ignore-initial={CARELESS}", str(self.image), str(self.target)]
            subprocess.run(compare, check=True)
        finally:
            self.target.unlink(missing_ok=True)
        return {
            "load_rate": round(run.load_rate),
            "stop": run.stamps[1] - run.stamps[0],
            "sender": run.sender - run.stamps[0],
            "receiver": run.receiver - run.stamps[0],
            "copy": run.sender - run.begun,
            "peer_dirty": run.peer_dirty,
            **tool,
        }

    def _commands(self, mode: str, stop: str) -> tuple[list[str], list[str]]:
        if mode in PYPLOOPS:
            program, extra = (
                (self.pyploop, self.extra) if mode == OURS else (self.other, self.other_extra)
            )
            send = [*program, "-v-1", "copy", "-s", self.device, "-F", stop]
            send += ["--json", str(self._events), *extra]
            receive = [*program, "-v-1", "copy", "-d", str(self.target)]
            return send, [*receive, "--json", str(self._received)]
        receive = fakeploop.c_receiver_cmd(self.target, program=("ploop", "-v-1"))
        return fakeploop.c_sender_cmd(stop=stop, verbose=-1), receive

    def _environments(self, mode: str) -> tuple[dict[str, str], dict[str, str]]:
        if mode in PYPLOOPS:
            return dict(os.environ), dict(os.environ)
        sender = fakeploop.env(
            self._library,
            self.device,
            self.scratch,
            image=self.device,
            mount=self.mount,
            track="bpf",
            sleep=mode == "1.11" and self.c_sleep,
        )
        receiver = {"LD_PRELOAD": str(self._peer), "FREEZE_PEER_LOG": str(self._synced)}
        if mode == "1.10":
            receiver["FREEZE_PEER_OLD"] = "1"
        return sender, {**os.environ, **receiver}

    def _run(self, mode: str, load: Load) -> Run:
        stop = shlex.join([str(self._stop), str(self._fifo), *map(str, load.pids)])
        send, receive = self._commands(mode, stop)
        send_env, receive_env = self._environments(mode)
        stream, answer = os.pipe(), os.pipe()
        if mode in ("1.15", *PYPLOOPS):
            send += ["-f", str(answer[0])]
            receive += ["-f", str(answer[1])]
        steps = [
            Step(receive, receive_env, stdin=stream[0], fds=[answer[1]]),
            Step(send, send_env, stdout=stream[1], fds=[answer[0]]),
        ]
        with self._messages.open("w+b") as messages, Watcher(self._fifo, self.target) as watcher:
            processes: list[subprocess.Popen[bytes]] = []
            begun = time.monotonic()
            try:
                processes += [start(step, messages) for step in steps]
                for fd in (*stream, *answer):
                    os.close(fd)
                watcher.start(processes[0].pid, load)
                receiver, sender = ended(processes, begun + PATIENCE)
            finally:
                for process in processes:
                    if process.poll() is None:
                        process.kill()
                        process.wait()
            codes = [process.returncode for process in processes]
            if any(codes):
                messages.seek(0)
                said = messages.read().decode(errors="replace")
                raise RuntimeError(f"{mode}: receiver, sender ended with {codes}: {said}")
            return Run(begun, sender, receiver, *watcher.result())

    # ---- what the tools say

    def _c(self, run: Run) -> Sample:
        """Steps from the faked device's log, the end from the receiver's."""
        log = fakeploop.read_log(self.scratch / "log")
        stamps = self._synced.read_bytes()
        if len(stamps) != 2 * STAMP.size:
            raise RuntimeError(f"the C receiver synced {len(stamps) // STAMP.size} times, not 2")
        durable = STAMP.unpack_from(stamps, STAMP.size)[0] / 1e9
        at: dict[str, float] = {}
        sent = 0
        for line in log:
            if line.seconds < run.stamps[0]:
                continue
            words = line.rest.split()
            if line.op == "TRACK_READ" and len(words) == 2 and words[0].isdigit():
                sent += int(words[1]) - int(words[0])
            at[" ".join([line.op, *(word for word in words[:1] if word in ("start", "end"))])] = (
                line.seconds
            )
        steps = {
            "stop": at["SYSTEM end"] - run.stamps[0],
            "sync": at["SYNCFS end"] - at["SYNCFS start"],
            "freeze": at["FIFREEZE end"] - at["FIFREEZE start"],
            "send": at["TRACK_STOP"] - at["FIFREEZE end"],
            "target": durable - at["TRACK_STOP"],
        }
        return {"durable": durable - run.stamps[0], "frozen_bytes": sent, "steps": steps}

    def _ours(self, run: Run) -> Sample:
        events = [json.loads(line) for line in self._events.read_text().splitlines()]
        sending, frozen, summary = (
            next(e for e in events if e["event"] == name)
            for name in ("sending", "frozen", "summary")
        )
        # The event's time is that of the end of its last step.
        acknowledged = sending["clock"] + frozen["time"] - frozen["steps"]["thaw"]
        return {
            "durable": acknowledged - run.stamps[0],
            "frozen_bytes": summary["frozen_bytes"],
            "steps": summary["frozen"],
            "rounds": len(summary["rounds"]),
            "predicted": summary["predicted"],
            "actual": summary["frozen_window"],
            "max_freeze": summary["max_freeze"],
        }


@dataclass(frozen=True)
class Run:
    """CLOCK_MONOTONIC seconds; sender, receiver: when they ended."""

    begun: float
    sender: float
    receiver: float
    stamps: list[float]
    peer_dirty: int
    load_rate: float


def start(step: Step, messages: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        step.command,
        env=step.env,
        stdin=subprocess.DEVNULL if step.stdin is None else step.stdin,
        stdout=messages if step.stdout is None else step.stdout,
        stderr=messages,
        pass_fds=step.fds,
    )


def ended(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> list[float]:
    """When each has ended; RuntimeError at the deadline."""
    poll = select.poll()
    fds = {os.pidfd_open(process.pid): i for i, process in enumerate(processes)}
    times = [0.0] * len(processes)
    left = dict(fds)
    try:
        for fd in fds:
            poll.register(fd, select.POLLIN)
        while left:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            now = time.monotonic()
            if not ready:
                raise RuntimeError("the copy does not end")
            for fd, _ in ready:
                poll.unregister(fd)
                times[left.pop(fd)] = now
    finally:
        for fd in fds:
            os.close(fd)
    for process in processes:
        process.wait()
    return times


class Watcher:
    """Reads the stop command's stamps, and what is dirty of the target then."""

    def __init__(self, fifo: Path, target: Path) -> None:
        self._target = target
        # Never without a writer, so that a reader gets stamps and no end.
        self._fd = os.open(fifo, os.O_RDWR)
        self._wake = os.pipe()
        self._stamps: list[float] = []
        self._dirty = 0
        self._rate = 0.0
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, receiver: int, load: Load) -> None:
        """From now on: for the process that has the target, and the load."""
        self._thread = threading.Thread(target=self._watch, args=(receiver, load))
        self._thread.start()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._wake[1])
        if self._thread is not None:
            self._thread.join()
        os.close(self._wake[0])
        os.close(self._fd)

    def result(self) -> tuple[list[float], int, float]:
        """Stamps, dirty bytes, the load's bytes per second; when the stop
        command has ended, the thread has little left to do."""
        if self._thread is not None:
            self._thread.join(1.0)
        if self._failure is not None:
            raise self._failure
        if len(self._stamps) != 2:
            raise RuntimeError(f"the stop command wrote {len(self._stamps)} stamps, not 2")
        return self._stamps, self._dirty, self._rate

    def _watch(self, receiver: int, load: Load) -> None:
        try:
            while len(self._stamps) < 2:
                ready, _, _ = select.select([self._fd, self._wake[0]], [], [])
                if self._fd not in ready:
                    return
                self._stamps.append(STAMP.unpack(os.read(self._fd, STAMP.size))[0] / 1e9)
                if len(self._stamps) == 1:
                    self._rate = load.rate()
                    self._dirty = dirty_bytes(receiver, self._target)
        except BaseException as e:
            self._failure = e


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recent")
    )


def dirty_bytes(pid: int, target: Path) -> int:
    """Bytes of the process's unfinished target that its disk does not have yet:
    dirty or in writeback (cachestat(2), some 0.2 ms for 1 GiB)."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        # The final name, or, for a file without one, `FOLDER/#INODE (deleted)`.
        name = os.readlink(entry)
        if name == str(target) or name.startswith(f"{target.parent}/#"):
            fd = os.open(entry, os.O_RDONLY)
            try:
                return _dirty(fd)
            finally:
                os.close(fd)
    raise RuntimeError(f"process {pid} has no open file in {target.parent}")


def _dirty(fd: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    everything, stat = _Range(0, 0), _CacheStat()
    if libc.syscall(SYS_CACHESTAT, fd, ctypes.byref(everything), ctypes.byref(stat), 0) != 0:
        raise OSError(ctypes.get_errno(), "cachestat (Linux 6.5)")
    pages: int = stat.dirty + stat.writeback
    return pages * os.sysconf("SC_PAGESIZE")
