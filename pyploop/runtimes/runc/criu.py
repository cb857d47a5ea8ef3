# SPDX-License-Identifier: Apache-2.0
"""CRIU itself: its version, whether it works on this kernel, and the hook that a restore
calls before the container gets its network back and runs.

The hook is a shell script of ours (CRIU's action-script).  It opens this process's
descriptors in /proc, so that it fails at once when this process is gone.  Then, or when
the answer is no, it ends the half-restored container, which has not run yet.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.system import private_folder
from pyploop.system.commands import Command, last_words, run

OLDEST = (4, 2)
PROBE_TIMEOUT = 30.0
_HOOK = """#!/bin/sh
case $CRTOOLS_SCRIPT_ACTION in network-unlock|pre-resume) ;; *) exit 0 ;; esac
if echo "$CRTOOLS_SCRIPT_ACTION" > /proc/{pid}/fd/{say} &&
   read -r answer < /proc/{pid}/fd/{hear} && [ "$answer" = go ]; then exit 0; fi
kill -9 "$CRTOOLS_INIT_PID" "$PPID"
exit 1
"""


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


class Hook:
    """Answers the running restore.  A context manager: at its end the script is removed."""

    def __init__(self, folder: Path, unlock: Callable[[], None]) -> None:
        """unlock: called before the network is unlocked.  When it raises, the answer is no."""
        self._unlock = unlock
        self.refusal: BaseException | None = None
        self.unlocked = False
        self.resuming = False
        """The container may have run since."""
        self._hear_r, self._hear_w = os.pipe2(os.O_CLOEXEC)
        self._say_r, self._say_w = os.pipe2(os.O_CLOEXEC)
        self.script = folder / "hook"
        text = _HOOK.format(pid=os.getpid(), say=self._say_w, hear=self._hear_r)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(self.script, flags, 0o700), "w") as f:
            f.write(text)

    def serve(self, command: Command, timeout: float) -> tuple[int, str]:
        """Answer until the command has ended.  Returns and raises as `Command.wait`."""
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._say_r, select.POLLIN)
        if command.end_fd is not None:
            poll.register(command.end_fd, select.POLLIN)
        while not command.ended() and (left := deadline - time.monotonic()) > 0:
            came = dict(poll.poll(2 if command.end_fd is None else min(left * 1000, 1 << 30)))
            if self._say_r in came:
                for word in os.read(self._say_r, 256).decode().split():
                    os.write(self._hear_w, b"go\n" if self._allow(word) else b"no\n")
        return command.wait(max(deadline - time.monotonic(), 0.1))

    def _allow(self, word: str) -> bool:
        try:
            if word == "network-unlock":
                self._unlock()
                self.unlocked = True
            self.resuming = self.resuming or word == "pre-resume"
        except BaseException as e:
            self.refusal = e
            return False
        return True

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in (self._hear_r, self._hear_w, self._say_r, self._say_w):
            os.close(fd)
        with contextlib.suppress(OSError):
            self.script.unlink()
