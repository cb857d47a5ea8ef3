# SPDX-License-Identifier: Apache-2.0
"""A live copy as a user runs it: a writer, a sender, a receiver, a comparison
with the frozen source.  Images and targets lie in one folder per test."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import MIB, is_frozen, pyploop_cmd, pyploop_env, run

REPEAT = int(os.environ.get("PYPLOOP_REPEAT", "1"))
"""Copies per live case."""
LIVE_SIZE = int(os.environ.get("PYPLOOP_LIVE_MIB", "96")) * MIB
"""Bytes of the devices of live cases; the stress run has 1024 MiB."""
LOG = os.environ.get("PYPLOOP_LIVE_LOG")
"""File that gets one line for each live copy."""
COMPARE = Path(__file__).with_name("compare.py")


@contextlib.contextmanager
def work_dir() -> Iterator[Path]:
    """A folder on a disk (O_DIRECT), removed with what is in it."""
    parent = os.environ.get("PYPLOOP_LIVE_DIR")
    path = Path(tempfile.mkdtemp(prefix="pyploop-live-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def sparse_file(path: Path, size: int) -> Path:
    with path.open("wb") as f:
        f.truncate(size)
    return path


def random_file(path: Path, size: int) -> Path:
    with path.open("wb") as f:
        for at in range(0, size, MIB):
            f.write(os.urandom(min(MIB, size - at)))
    return path


def allocated(path: Path) -> int:
    """Bytes that the file really takes."""
    return path.stat().st_blocks * 512


# ---- processes


def end(process: subprocess.Popen[Any], group: bool = False) -> None:
    """Kill a process of ours (and its group) and reap it."""
    if process.poll() is None or group:
        with contextlib.suppress(ProcessLookupError):
            if group:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


class Fio:
    """fio in the background; `stop_command` kills it and returns when its last
    write has landed or never will."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self._pid, self._done = folder / f"{name}.pid", folder / f"{name}.done"
        words = ["fio", f"--name={name}", "--thread", "--time_based", "--runtime=600"]
        words += ["--randrepeat=0", "--norandommap", "--refill_buffers", *options]
        fio = " ".join(shlex.quote(w) for w in words)
        # The shell reaps fio, so that `done` means that no request of it is left.
        script = (
            f"cd {folder}; {fio} >/dev/null 2>&1 & echo $! >{self._pid}; wait $!; : >{self._done}"
        )
        self._shell = subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True)
        self.stop_command = (
            f"kill -9 $(cat {self._pid}); while [ ! -e {self._done} ]; do sleep 0.02; done"
        )

    @property
    def running(self) -> bool:
        return not self._done.exists()

    def close(self) -> None:
        if self.running and self._pid.exists():
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(self._pid.read_text()), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._shell.wait(10)
        end(self._shell, group=True)


@contextlib.contextmanager
def fio(folder: Path, name: str, *options: str) -> Iterator[Fio]:
    writer = Fio(folder, name, *options)
    try:
        time.sleep(0.3)
        yield writer
    finally:
        writer.close()


class PeakMemory:
    """The largest VmHWM of processes, in bytes by name.  Not rusage: that
    counts what the parent had before exec."""

    def __init__(self, **processes: subprocess.Popen[Any]) -> None:
        self.bytes = dict.fromkeys(processes, 0)
        self._processes = processes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            for name, process in self._processes.items():
                with contextlib.suppress(OSError, StopIteration):
                    # Not before exec: that would be our own memory.
                    exe = os.readlink(f"/proc/{process.pid}/exe")
                    words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
                    if b"copy" not in words.split(b"\0") or not exe:
                        continue
                    text = Path(f"/proc/{process.pid}/status").read_text()
                    line = next(x for x in text.splitlines() if x.startswith("VmHWM"))
                    kib = int(line.split()[1])
                    self.bytes[name] = max(self.bytes[name], kib * 1024)

    def close(self) -> None:
        self._over.set()
        self._thread.join()


# ---- one copy


@dataclass
class Copied:
    """How a copy ended."""

    code: int
    receiver_code: int | None
    errors: str
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        found = [e for e in self.events if e["event"] == "summary"]
        assert found, f"no summary; the sender ended with {self.code}: {self.errors}"
        return found[-1]

    @property
    def verdicts(self) -> list[str]:
        """Of the rounds, then of the end."""
        return [e["verdict"] for e in self.events if e["event"] == "round" and e["number"]] + [
            self.summary["completeness"]
        ]

    @property
    def repairs(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == "repair"]


C_RECEIVER = ("ploop", "copy")


class Copy:
    """A sender and its receiver, started; `wait` for both.

    via: 'local' (-d), 'pipe' (with feedback), 'mute' (a pipe alone) or
    'socket' (one socket, no -f).
    """

    def __init__(
        self,
        source: Path | str,
        target: Path,
        *options: str,
        via: str = "pipe",
        receiver: Sequence[str] | None = None,
        sender: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        json_events: bool = True,
    ) -> None:
        self.events_path = target.with_name(target.name + ".events")
        ours = [*pyploop_cmd(), "copy"]
        send = [*(sender or ours), "-s", str(source), *options]
        if json_events:
            send += ["--json", str(self.events_path)]
        self.receiver: subprocess.Popen[bytes] | None = None
        self._stderr = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115 - closed in wait
        self._start = time.monotonic()
        with contextlib.ExitStack() as fds:
            passed: list[int] = []
            if via == "local":
                send += ["-d", str(target)]
            else:
                receive = [*(receiver or ours), "-d", str(target)]
                if via == "socket":
                    a, b = socket.socketpair()
                    fds.enter_context(a)
                    fds.enter_context(b)
                    out, inp = a.fileno(), b.fileno()
                else:
                    inp, out = os.pipe()
                    fds.callback(os.close, inp)
                    fds.callback(os.close, out)
                taken = [inp]
                if via == "pipe":
                    back_r, back_w = os.pipe()
                    fds.callback(os.close, back_r)
                    fds.callback(os.close, back_w)
                    send += ["-f", str(back_r)]
                    receive += ["-f", str(back_w)]
                    passed.append(back_r)
                    taken.append(back_w)
                send += ["-o", str(out)]
                passed.append(out)
                self.receiver = subprocess.Popen(
                    [*receive, "-i", str(inp)],
                    pass_fds=taken,
                    env=pyploop_env(),
                    stdin=subprocess.DEVNULL,
                    stdout=self._stderr,
                    stderr=self._stderr,
                    start_new_session=True,
                )
            self.sender = subprocess.Popen(
                send,
                pass_fds=passed,
                env=pyploop_env(env),
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                start_new_session=True,
            )
        processes = {"sender": self.sender}
        if self.receiver is not None:
            processes["receiver"] = self.receiver
        self._memory = PeakMemory(**processes)

    def events(self) -> list[dict[str, Any]]:
        """What it has told so far."""
        if not self.events_path.exists():
            return []
        lines = self.events_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def in_phase(self, name: str) -> bool:
        return any(e["event"] == "phase" and e["phase"] == name for e in self.events())

    def wait(self, timeout: float = 300) -> Copied:
        try:
            code = self.sender.wait(timeout)
            receiver_code = None if self.receiver is None else self.receiver.wait(30)
            seconds = time.monotonic() - self._start
            self._stderr.seek(0)
            errors = self._stderr.read().decode(errors="replace")
            return Copied(
                code, receiver_code, errors, self.events(), seconds, dict(self._memory.bytes)
            )
        finally:
            self.close()

    def close(self) -> None:
        self._memory.close()
        for process in (self.sender, self.receiver):
            if process is not None:
                end(process)
        self._stderr.close()

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def copy(
    source: Path | str, target: Path, *options: str, timeout: float = 300, **how: Any
) -> Copied:
    with Copy(source, target, *options, **how) as running:
        return running.wait(timeout)


def comparison(
    truth: Path | str, target: Path, size: int, *, offset: int = 0, direct: bool = False
) -> str:
    """The command for --before-thaw: fails when the target differs, and leaves
    the differing blocks in TARGET.diff."""
    words = [sys.executable, str(COMPARE), str(truth), str(offset), str(size), str(target)]
    return " ".join(shlex.quote(w) for w in words + (["--direct"] if direct else []))


def same(
    truth: Path | str, target: Path, size: int, *, offset: int = 0, direct: bool = False
) -> bool:
    done = subprocess.run(
        ["/bin/sh", "-c", comparison(truth, target, size, offset=offset, direct=direct)],
        check=False,
    )
    return done.returncode == 0


def note(case: str, got: Copied, target: Path) -> None:
    """One line for the stress run's report."""
    if LOG is None:
        return
    diff = target.with_name(target.name + ".diff")
    with open(LOG, "a") as f:
        s = got.summary if got.code == 0 else {}
        line = {
            "case": case,
            "code": got.code,
            "receiver": got.receiver_code,
            "seconds": round(got.seconds, 2),
            "verdicts": got.verdicts if s else [],
            "repairs": [(e["scope"], e["sent"], e["frozen"]) for e in got.repairs],
            "frozen": round(s.get("frozen_total", 0), 3),
            "frozen_bytes": s.get("frozen_bytes"),
            "wire": s.get("wire_bytes"),
            "memory": got.memory,
            "difference": diff.read_text() if diff.exists() else "",
            "errors": got.errors if got.code else "",
        }
        print(json.dumps(line), file=f, flush=True)


def succeeded(got: Copied) -> None:
    assert got.code == 0, f"the sender ended with {got.code}: {got.errors}"
    assert got.receiver_code in (None, 0), (
        f"the receiver ended with {got.receiver_code}: {got.errors}"
    )


def bpf_holders() -> list[str]:
    """Processes that have a BPF descriptor open."""
    return [str(fd) for fd, name in open_files() if "bpf" in name]


def open_files() -> Iterator[tuple[Path, str]]:
    """(/proc/PID/fd/N, what it is) of all processes, some of which end meanwhile."""
    for process in os.listdir("/proc"):
        if not process.isdecimal():
            continue
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{process}/fd"):
                fd = Path(f"/proc/{process}/fd/{number}")
                with contextlib.suppress(OSError):
                    yield fd, os.readlink(fd)


def thawed(point: Path) -> bool:
    return not is_frozen(point)


@contextlib.contextmanager
def file_system(device: str, folder: Path, fstype: str = "ext4") -> Iterator[Path]:
    """The device, formatted and mounted."""
    from support import mounted

    quiet = {
        "ext4": ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
        "xfs": ["-q", "-f"],
    }
    run(f"mkfs.{fstype}", *quiet[fstype], device)
    with mounted(device, folder, fstype=fstype) as point:
        yield point
