# SPDX-License-Identifier: Apache-2.0
"""CRIU's dump of a container for a post-copy migration: it ends with everything but the pages
in the images, and serves those over a socket (docs/internals/post-copy.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from pyploop.runtimes.runc.page_stream import CriuSocket, Stream, enlarge

CRIU_SECONDS = 60.0
"""For CRIU to end when its socket is closed."""
FIRST_FD = 100
"""Descriptors for CRIU: below it, runc may have its own."""


class PageDump:
    """Of one container."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair()
        enlarge(self._theirs)
        self.socket = CriuSocket(ours)
        self.status = -1
        """What CRIU says when it serves pages is read from it; -1: nothing more is."""
        self.serving = False
        self._process: subprocess.Popen[bytes] | None = None
        self._log = ""
        self._freeze: tuple[str, str] = ("", "")

    @property
    def started(self) -> bool:
        return self._process is not None

    def start(self, order: dict[str, Any]) -> str:
        """As the orchestrator orders it (page_keeper.py).  Returns why it does not start."""
        sock = fcntl.fcntl(self._theirs.fileno(), fcntl.F_DUPFD, FIRST_FD)
        told, tell = os.pipe2(os.O_CLOEXEC)
        word = fcntl.fcntl(tell, fcntl.F_DUPFD, FIRST_FD)
        os.close(tell)
        self._freeze = (order["freeze"][0], order["freeze"][1])
        self._log = order["log"]
        try:
            with open(order["config"], "x") as f:
                f.write(f"{_own_options(order['env'])}\nps-socket {sock}\n")
            self._process = subprocess.Popen(
                [*order["argv"], "--lazy-pages", "--status-fd", str(word), order["name"]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[sock, word, *order["keep"]],
                env={**order["env"], "CRIU_CONFIG_FILE": order["config"]},
                start_new_session=True,
            )
            self.status = told
        except OSError as e:
            os.close(told)
            return f"{order['argv'][0]}: {e.strerror}"
        finally:
            os.close(sock)
            os.close(word)
            self._theirs.close()
            for fd in order["keep"]:
                with contextlib.suppress(OSError):
                    os.close(fd)
        return ""

    def look(self) -> str:
        """Read the status, and freeze the container when only the pages are left.  Returns why
        it failed; empty: it serves pages."""
        word = os.read(self.status, 1)
        os.close(self.status)
        self.status = -1
        if not word:
            return self._said() or "it ended without a word"
        try:
            with open(self._freeze[0], "w") as f:
                f.write(self._freeze[1])
        except OSError as e:
            return f"cannot freeze it: {self._freeze[0]}: {e.strerror}"
        self.serving = True
        return ""

    def _said(self) -> str:
        """The errors in CRIU's log."""
        try:
            with open(self._log, errors="replace") as f:
                lines = [x.split(") ", 1)[-1].strip() for x in f if "Error" in x]
        except OSError:
            return ""
        return "; ".join(lines)[-400:]

    def end(self, stream: Stream) -> None:
        """Its socket ends, and then it does.  In the midst of a dump it must not be killed:
        that would spoil the container."""
        self.socket.close()
        self._theirs.close()
        if self._process is None:
            return
        deadline = time.monotonic() + CRIU_SECONDS
        while self._process.poll() is None:
            if time.monotonic() > deadline and (self.serving or self.status < 0):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            # The status is not awaited any more.
            stream.turn(self.socket, [], 0.02)


def _own_options(environment: Mapping[str, str]) -> str:
    """What the CRIU_CONFIG_FILE of the dump's environment says, which ours takes the place of."""
    path = environment.get("CRIU_CONFIG_FILE")
    if not path:
        return ""
    with open(path) as f:
        return f.read()
