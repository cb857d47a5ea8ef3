# SPDX-License-Identifier: Apache-2.0
"""Two hosts, the lines between them, and the tools that copy over these.

The hosts are those of the tests (tests/lab): network namespaces with an sshd each.  A line
has a delay, by a relay in user space (bench/line.py), and a rate, by the kernel's TBF where
it has that, else by the relay.  The relay runs on neither host, so the CPU time of both
hosts is that of the copy.
"""

from __future__ import annotations

import compileall
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import GIB, ROOT, Sample, loop_device, random_file
from lab.hosts import CGROUPS, CLIENT_IP, Host, Lab
from lab.hosts import run as run_quietly

PORT = 2200
NBD_PORT = 10809
HEADERS = 1448 / 1514
"""Part of a TBF's bytes that is TCP's payload, on Ethernet."""
WAIT = 20.0
"""Seconds for a server to listen."""


@dataclass(frozen=True)
class Link:
    """A line.  round_trip: seconds.  rate: bits per second; 0: no limit."""

    name: str
    round_trip: float = 0.0
    rate: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        return self.rate / 8


@dataclass
class Rig:
    """The source is on host a, and the target on host b."""

    lab: Lab
    stack: contextlib.ExitStack
    devices: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    """Kind of data -> the file of its loop device, as host a sees it."""
    sizes: dict[str, int] = field(default_factory=dict)
    line: Link = Link("lan")
    target = "/srv/target"
    seen: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.a, self.b = self.lab.a, self.lab.b
        self.has_tbf = _has_tbf(self.a)
        compileall.compile_dir(str(ROOT / "pyploop"), quiet=2)

    # ---- sources

    def source(self, kind: str, size: int) -> None:
        """noise: random bytes.  2:1: blocks of which a half is zeroes.  sparse: 1/8 of noise
        between holes.  On tmpfs, and cached, so that no disk is measured but the target's."""
        image = self.a.outside("/dev/shm") / f"{kind}.image"
        if kind == "sparse":
            _sparse(image, size)
        else:
            random_file(image, size)
        if kind == "2:1":
            _halve(image)
        self.images[kind] = f"/dev/shm/{image.name}"
        self.devices[kind] = self.stack.enter_context(loop_device(image))
        self.sizes[kind] = size

    # ---- lines

    @contextlib.contextmanager
    def over(self, line: Link) -> Iterator[None]:
        """The hosts reach each other over this line, as `peer-a` and `peer-b`."""
        with contextlib.ExitStack() as stack:
            if line.rate and self.has_tbf:
                for host in (self.a, self.b):
                    stack.enter_context(_limited(host, line.rate))
            names = ""
            for n, host in enumerate((self.a, self.b)):
                if line.round_trip or (line.rate and not self.has_tbf):
                    stack.enter_context(self._relay(PORT + n, host, line))
                    where = f"HostName {CLIENT_IP}\n  Port {PORT + n}"
                else:
                    where = f"HostName {host.address}"
                names += f"Host peer-{host.name}\n  {where}\n  HostKeyAlias {host.address}\n"
            config = self.lab.folder / "ssh_config"
            before = config.read_text()
            config.write_text(names + before)  # in place: it is bind-mounted
            stack.callback(config.write_text, before)
            stack.callback(setattr, self, "line", self.line)
            self.line = line
            yield

    @contextlib.contextmanager
    def _relay(self, port: int, host: Host, line: Link) -> Iterator[None]:
        words = [sys.executable, str(ROOT / "bench" / "line.py")]
        words += ["--listen", f"{CLIENT_IP}:{port}", "--to", f"{host.address}:22"]
        words += ["--round-trip", str(line.round_trip)]
        if not self.has_tbf and line.rate:
            words += ["--rate", str(line.bytes_per_s)]
        with _running(self.lab.on_client(*words)) as process:
            _listens(lambda: run_quietly(self.lab.on_client("ss", "-Htln")), port, process)
            yield

    @property
    def payload(self) -> float:
        """Bytes of TCP's payload per second that the line can carry; 0: no limit."""
        return self.line.bytes_per_s * (HEADERS if self.has_tbf else 1.0)

    # ---- tools

    def push(self, kind: str, *options: str) -> Sample:
        words = [self.devices[kind], f"peer-b:{self.target}"]
        return self._pyploop(self.a, kind, words, options)

    def pull(self, kind: str, *options: str) -> Sample:
        words = [f"peer-a:{self.devices[kind]}", self.target]
        return self._pyploop(self.b, kind, words, options)

    def _pyploop(
        self, host: Host, kind: str, words: Sequence[str], options: Sequence[str]
    ) -> Sample:
        summary = host.folder / "summary"
        command = ["pyploop", "-v4", "copy", *words, "--json", str(summary), *options]
        sample, done = self._timed(host.command(*command), kind)
        events = [json.loads(line) for line in summary.read_text().splitlines()]
        s = next(e for e in events if e["event"] == "summary")
        sample["first_pass"] = s["first_pass"]
        sample["first_mb_per_s"] = round(s["data_bytes"] / s["first_pass"] / 1e6, 2)
        sample["wire_share"] = round(s["wire_bytes"] / max(s["data_bytes"], 1), 4)
        sample["streams"] = 1 + done.count("takes part")
        if self.line.rate:
            # The whole command, and from the first byte to the last one before the rounds.
            sent = s["data_bytes"]
            sample["of_line"] = round(sent / sample["seconds"] / self.line.bytes_per_s, 4)
            sample["first_of_line"] = round(sent / s["first_pass"] / self.line.bytes_per_s, 4)
        return sample

    def pipe(self, kind: str) -> Sample:
        """The pipe of docs/how-to/copy-over-ssh.md, with a way back."""
        device, back = self.devices[kind], self.a.folder / "back"
        script = (
            f"set -o pipefail; rm -f {back}; mkfifo {back}; exec 4<>{back}; "
            f"pyploop -v-1 copy -s {device} -f 4 | "
            f"ssh peer-b pyploop -v-1 copy -d {self.target} -f 1 >{back}"
        )
        return self._timed(self.a.command("bash", "-c", script), kind)[0]

    def dd(self, kind: str) -> Sample:
        script = (
            f"set -o pipefail; dd if={self.devices[kind]} iflag=direct bs=1M status=none | "
            f"ssh peer-b dd of={self.target} bs=1M conv=fdatasync status=none"
        )
        return self._timed(self.a.command("bash", "-c", script), kind)[0]

    def rsync(self, kind: str) -> Sample:
        words = ["rsync", "-W", "-S", "--fsync", self.images[kind], f"peer-b:{self.target}"]
        return self._timed(self.a.command(*words), kind)[0]

    def nbdcopy(self, kind: str) -> Sample:
        """Over TLS, with a key that both know."""
        keys = self.lab.folder / "keys.psk"
        if not keys.exists():
            run_quietly(["psktool", "-u", "bench", "-p", str(keys)])
        self.b.run("truncate", "-s", self.sizes[kind], self.target)
        words = [
            "nbdkit",
            "-f",
            "--exit-with-parent",
            "-p",
            str(NBD_PORT),
            "--tls=require",
            f"--tls-psk={keys}",
        ]
        uri = f"nbds://bench@{self.b.address}:{NBD_PORT}/?tls-psk-file={keys}"
        with _running(self.b.command(*words, "file", self.target)) as server:
            _listens(lambda: self.b.run("ss", "-Htln"), NBD_PORT, server)
            copy = ["nbdcopy", "--flush", self.devices[kind], uri]
            return self._timed(self.a.command(*copy), kind)[0]

    # ---- around them

    def _timed(self, command: Sequence[str], kind: str) -> tuple[Sample, str]:
        """Also what it has printed."""
        before = _cpu(self.a) + _cpu(self.b)
        began = time.monotonic()
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - began
        if done.returncode:
            raise RuntimeError(f"{command!r} ended with {done.returncode}: {done.stderr}")
        cpu = _cpu(self.a) + _cpu(self.b) - before
        sample = {
            "seconds": round(seconds, 4),
            "mb_per_s": round(self.sizes[kind] / seconds / 1e6, 2),
            "cpu_per_gib": round(cpu / (self.sizes[kind] / GIB), 4),
        }
        return sample, done.stdout + done.stderr

    def case(self, name: str, kind: str, tool: Callable[[], Sample]) -> Sample:
        """One run of one tool into a new file, compared the first time."""
        target = self.b.outside(self.target)
        target.unlink(missing_ok=True)
        run_quietly(["sync"], timeout=600)
        try:
            sample = tool()
            if (name, kind) not in self.seen:
                run_quietly(["cmp", self.devices[kind], str(target)], timeout=600)
                self.seen.add((name, kind))
        finally:
            target.unlink(missing_ok=True)
        return sample


def missing(tool: str) -> str:
    """Why a tool of others cannot run here; empty: it can."""
    packages = {"rsync": "rsync", "nbdcopy": "libnbd-bin", "nbdkit": "nbdkit"}
    packages["psktool"] = "gnutls-bin"
    needed = ("nbdcopy", "nbdkit", "psktool") if tool == "nbdcopy" else (tool,)
    absent = [packages[name] for name in needed if name in packages and not shutil.which(name)]
    return f"needs the Debian package {' and '.join(absent)}" if absent else ""


def _cpu(host: Host) -> float:
    """CPU seconds of all that has run on the host."""
    for usage in CGROUPS.glob(f"*/{host.cgroup}/cpuacct.usage"):
        return int(usage.read_text()) / 1e9
    for stat in CGROUPS.glob(f"*/{host.cgroup}/cpu.stat"):
        fields = dict(line.split() for line in stat.read_text().splitlines())
        if "usage_usec" in fields:
            return int(fields["usage_usec"]) / 1e6
    raise RuntimeError(f"no cgroup counts the CPU time of host {host.name}")


_TBF = ("tc", "qdisc", "replace", "dev", "up0", "root", "tbf")


def _has_tbf(host: Host) -> bool:
    try:
        with _limited(host, 1e9):
            return True
    except RuntimeError:
        return False


@contextlib.contextmanager
def _limited(host: Host, rate: float) -> Iterator[None]:
    """What the host sends.  The burst is some milliseconds, which a busy machine needs."""
    burst = max(int(rate / 8 * 0.004), 128 * 1024)
    host.run(*_TBF, "rate", f"{int(rate)}bit", "burst", str(burst), "latency", "50ms")
    try:
        yield
    finally:
        host.run("tc", "qdisc", "del", "dev", "up0", "root")


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


def _listens(listeners: Callable[[], str], port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT
    while f":{port} " not in listeners():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} does not listen")
        time.sleep(0.02)


def _halve(path: Path) -> None:
    """Half of each block of 4 KiB becomes zeroes."""
    with path.open("r+b") as f:
        for at in range(0, path.stat().st_size, 1 << 20):
            f.seek(at)
            data = bytearray(f.read(1 << 20))
            for block in range(0, len(data), 4096):
                data[block + 2048 : block + 4096] = bytes(2048)
            f.seek(at)
            f.write(data)


def _sparse(path: Path, size: int) -> None:
    """Every eighth 16 MiB are data, the rest holes."""
    step = 16 << 20
    random_file(path, step)
    data = path.read_bytes()
    with path.open("r+b") as f:
        f.truncate(size)
        for at in range(0, size, 8 * step):
            f.seek(at)
            f.write(data[: min(step, size - at)])


def forecast(rig: Rig, kind: str) -> dict[str, Any]:
    """What `pyploop bench` says about a copy of the source."""
    words = ["pyploop", "-v-1", "bench", "--json", rig.devices[kind], "peer-b:/srv"]
    done = run_quietly(rig.a.command(*words), timeout=600)
    return dict(json.loads(done)["copy"])
