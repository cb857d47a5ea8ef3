#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A container of nobody's runtime, for `runtime = "command"`: a process in a
freezer cgroup that appends the same numbers to a file on each of its two disks.

    anyhost.py HOST STEP        HOST/one and HOST/two are the mount points
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

GUEST = """
import os, sys, time
files = [os.open(p + "/numbers", os.O_RDWR | os.O_CREAT | os.O_APPEND) for p in sys.argv[1:]]
n = len(os.pread(files[1], 1 << 24, 0).split())
if len(os.pread(files[0], 1 << 24, 0).split()) > n:  # frozen between the two
    os.write(files[1], b"%d\\n" % n)
    n += 1
while True:
    for f in files:
        os.write(f, b"%d\\n" % n)
        os.fdatasync(f)
    n += 1
    time.sleep(0.005)
"""


class Guest:
    def __init__(self, host: Path) -> None:
        self.host = host
        tree = Path("/sys/fs/cgroup/freezer")
        self.v1 = tree.is_dir()
        own = f"pyploop-any-{host.parent.name}-{host.name}"
        self.cgroup = (tree if self.v1 else Path("/sys/fs/cgroup")) / own

    def pids(self) -> list[int]:
        try:
            return [int(p) for p in (self.cgroup / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def frozen(self) -> bool:
        if self.v1:
            return (self.cgroup / "freezer.state").read_text() == "FROZEN\n"
        return "frozen 1" in (self.cgroup / "cgroup.events").read_text()

    def freeze(self, frozen: bool) -> None:
        name, words = ("freezer.state", ("THAWED", "FROZEN"))
        if not self.v1:
            name, words = "cgroup.freeze", ("0", "1")
        (self.cgroup / name).write_text(words[frozen])
        while self.frozen() != frozen:
            time.sleep(0.001)

    def launch(self, frozen: bool) -> None:
        self.cgroup.mkdir(exist_ok=True)
        if frozen:
            self.freeze(True)
        join = f'echo $$ > {self.cgroup}/cgroup.procs; exec "$@"'
        words = ["sh", "-c", join, "sh", sys.executable, "-c", GUEST]
        null = subprocess.DEVNULL
        subprocess.Popen(
            [*words, str(self.host / "one"), str(self.host / "two")],
            stdin=null,
            stdout=null,
            stderr=null,
            start_new_session=True,
        )
        while not self.pids():
            time.sleep(0.001)

    def end(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        if self.cgroup.exists():
            self.freeze(False)
        while self.pids():
            time.sleep(0.001)
        if self.cgroup.exists():
            self.cgroup.rmdir()


def main(host: str, step: str) -> int:
    g = Guest(Path(host))
    if (g.host / f"{step}-fails").exists():
        print(f"{step} was made to fail", file=sys.stderr)
        return 3
    images = os.environ.get("PYPLOOP_IMAGES", "")
    if step == "status":
        there = g.pids() or (g.host / "one.img").exists()
        state = "suspended" if g.pids() and g.frozen() else "running" if g.pids() else "stopped"
        print(state if there else "absent")
    elif step == "suspend":
        g.freeze(True)
    elif step in ("resume", "resume_restored"):
        g.freeze(False)
    elif step == "dump":
        Path(images, "memory").write_text(os.environ["PYPLOOP_CONTAINER"])
    elif step == "undump":
        assert Path(images, "memory").read_text() == os.environ["PYPLOOP_CONTAINER"]
        g.launch(frozen=True)
    elif step in ("kill", "abandon", "stop"):
        g.end()
    elif step == "start":
        g.launch(frozen=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
