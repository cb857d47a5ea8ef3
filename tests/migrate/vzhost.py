# SPDX-License-Identifier: Apache-2.0
"""Stands in for a host with OpenVZ: vzctl, vzlist, vzcptcheck and ploop by their
documented contract (calls, output, exit codes), called by those names (vzlab.py
makes the programs).

    HOST/etc/vz/vz.conf, conf/ · HOST/private · HOST/root · HOST/lock · HOST/state

A container is guest.py's process; its ploop disk is a raw delta, which is mounted
by a loop device, or it has none (simfs), and its private area is its root, where a
dump leaves a name for a deleted file.  `chkpnt --dump` writes the number it has
reached; `restore --undump` starts the process that goes on from there, frozen.

HOST/state/faults has what goes wrong, as lines of JSON: `step` (its NUMBER-th
call; 0: each), `when` ("before" or "after" it is done) and `action`: an exit
code, `die` (SIGKILL), `hang`, `gate` (wait until HOST/state/gate is gone, having
said so in gate.reached), `kill-caller`, `kill-peer` (SIGKILL of who called, of
the orchestrator).  HOST/state/steps has all steps that were called, in order,
HOST/state/happened those at which something went wrong.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from guest import NUMBERS, Guest

HOST = Path(sys.argv[0]).resolve().parent.parent
STATE = HOST / "state"
SYSTEM, LOCKED, CHECKPOINT, RESTORE, BAD = 3, 9, 16, 17, 20
GLOBAL = ("--quiet", "--verbose", "--skiplock")
IGNORED = ("--dumpfile", "--skip_arpdetect", "--skip-umount")
NOT_RUNNING, RUNNING, NOT_MOUNTED, MOUNTED = 31, 32, 40, 41


class Container(Guest):
    def __init__(self, ctid: str) -> None:
        super().__init__(HOST, ctid)
        self.ctid = ctid
        self.conf = HOST / "etc/vz/conf" / f"{ctid}.conf"
        self.private, self.root = HOST / "private" / ctid, HOST / "root" / ctid
        self.named = self.private / ".deleted_but_open"
        self.delta = self.private / "root.hdd/root.hds"

    def mounted(self) -> bool:
        # Not ismount(): a bind mount has the device number of the folder above.
        text = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
        return any(line.split()[4] == str(self.root) for line in text.splitlines())

    @property
    def simfs(self) -> bool:
        return not self.delta.exists()

    def mount(self) -> None:
        what = ["--bind", self.private] if self.simfs else ["-o", "loop", self.delta]
        subprocess.run(["mount", *map(str, what), str(self.root)], check=True)

    def reached(self) -> int:
        return len((self.root / NUMBERS).read_text().split())


HANG = 60.0
"""Seconds: longer than anybody waits for a command."""


def step_of(name: str, args: list[str]) -> str:
    """What a call is called in the faults: `chkpnt --dump`, `status`, `vzlist -a`."""
    if name != "vzctl":
        return " ".join([name, *(w for w in args if w in ("-a", "version"))])
    words = [w for w in args if w not in (*GLOBAL, *IGNORED)]
    options = [w for w in words[2:] if w.startswith("--")]
    return " ".join([*words[:1], *options[:1]])


def faults(step: str, when: str) -> int:
    """Let happen what is wished for; an exit code, or 0."""
    path = STATE / "faults"
    if not path.exists():
        return 0
    number = (STATE / "steps").read_text().splitlines().count(step)
    for line in path.read_text().splitlines():
        wish = json.loads(line)
        here = wish["step"] == step and wish["when"] == when and wish["number"] in (0, number)
        if not here:
            continue
        with (STATE / "happened").open("a") as f:
            f.write(step + "\n")
        if code := happen(wish["action"]):
            return code
    return 0


def happen(action: str) -> int:
    if action == "kill-caller":
        os.kill(os.getppid(), signal.SIGKILL)
    elif action == "kill-peer":
        for lock in HOST.parent.glob("*/lock/*.lck"):
            os.kill(int(lock.read_text()), signal.SIGKILL)
    elif action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        time.sleep(HANG)
    elif action == "gate":
        (STATE / "gate.reached").touch()
        deadline = time.monotonic() + HANG
        while (STATE / "gate").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
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
        if c.simfs:
            c.named.write_text(str(c.reached()))
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
        if c.simfs:
            if not c.named.exists() or c.named.read_text() != str(dump["reached"]):
                return RESTORE
            c.named.unlink()
        c.launch([c.root], frozen=True)
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
    while args and args[0] in GLOBAL:
        skiplock |= args.pop(0) == "--skiplock"
    if len(args) < 2:
        return BAD
    command, ctid, *rest = args
    c = Container(ctid)
    steps = [w for w in rest if w.startswith("--") and w not in IGNORED]
    step = steps[0] if steps else ""
    file = rest[rest.index("--dumpfile") + 1] if "--dumpfile" in rest else None
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
        c.launch([c.root], frozen=False)
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


def act(name: str, args: list[str]) -> int:
    if name == "vzctl":
        return vzctl(args)
    if name == "vzlist":
        return vzlist(args)
    if name == "vzcptcheck":
        print((STATE / "checkpoint").read_text() if (STATE / "checkpoint").exists() else "7")
    return 0


def main() -> int:
    name, args = Path(sys.argv[0]).name, sys.argv[1:]
    step = step_of(name, args)
    for log, text in (("calls", " ".join([name, *args])), ("steps", step)):
        with (STATE / log).open("a") as f:
            f.write(text + "\n")
    return faults(step, "before") or act(name, args) or faults(step, "after")
