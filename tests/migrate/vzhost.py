#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Stands in for a host with OpenVZ: vzctl, vzlist, vzcptcheck and ploop by their
documented contract (calls, output, exit codes), called by those names.

    HOST/etc/vz/vz.conf, conf/ · HOST/private · HOST/root · HOST/lock · HOST/state

A container is a process in a freezer cgroup that appends numbers to a file on
its ploop disk, a raw delta which is mounted by a loop device.  `chkpnt --dump`
writes the number it has reached; `restore --undump` starts the process that
goes on from there, frozen.  HOST/state/faults has lines `STEP ACTION`: an exit
code, or `kill-caller`, `kill-peer` (SIGKILL of who called, of the orchestrator).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HOST = Path(__file__).resolve().parent.parent
STATE = HOST / "state"
SYSTEM, LOCKED, CHECKPOINT, RESTORE, BAD = 3, 9, 16, 17, 20
IGNORED = ("--dumpfile", "--skip_arpdetect", "--skip-umount")
NOT_RUNNING, RUNNING, NOT_MOUNTED, MOUNTED = 31, 32, 40, 41
GUEST = """
import os, sys, time
f = os.open(sys.argv[1] + "/numbers", os.O_RDWR | os.O_CREAT | os.O_APPEND)
text = os.pread(f, 1 << 24, 0)
n = len(text.split())
while True:
    os.write(f, b"%d\\n" % n)
    os.fdatasync(f)
    n += 1
    time.sleep(0.005)
"""


class Container:
    def __init__(self, ctid: str) -> None:
        self.ctid = ctid
        self.conf = HOST / "etc/vz/conf" / f"{ctid}.conf"
        self.private, self.root = HOST / "private" / ctid, HOST / "root" / ctid
        self.delta = self.private / "root.hdd/root.hds"
        tree = Path("/sys/fs/cgroup/freezer")
        self.v1 = tree.is_dir()
        own = f"pyploop-vz-{HOST.parent.name}-{HOST.name}-{ctid}"
        self.cgroup = (tree if self.v1 else Path("/sys/fs/cgroup")) / own

    def pids(self) -> list[int]:
        try:
            return [int(p) for p in (self.cgroup / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def mounted(self) -> bool:
        return os.path.ismount(self.root)

    def freeze(self, frozen: bool) -> None:
        if self.v1:
            word = "FROZEN" if frozen else "THAWED"
            (self.cgroup / "freezer.state").write_text(word)
        else:
            (self.cgroup / "cgroup.freeze").write_text("1" if frozen else "0")
        while self.frozen() != frozen:
            time.sleep(0.001)

    def frozen(self) -> bool:
        if not self.cgroup.exists():
            return False
        if self.v1:
            return (self.cgroup / "freezer.state").read_text() == "FROZEN\n"
        return "frozen 1" in (self.cgroup / "cgroup.events").read_text()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.delta), str(self.root)], check=True)

    def launch(self, frozen: bool) -> None:
        self.cgroup.mkdir(exist_ok=True)
        if frozen:
            self.freeze(True)
        join = f'echo $$ > {self.cgroup}/cgroup.procs; exec "$@"'
        null = subprocess.DEVNULL
        words = ["sh", "-c", join, "sh", sys.executable, "-c", GUEST, str(self.root)]
        subprocess.Popen(words, stdin=null, stdout=null, stderr=null, start_new_session=True)
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

    def reached(self) -> int:
        return len((self.root / "numbers").read_text().split())


def fault(step: str) -> int:
    """An exit code that is wished for; 0: none."""
    path = STATE / "faults"
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, action = line.partition(" = ")
        if name != step:
            continue
        if action == "kill-caller":
            os.kill(os.getppid(), signal.SIGKILL)
        elif action == "kill-peer":
            for lock in HOST.parent.glob("*/lock/*.lck"):
                os.kill(int(lock.read_text()), signal.SIGKILL)
        else:
            return int(action)
    return 0


def chkpnt(c: Container, step: str, file: str | None) -> int:
    if not c.pids():
        return NOT_RUNNING
    if step == "--suspend":
        c.freeze(True)
    elif step == "--resume":
        if not c.frozen():
            return CHECKPOINT
        c.freeze(False)
    elif step == "--dump":
        if file is None or not c.frozen():
            return CHECKPOINT
        Path(file).write_text(json.dumps({"ctid": c.ctid, "reached": c.reached()}))
    elif step == "--kill":
        c.end()
    else:
        return BAD
    return 0


def restore(c: Container, step: str, file: str | None) -> int:
    if step == "--undump":
        if c.pids():
            return RUNNING
        dump = json.loads(Path(file or "").read_text())
        c.mount()
        if dump["ctid"] != c.ctid or c.reached() != dump["reached"]:
            return RESTORE
        c.launch(frozen=True)
    elif step == "--resume":
        if not c.frozen():
            return RESTORE
        c.freeze(False)
    elif step == "--kill":
        c.end()
    else:
        return BAD
    return 0


def vzctl(args: list[str]) -> int:
    skiplock = False
    while args and args[0] in ("--quiet", "--verbose", "--skiplock"):
        skiplock |= args.pop(0) == "--skiplock"
    if len(args) < 2:
        return BAD
    command, ctid, *rest = args
    c = Container(ctid)
    steps = [w for w in rest if w.startswith("--") and w not in IGNORED]
    step = steps[0] if steps else ""
    file = rest[rest.index("--dumpfile") + 1] if "--dumpfile" in rest else None
    if code := fault(" ".join(w for w in (command, step) if w)):
        return code
    if command == "status":
        there = "exist" if c.conf.exists() and c.private.is_dir() else "deleted"
        state = "running" if c.pids() else "down"
        mounted = "mounted" if c.mounted() else "unmounted"
        print(f"CTID {ctid} {there} {mounted} {state}" + (" suspended" if c.frozen() else ""))
        return 0
    if not skiplock and (HOST / "lock" / f"{ctid}.lck").exists():
        return LOCKED
    if command == "chkpnt":
        return chkpnt(c, step, file)
    if command == "restore":
        return restore(c, step, file)
    if command == "start":
        if c.pids():
            return RUNNING
        if not c.mounted():
            c.mount()
        c.launch(frozen=False)
    elif command == "stop":
        c.end()
        if "--skip-umount" not in rest:
            subprocess.run(["umount", str(c.root)], check=True)
    elif command == "umount":
        if c.pids():
            return RUNNING
        if not c.mounted():
            return NOT_MOUNTED
        subprocess.run(["umount", str(c.root)], check=True)
    elif command == "destroy":
        if c.mounted():
            return MOUNTED
        subprocess.run(["rm", "-r", str(c.private), str(c.root)], check=True)
        for path in c.conf.parent.glob(f"{ctid}.*"):
            path.unlink()
    else:
        return BAD
    return 0


def vzlist(args: list[str]) -> int:
    if "ip" in args:
        print((STATE / "addresses").read_text() if (STATE / "addresses").exists() else "")
        return 0
    for conf in (HOST / "etc/vz/conf").glob("*.conf"):
        if f'NAME="{args[-1]}"' in conf.read_text():
            print(f"{conf.stem:>10}")
            return 0
    return 1


def main() -> int:
    name, args = Path(sys.argv[0]).name, sys.argv[1:]
    with (STATE / "calls").open("a") as f:
        f.write(" ".join([name, *args]) + "\n")
    if name == "vzctl":
        return vzctl(args)
    if name == "vzlist":
        return vzlist(args)
    if name == "vzcptcheck":
        print((STATE / "checkpoint").read_text() if (STATE / "checkpoint").exists() else "7")
    return 0


if __name__ == "__main__":
    sys.exit(main())
