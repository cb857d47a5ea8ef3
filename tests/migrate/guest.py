# SPDX-License-Identifier: Apache-2.0
"""What runs in the containers of the stand-ins: a process in a freezer cgroup
that appends the same numbers to a file on each of its disks, one after the other,
and goes on from what it finds there."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

NUMBERS = "numbers"
_TREE = Path("/sys/fs/cgroup/freezer")
_PROGRAM = f"""
import os, sys, time
files = [os.open(p + "/{NUMBERS}", os.O_RDWR | os.O_CREAT | os.O_APPEND) for p in sys.argv[1:]]
counts = [len(os.pread(f, 1 << 24, 0).split()) for f in files]
n = min(counts)
left = [f for f, count in zip(files, counts) if count == n < max(counts)] or files
while True:
    for f in left:
        os.write(f, b"%d\\n" % n)
        os.fdatasync(f)
    left = files
    n += 1
    time.sleep(0.005)
"""


class Guest:
    """Of one container of one host, given by the host's folder and its name."""

    def __init__(self, host: Path, name: str) -> None:
        self._v1 = _TREE.is_dir()
        # Of the whole path: two runs of the tests have hosts of the same name.
        own = f"pyploop-{hashlib.sha1(str(host).encode()).hexdigest()[:12]}-{name}"
        self._cgroup = (_TREE if self._v1 else Path("/sys/fs/cgroup")) / own

    def pids(self) -> list[int]:
        try:
            return [int(p) for p in (self._cgroup / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def frozen(self) -> bool:
        if not self._cgroup.exists():
            return False
        if self._v1:
            return (self._cgroup / "freezer.state").read_text() == "FROZEN\n"
        return "frozen 1" in (self._cgroup / "cgroup.events").read_text()

    def freeze(self, frozen: bool) -> None:
        name, words = ("freezer.state", ("THAWED", "FROZEN"))
        if not self._v1:
            name, words = "cgroup.freeze", ("0", "1")
        (self._cgroup / name).write_text(words[frozen])
        while self.frozen() != frozen:
            time.sleep(0.001)

    def launch(self, disks: list[Path], frozen: bool) -> None:
        self._cgroup.mkdir(exist_ok=True)
        if frozen:
            self.freeze(True)
        join = f'echo $$ > {self._cgroup}/cgroup.procs; exec "$@"'
        null = subprocess.DEVNULL
        words = ["sh", "-c", join, "sh", sys.executable, "-c", _PROGRAM, *map(str, disks)]
        subprocess.Popen(words, stdin=null, stdout=null, stderr=null, start_new_session=True)
        while not self.pids():
            time.sleep(0.001)

    def end(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        if self._cgroup.exists():
            self.freeze(False)
        while self.pids():
            time.sleep(0.001)
        if self._cgroup.exists():
            self._cgroup.rmdir()
