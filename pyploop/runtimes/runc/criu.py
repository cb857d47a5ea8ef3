# SPDX-License-Identifier: Apache-2.0
"""CRIU itself: its version, whether it works on this kernel, and what it asks during a
restore."""

from __future__ import annotations

import re
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.runc import criu_gate
from pyploop.system import private_folder
from pyploop.system.commands import Command, last_words, run

OLDEST = (4, 2)
PROBE_TIMEOUT = 30.0


def version(criu: str) -> tuple[int, ...]:
    """(major, minor).  MigrateError(14) when it cannot be run or is too old."""
    output = run([criu, "--version"], VzExitCode.NO_KERNEL, PROBE_TIMEOUT)
    found = re.search(r"Version:\s*(\d+)\.(\d+)", output)
    if not found:
        raise MigrateError(
            VzExitCode.NO_KERNEL,
            f"{criu} --version printed {last_words(output)!r}, which names no version",
        )
    result = int(found[1]), int(found[2])
    if result < OLDEST:
        raise MigrateError(
            VzExitCode.NO_KERNEL,
            f"{criu} has the version {result[0]}.{result[1]}; {OLDEST[0]}.{OLDEST[1]} or newer is "
            "needed",
        )
    return result


def probe(criu: str) -> None:
    """`criu check`, and a dump of a process with an inet socket: some versions pass the
    check and fail that.  MigrateError(14) says what failed."""
    run([criu, "check"], VzExitCode.NO_KERNEL, PROBE_TIMEOUT)
    with private_folder.scratch() as folder, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        sleeper = subprocess.Popen(
            [shutil.which("sleep") or "sleep", "60"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listening.fileno()],
            start_new_session=True,
        )
        try:
            command = [criu, "dump", "-t", str(sleeper.pid), "-D", str(folder)]
            command += ["--network-lock", "skip"]
            run(command, VzExitCode.NO_KERNEL, PROBE_TIMEOUT)
        finally:
            sleeper.kill()
            sleeper.wait()


def errors_of(log: Path) -> str:
    """The errors in CRIU's log, as one line of 400 characters at most."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "; ".join(x.split(") ", 1)[-1].strip() for x in lines if "Error" in x)[-400:]


class Restoring:
    """A restore that runs, and asks before the container gets its network back and runs.  What
    stands between runc and CRIU (criu_gate.py) ends the half-restored container, which has not
    run yet, when the answer is no, or when this process is gone."""

    def __init__(self, unlock: Callable[[], None]) -> None:
        """unlock: called before the network is unlocked.  When it raises, the answer is no."""
        self._unlock = unlock
        self.refusal: BaseException | None = None
        self.unlocked = False

    def serve(self, command: Command, line: socket.socket, timeout: float) -> tuple[int, str]:
        """Answer until the command has ended.  line: where it asks.  Returns and raises as
        `Command.wait`."""
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(line, select.POLLIN)
        if command.end_fd is not None:
            poll.register(command.end_fd, select.POLLIN)
        while not command.ended() and (left := deadline - time.monotonic()) > 0:
            came = dict(poll.poll(2 if command.end_fd is None else min(left * 1000, 1 << 30)))
            if line.fileno() in came and not self._answer(line):
                poll.unregister(line)
        return command.wait(max(deadline - time.monotonic(), 0.1))

    def _answer(self, line: socket.socket) -> bool:
        """False: nothing is asked any more."""
        try:
            step = line.recv(64).decode(errors="replace")
            if step:
                line.send(criu_gate.GO if self._allow(step) else criu_gate.NO)
        except OSError:
            return False
        return bool(step)

    def _allow(self, step: str) -> bool:
        try:
            if step == "network-unlock":
                self._unlock()
                self.unlocked = True
        except BaseException as e:
            self.refusal = e
            return False
        return True
