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
            hint="install a newer one (on Debian, `debian/install-host runc` in pyploop's source "
            "does), or write runc.criu into migrate.toml",
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


_HARMLESS = ("rlimit: Can't setup RLIMIT_NOFILE for self",)
"""Errors that CRIU reports where root has no CAP_SYS_RESOURCE, and that it goes on after."""
_MOST = 2000
"""Characters of errors that are shown.  The first ones say why, the last ones what followed."""
_MESSAGE = re.compile(r'level=(?:error|fatal) msg="((?:[^"\\]|\\.)*)"')


def why_failed(criu_log: Path, runc_log: Path, output: str) -> str:
    """Why runc and CRIU have failed, as one line: CRIU's errors, or else runc's, or else the
    end of the command's output."""
    return errors_of(criu_log) or runc_errors_of(runc_log) or last_words(output)


def errors_of(log: Path) -> str:
    """The errors in CRIU's log, as one line."""
    found = [
        re.sub(r"^\(\d+\.\d+\)\s*", "", line).strip()
        for line in _lines(log)
        if "Error (" in line and not any(words in line for words in _HARMLESS)
    ]
    return shortened("; ".join(found))


def runc_errors_of(log: Path) -> str:
    """The errors in runc's log, as one line."""
    found = [m[1].replace('\\"', '"') for line in _lines(log) if (m := _MESSAGE.search(line))]
    return shortened("; ".join(x.replace("\\n", "; ") for x in found))


def _lines(log: Path) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()
    except OSError:
        return []


def shortened(text: str) -> str:
    """Without the middle of a text that is too long."""
    half = _MOST // 2
    return text if len(text) <= _MOST else f"{text[:half]} […] {text[-half:]}"


class Restoring:
    """A restore that runs, and asks before the container gets its network back and runs.  What
    stands between runc and CRIU (criu_gate.py) ends the half-restored container, which has not
    run yet, when the answer is no, or when this process is gone."""

    def __init__(
        self, unlock: Callable[[], None], resume: Callable[[], None] = lambda: None
    ) -> None:
        """unlock: called before the network is unlocked.  resume: before the container runs.
        When one raises, the answer is no."""
        self._unlock, self._resume = unlock, resume
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
            else:
                self._resume()
        except BaseException as e:
            self.refusal = e
            return False
        return True
