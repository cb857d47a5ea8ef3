# SPDX-License-Identifier: Apache-2.0
"""The relay of a post-copy migration at its target: a process between `criu lazy-pages` and
the connections to the source (docs/internals/post-copy.md).

It outlives the agent that starts it, in a session of its own.

argv: the descriptor of CRIU's socket; the name of the socket to make in the working folder,
through which the agents of later connections hand over their descriptors; the record of the
lazy restore; CRIU's working folder; seconds without the source after which it gives up.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import syslog
import time
from pathlib import Path

from pyploop.runtimes import lazy_images
from pyploop.runtimes.runc.page_local import INDEX, PROGRESS, LocalPages
from pyploop.runtimes.runc.page_stream import BADLY, WELL, Link, Stream, hurry
from pyploop.runtimes.runc.read_ahead import PagesError, ReadAhead

OUTCOME_SECONDS = 60.0
"""For the guard to say how the daemon has ended."""
IMAGES = "images"
"""A link in CRIU's working folder to the images, once they are there."""
LOOK = 0.05
"""Seconds between two looks for the images."""
LINGER = 20.0
"""For the source to hear that it ended badly.  It finds out in another way, too."""


class TargetRelay:
    """Between `criu lazy-pages` and the connections that the agents hand over."""

    def __init__(self, sock: socket.socket, name: str, record: str, work: str) -> None:
        self._stream, self._criu = Stream(), ReadAhead(sock, self._learn)
        self._record, self._work, self._name = record, work, name
        self._known = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):  # a new migration has a new name
            os.unlink(name)
        before = os.umask(0o177)
        self._listener.bind(name)
        os.umask(before)
        self._listener.listen(8)
        self._progress = os.open(f"{work}/{PROGRESS}", os.O_WRONLY | os.O_CREAT, 0o600)

    def serve(self, timeout: float) -> None:
        stream, criu, noted = self._stream, self._criu, -1
        try:
            while not criu.eof:
                self._learn()
                self._turn(1.0 if self._known else LOOK)
                if criu.answered != noted:
                    noted = criu.answered
                    os.pwrite(self._progress, b"%020d" % noted, 0)
                if stream.peer_ended is not None and criu.drained(stream):
                    # Harmless when the daemon has all: it closes its end itself then.
                    self._say("the page server on the source has ended")
                    break
                if time.monotonic() - stream.heard > timeout:
                    self._say(f"the source could not be reached for {timeout:g} s")
                    break
        except PagesError as e:
            self._say(str(e))
        try:
            if criu.why_not:
                syslog.syslog(syslog.LOG_WARNING, f"no page was read ahead: {criu.why_not}")
            criu.close()
            self._tell(self._outcome(), timeout)
        finally:
            stream.detach()
            with contextlib.suppress(OSError):
                os.unlink(self._name)

    def _learn(self) -> None:
        """Which pages there will be, as soon as the images are there."""
        if self._known or not (images := Path(self._work, IMAGES)).is_symlink():
            return
        self._known = True
        try:
            index = Path(self._work, INDEX)
            local = LocalPages(index) if index.exists() else None
            self._criu.know(lazy_images.lazy_pages(images, local.has if local else None), local)
        except (OSError, ValueError) as e:
            self._criu.why_not = f"the lists of pages cannot be read: {e}"

    def _turn(self, seconds: float) -> None:
        if self._stream.turn(self._criu, [self._listener.fileno()], seconds):
            self._accept()

    def _accept(self) -> None:
        """The connection of an agent, which hands over its standard input and output, and
        stays until they are not needed any more."""
        agent, _ = self._listener.accept()
        agent.settimeout(5)
        fds: list[int] = []
        with contextlib.suppress(OSError):
            fds = socket.recv_fds(agent, 1, 2)[1]
        if len(fds) != 2:
            for fd in fds:
                os.close(fd)
            agent.close()
            return

        def close() -> None:
            for fd in fds:
                os.close(fd)
            agent.close()

        self._stream.attach(Link(fds[0], fds[1], close))

    def _say(self, why: str) -> None:
        with contextlib.suppress(OSError), open(f"{self._work}/why", "x") as f:
            f.write(why)

    def _outcome(self) -> int:
        """As the guard has written it into the record."""
        deadline = time.monotonic() + OUTCOME_SECONDS
        while time.monotonic() < deadline:
            try:
                with open(self._record) as f:
                    state = json.load(f).get("state")
            except (OSError, ValueError):
                return BADLY  # it was stopped before anything ran
            if state in ("complete", "lost"):
                return WELL if state == "complete" else BADLY
            self._stream.turn(self._criu, [], 0.02)
        return BADLY

    def _tell(self, outcome: int, timeout: float) -> None:
        """Until the source knows."""
        stream = self._stream
        stream.end(outcome)
        deadline = time.monotonic() + (timeout if outcome == WELL else LINGER)
        while stream.peer_ended is None and time.monotonic() < deadline:
            self._turn(0.5)


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGPIPE"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    syslog.openlog("pyploop-pages", syslog.LOG_PID, syslog.LOG_DAEMON)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("-1000")
    hurry(os.getpid())
    fd, name, record, work, timeout = sys.argv[1:]
    sock = socket.socket(fileno=int(fd))
    TargetRelay(sock, name, record, work).serve(float(timeout))


if __name__ == "__main__":
    main()
