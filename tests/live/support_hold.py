# SPDX-License-Identifier: Apache-2.0
"""A container to stop: processes in a cgroup of their own that write to a file
system, and say so outside of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from support import wait_until

V1, V2 = Path("/sys/fs/cgroup/freezer"), Path("/sys/fs/cgroup/unified")

WRITER = """
import os, sys
cgroup, point, count = sys.argv[1:]
with open(cgroup + "/cgroup.procs", "w") as f: f.write(str(os.getpid()))
os.fork()
me = os.getpid()
data = os.open(f"{point}/data.{me}", os.O_RDWR | os.O_CREAT)
beat = os.open(f"{count}.{me}", os.O_RDWR | os.O_CREAT)
n = 0
while True:
    os.pwrite(data, os.urandom(4096), n % 256 * 4096)
    os.fsync(data)
    n += 1
    os.pwrite(beat, b"%d" % n, 0)
"""


def hierarchy(version: int) -> Path | None:
    """Where cgroups with a freezer can be made; None: not on this machine."""
    if version == 1:
        return V1 if (V1 / "cgroup.procs").exists() else None
    for root in (V2, Path("/sys/fs/cgroup")):
        if (root / "cgroup.controllers").exists():
            return root
    return None


@contextlib.contextmanager
def cgroup(root: Path, name: str) -> Iterator[Path]:
    """ROOT/pyploop-NAME-PID, thawed, emptied and removed at the end."""
    folder = root / f"pyploop-{name}-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        # From below: a cgroup goes when those in it have gone.
        for found in sorted([folder, *folder.rglob("*")], reverse=True):
            if found.is_dir():
                _remove(found)


def _remove(folder: Path) -> None:
    thaw(folder)

    def gone() -> bool:
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            folder.rmdir()
        except OSError:
            return False
        return True

    wait_until(gone, f"{folder} is empty")


def thaw(folder: Path) -> None:
    if (folder / "freezer.state").exists():
        (folder / "freezer.state").write_text("THAWED")
    elif (folder / "cgroup.freeze").exists():
        (folder / "cgroup.freeze").write_text("0")


def freeze(folder: Path) -> None:
    if (folder / "freezer.state").exists():
        (folder / "freezer.state").write_text("FROZEN")
    else:
        (folder / "cgroup.freeze").write_text("1")
    wait_until(lambda: frozen(folder), f"{folder} is frozen")


def frozen(folder: Path) -> bool:
    if (folder / "freezer.state").exists():
        return (folder / "freezer.state").read_text() == "FROZEN\n"
    return "frozen 1" in (folder / "cgroup.events").read_text()


class Container:
    """Two processes that write 4 KiB and fsync, again and again."""

    def __init__(self, folder: Path, point: Path, beats: Path) -> None:
        self.cgroup, self._beats = folder, beats
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(point), str(beats)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(lambda: len(self.count()) == 2 and self.running(), "the container runs")

    def count(self) -> list[int]:
        """Writes of each process so far, durable ones."""
        texts = [p.read_text() for p in sorted(self._beats.parent.glob(f"{self._beats.name}.*"))]
        return [int(text) for text in texts if text]

    def running(self, seconds: float = 20.0) -> bool:
        """Both go on writing, at some time within so many seconds."""
        before, deadline = self.count(), time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all(b > a for a, b in zip(before, self.count(), strict=True)):
                return True
            time.sleep(0.005)
        return False

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def container(root: Path, name: str, point: Path, beats: Path) -> Iterator[Container]:
    with cgroup(root, name) as folder:
        # Below another cgroup, so that freezing reaches it from above.
        (folder / "inner").mkdir()
        made = Container(folder / "inner", point, beats)
        try:
            yield made
        finally:
            thaw(folder)
            thaw(folder / "inner")
            made.close()
