# SPDX-License-Identifier: Apache-2.0
"""runc, started while the container still runs.

runc needs as long to start, and to ask CRIU for its version, as CRIU needs for a small
container.  So `runc checkpoint` and `runc restore` are started ahead, with a program of ours
(criu_gate.py) in CRIU's place.  It starts CRIU, and waits with runc's request until the
container is suspended, or until its images are there.  A restore waits twice: first until the
disks are there, which runc then mounts, and then until the images are.

If this process ends, the one that waits fails.  runc then ends, and has changed nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pyploop.runtimes.runc import criu_gate
from pyploop.system.commands import Command

FOLDER = "early"
"""Beside the images."""
STOPPING = 10.0
"""Seconds for a runc that was given up to end."""
_SCRIPT = """#!/bin/sh
exec {python} -I -S {gate} {folder} {what} {criu} "$@"
"""


class Early:
    """At most one command of runc's, that waits."""

    def __init__(self) -> None:
        self.argv: list[str] = []
        """The command, as it would be without waiting."""
        self._command: Command | None = None
        self._listening: socket.socket | None = None
        self._line: socket.socket | None = None
        self._starts = 0
        self.kind = 0
        """Of the request that waits (criu_gate.py)."""
        self.advanced = False
        """Whether it has gone on once."""
        self.agreed: Path | None = None
        """A file: when it is there, a restored container runs even if this process has ended
        (criu_gate.py)."""

    def start(
        self,
        beside: Path,
        what: Literal["dump", "restore"],
        argv: Sequence[str],
        criu: str,
        keep_fds: Sequence[int],
        *,
        silent: bool = False,
        groups: Sequence[int] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Returns why it cannot be started now; empty when it was.  beside: the folder of the
        images.  argv: the command, with the option `--criu` and the word `criu`.  The rest is as
        for Command."""
        if os.statvfs(beside).f_flag & os.ST_NOEXEC:
            return f"{beside.parent} is mounted noexec"
        self._starts += 1
        folder = beside.with_name(f"{FOLDER}-{self._starts}")
        try:
            folder.mkdir(mode=0o700)
            script = self._write(folder, what, criu)
            if self.agreed is not None:
                (folder / criu_gate.AGREED).symlink_to(self.agreed)
            self._listen(folder)
            waiting = list(argv)
            waiting[waiting.index("--criu") + 1] = str(script)
            self._command = Command(waiting, keep_fds, silent=silent, env=env, groups=groups)
        except OSError as e:
            self.drop()
            return f"{e.filename or folder}: {e.strerror}"
        self.argv = list(argv)
        return ""

    def _write(self, folder: Path, what: str, criu: str) -> Path:
        script = folder / "criu"
        text = _SCRIPT.format(
            folder=shlex.quote(str(folder)),
            criu=shlex.quote(criu),
            python=shlex.quote(sys.executable),
            gate=shlex.quote(str(Path(criu_gate.__file__))),
            what=what,
        )
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(script, flags, 0o700), "w") as f:
            f.write(text)
        return script

    def _listen(self, folder: Path) -> None:
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        at = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        try:
            self._listening.bind(f"/proc/self/fd/{at}/{criu_gate.LINE}")
        finally:
            os.close(at)
        self._listening.listen()

    def ready(self, timeout: float) -> bool:
        """Wait until it waits.  False when it has ended instead.  TimeoutError."""
        deadline = time.monotonic() + timeout
        while self._command is not None and self._listening is not None and self._line is None:
            if self._command.ended():
                return False
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"it did not ask CRIU for anything within {timeout:g} s")
            # On a kernel without pidfds its end is looked for.
            poll = select.poll()
            poll.register(self._listening, select.POLLIN)
            if self._command.end_fd is not None:
                poll.register(self._command.end_fd, select.POLLIN)
            wait = min(left, 0.05 if self._command.end_fd is None else 60.0)
            if self._listening.fileno() in dict(poll.poll(wait * 1000)):
                self._line = self._listening.accept()[0]
                self._line.settimeout(STOPPING)
                self.kind = (self._line.recv(1) or b"\0")[0]
        return self._line is not None

    def advance(self) -> None:
        """After `ready`: let it go on until it asks CRIU for the next thing.  It waits then
        until `go`, after another `ready`."""
        assert self._line is not None
        with self._line, contextlib.suppress(OSError):  # as in `go`
            self._line.send(criu_gate.GO)
        self._line, self.kind = None, 0
        self.advanced = True

    def go(self) -> tuple[Command, socket.socket]:
        """After `ready`: let it go on to its end.  The caller waits for it, closes the socket,
        and answers there when a restore asks (criu_gate.ASKS)."""
        assert self._command is not None and self._line is not None
        with contextlib.suppress(OSError):  # it has ended: its status says so
            self._line.send(criu_gate.GO)
        command, self._command = self._command, None
        line, self._line = self._line, None
        self.drop()
        return command, line

    def drop(self, patience: float = STOPPING) -> tuple[int, str] | None:
        """End the one that waits; kill it after `patience` seconds.  Returns how it has ended
        (as Command.wait), or None when there is none."""
        for line in (self._line, self._listening):
            if line is not None:
                line.close()
        self._line = self._listening = None
        self.argv, self.advanced = [], False
        command, self._command = self._command, None
        if command is None:
            return None
        try:
            return command.wait(patience)
        except TimeoutError as e:
            return -1, str(e)
