# SPDX-License-Identifier: Apache-2.0
"""One ssh process whose stdin and stdout are a connection to a program on another host.

Nobody is asked for a password or to accept a host key: ssh runs with BatchMode, and host
keys are checked as ssh_config says.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pyploop.system import descriptors, signals
from pyploop.system.stderr_tail import LastWords
from pyploop.transport import deadlines
from pyploop.transport.ssh_cipher import without_kex
from pyploop.wire import mux as wire

T = TypeVar("T")

LONGEST_OUTPUT = 1000
"""Characters of the output of ssh and the other host that go into a message."""
ENDED = 0.5
"""Seconds for ssh to end after its connection, so that its exit status is known."""
OPTIONS = (
    "-T",
    # The other host gets no keys of the user's ssh agent, no display, no tickets, and no
    # forwarding back to us.  These options overrule ssh_config; the first three overrule
    # --ssh, too.
    *("-a", "-x", "-k", "-oClearAllForwardings=yes"),
    *("-oTunnel=no", "-oPermitLocalCommand=no", "-oRemoteCommand=none"),
    # It must not write keys into our known_hosts.
    "-oUpdateHostKeys=no",
    "-oBatchMode=yes",
    "-oConnectTimeout=15",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=4",
)


class NoHelloError(Exception):
    """What was waited for did not come.  `str` says why."""


class Ssh:
    """`rfd` and `wfd` are the connection.  Call `close` on every path."""

    def __init__(
        self, host: str, ssh: Sequence[str], options: Sequence[str], program: Sequence[str]
    ) -> None:
        """ssh: program and arguments.  options: the user's options for ssh, which come
        before ours.  program: the command on the host, as words.  OSError when ssh cannot
        be run."""
        self._errors = LastWords()
        # ssh passes one string to the login shell there, so it is quoted for a shell.
        command = [*ssh, *options, *OPTIONS, "--", host, shlex.join(program)]
        try:
            self._process = signals.begun(
                lambda: subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors.fd,
                    # A ^C must not end ssh before the other host has undone its part.
                    start_new_session=True,
                ),
                lambda process: process.terminate(),
            )
        except BaseException:
            self._errors.close()
            raise
        self._errors.started()
        assert self._process.stdin is not None and self._process.stdout is not None
        self.wfd, self.rfd = self._process.stdin.fileno(), self._process.stdout.fileno()
        for fd in (self.wfd, self.rfd):
            descriptors.enlarge_pipe(fd)

    def wait_for(
        self,
        find: Callable[[bytes], T | None],
        what: str,
        piece: int = 4096,
        gone: Callable[[], bool] = bool,
    ) -> tuple[T, bytes]:
        """Read until `find` finds its line, whatever the login shell prints before it.
        Returns what it has found, and all that was read.  piece: bytes of a read; with 1
        nothing is read beyond that line.  what: that which answers.  NoHelloError; or `gone`
        says that it is not needed any more."""
        deadline = time.monotonic() + deadlines.CONNECT
        data = b""
        while (found := find(data)) is None:
            if len(data) > wire.HELLO_LIMIT:
                raise NoHelloError(
                    f"the login shell there prints more than {wire.HELLO_LIMIT >> 10} KiB"
                )
            left = deadline - time.monotonic()
            if gone():
                raise NoHelloError("it is not needed any more")
            if left <= 0:
                raise NoHelloError(f"no answer within {deadlines.CONNECT:g} s")
            if not descriptors.readable(self.rfd, min(left, descriptors.POLL_SLICE)):
                continue
            part = os.read(self.rfd, piece)
            if not part:
                raise NoHelloError(f"the connection ended before {what} answered")
            data += part
        return found, data

    def printed(self, wait: float = 0.0) -> str:
        """The end of the output of ssh and the other host on stderr, as one line.  wait:
        seconds for ssh to end, so that it is complete."""
        if wait:
            self.status(wait)
        text = without_kex(self._errors.text(self._process.poll() is not None))
        return "; ".join(text[-LONGEST_OUTPUT:].split("\n")).strip("; \r")

    @property
    def raw_output(self) -> str:
        """The same with the lines about the key exchange (ssh_cipher.chosen)."""
        return self._errors.text()

    def status(self, wait: float = ENDED) -> int | None:
        """ssh's exit status; None: it has not ended within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(wait)
        return None

    def terminate(self) -> None:
        """End it at once."""
        self._process.terminate()

    def close(self, patience: float) -> None:
        """Close our end of its input, and wait until the other host has ended its output, at
        most so many seconds."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        if process.stdin.closed:
            return
        process.stdin.close()
        deadline = time.monotonic() + patience
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                if descriptors.readable(self.rfd, descriptors.POLL_SLICE) and not os.read(
                    self.rfd, 65536
                ):
                    break
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._errors.close()
