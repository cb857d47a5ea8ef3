# SPDX-License-Identifier: Apache-2.0
"""An ssh that runs the command on this host, and can be cut like a connection: run by
`python cut_ssh.py FOLDER SSH'S ARGUMENTS`.

The command is a process of its own, which only sees the ends of its pipes when this one ends.
FOLDER/pids/PID: a connection that is up, `agent` or `lane`.  FOLDER/refuse: none comes about.
FOLDER/cuts/N: where the N-th lane is cut: `up BYTES` (to the other host) or `down BYTES`, and
`one` or `all` of the connections, or `off`: all, and none comes about any more.  What is under
way then is lost.
FOLDER/log/N: what the N-th lane has carried, in bytes up and down.  FOLDER/there/PID: the
processes that it has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path


def cut_all(folder: Path) -> None:
    """All connections that are up, ours last."""
    for pid in [int(p.name) for p in (folder / "pids").iterdir()]:
        (folder / "pids" / str(pid)).unlink(missing_ok=True)
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def number_of(folder: Path) -> int:
    """Of this lane."""
    for number in range(10000):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(folder / "lanes" / str(number), os.O_CREAT | os.O_EXCL))
            return number
    raise AssertionError("too many lanes")


def plan(folder: Path, number: int) -> tuple[str, int, str]:
    """(direction, bytes, which are cut) of this lane."""
    with contextlib.suppress(FileNotFoundError):
        direction, size, which = (folder / "cuts" / str(number)).read_text().split()
        return direction, int(size), which
    return "", 0, ""


def main() -> None:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    if "-G" in words:
        sys.exit(1)
    if (folder / "refuse").exists():
        print("ssh: connect to host: No route to host", file=sys.stderr)
        sys.exit(255)
    lane = "copy-lane" in words[-1]
    number = number_of(folder) if lane else -1
    direction, left, which = plan(folder, number)
    carried = {"up": 0, "down": 0}
    (folder / "pids" / str(os.getpid())).write_text("lane" if lane else "agent")
    there = subprocess.Popen(
        ["sh", "-c", words[-1]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd=os.environ["HOME"],
    )
    (folder / "there" / str(there.pid)).touch()
    assert there.stdin is not None and there.stdout is not None

    def carry(name: str, source: int, target: int) -> None:
        room = left
        with contextlib.suppress(OSError):
            while data := os.read(source, 65536):
                if name == direction:
                    data = data[:room]
                    room -= len(data)
                carried[name] += len(data)
                view = memoryview(data)
                while view:
                    view = view[os.write(target, view) :]
                if name == direction and not room:
                    if which == "off":
                        (folder / "refuse").touch()
                    if which != "one":
                        cut_all(folder)
                    os._exit(255)
        os.close(target)

    ends = [("up", 0, there.stdin.fileno()), ("down", there.stdout.fileno(), 1)]
    threads = [threading.Thread(target=carry, args=one, daemon=True) for one in ends]
    for thread in threads:
        thread.start()
    threads[1].join()
    if lane:
        (folder / "log" / str(number)).write_text(f"{carried['up']} {carried['down']}")
    (folder / "pids" / str(os.getpid())).unlink(missing_ok=True)
    os._exit(there.wait())


if __name__ == "__main__":
    main()
