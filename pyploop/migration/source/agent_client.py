# SPDX-License-Identifier: Apache-2.0
"""The agent on the other host, over one ssh connection.

Nothing here asks a person anything: BatchMode, host keys as ssh_config has them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pyploop import __version__
from pyploop.errors import (
    CancelledError,
    MigrateError,
    ProtocolError,
    PyploopError,
    ReadError,
    VzExitCode,
)
from pyploop.migration import deadlines
from pyploop.migration.mux import INBOX, Mux
from pyploop.report.events import NOTE
from pyploop.system import descriptors
from pyploop.system.stderr_tail import LastWords
from pyploop.units import MIB
from pyploop.wire import channels, messages
from pyploop.wire import mux as wire

EVENT_BYTES = 8 * MIB
"""Bytes of events that are handed on in one connection: they go into a log."""
VALUE = 100
"""Bytes that a value in an event counts for beyond its own."""
LONGEST_OUTPUT = 1000
"""Characters of what ssh and the agent printed that go into a message."""
SSH_OPTIONS = (
    "-T",
    # The target needs nothing of ours: no keys of the user's agent, no display, no
    # tickets, no way back.  These count whatever ssh_config says, and the first three
    # whatever --ssh says, too.
    *("-a", "-x", "-k", "-oClearAllForwardings=yes"),
    *("-oTunnel=no", "-oPermitLocalCommand=no", "-oRemoteCommand=none"),
    # Nor does it write keys into our known_hosts.
    "-oUpdateHostKeys=no",
    "-oBatchMode=yes",
    "-oConnectTimeout=15",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=4",
)
OnEvent = Callable[[str, float, dict[str, Any]], None]
"""An event's name, its moment on the target's clock, and its fields."""


class Remote:
    """An agent at work; a context manager that ends the connection."""

    def __init__(
        self,
        host: str,
        ssh: Sequence[str],
        options: Sequence[str],
        agent: Sequence[str],
        on_event: OnEvent = lambda *_: None,
    ) -> None:
        """ssh: program and arguments; options: of the user's, before ours.
        agent: the command on the target, as words.  MigrateError(4) when there
        is no agent, or one that does not fit."""
        if host.startswith("-"):
            raise MigrateError(1, f"{host!r} is not a host")
        self.host = host
        self._on_event = on_event
        self._lock = threading.Lock()
        self.capabilities: Sequence[str] = ()
        """What of this major version the agent knows, as its answer to `check` says."""
        self._channel = 0
        self._request = 0
        self._event_bytes = 0
        self._errors = LastWords()
        # ssh hands one string to the login shell there: quoted for it here.
        command = [*ssh, *options, *SSH_OPTIONS, "--", host, shlex.join(agent)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors.fd,
                start_new_session=True,  # a ^C is ours to handle
            )
        except OSError as e:
            self._errors.close()
            raise MigrateError(
                VzExitCode.CANNOT_CONNECT, f"cannot run {ssh[0]}: {e.strerror}"
            ) from e
        self._errors.started()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._wfd, self._rfd = self._process.stdin.fileno(), self._process.stdout.fileno()
        for fd in (self._wfd, self._rfd):
            descriptors.enlarge_pipe(fd)
        self._mux: Mux | None = None
        try:
            early = self._greet()
            self._mux = Mux(self._rfd, self._wfd, early)
        except BaseException:
            self._process.terminate()  # nothing was asked of it: nothing is to be undone
            self.close()
            raise

    def _greet(self) -> bytes:
        """Both hellos; returns what came after the peer's."""
        deadline = time.monotonic() + deadlines.CONNECT
        data = b""
        while (peer := wire.find_hello(data)) is None:
            if len(data) > wire.HELLO_LIMIT:
                raise self._no_agent(
                    f"its login shell prints more than {wire.HELLO_LIMIT >> 10} KiB"
                )
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._no_agent(f"no hello within {deadlines.CONNECT:g} s")
            if not descriptors.readable(self._rfd, min(left, descriptors.POLL_SLICE)):
                continue
            part = os.read(self._rfd, 4096)
            if not part:
                raise self._no_agent("the connection ended before its hello")
            data += part
        self.version = peer.version
        if why := wire.mismatch(peer, __version__):
            raise MigrateError(
                VzExitCode.CANNOT_CONNECT, f"the agent on {self.host} does not fit: {why}"
            )
        with contextlib.suppress(BrokenPipeError):  # the next read fails by it
            os.write(self._wfd, wire.hello(__version__))
        return data[peer.end :]

    def _no_agent(self, why: str) -> MigrateError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        printed = self.stderr()
        text = f"no pyploop agent on {self.host}: {why}" + (f" ({printed})" if printed else "")
        return MigrateError(VzExitCode.CANNOT_CONNECT, text)

    def stderr(self) -> str:
        """The end of what ssh and the agent printed, as one line."""
        text = self._errors.text(self._process.poll() is not None)
        return "; ".join(text[-LONGEST_OUTPUT:].split("\n")).strip("; \r")

    # ---- requests

    def call(
        self, op: str, timeout: float, gone: Callable[[], bool] = bool, /, **args: Any
    ) -> dict[str, Any]:
        """One request.  MigrateError as the agent raised it, or PyploopError
        when the connection is dead or the answer late; CancelledError when it is not
        waited for any more (`gone`)."""
        mux = self._live()
        with self._lock:
            self._request += 1
            number = self._request
            try:
                mux.send({"id": number, "op": op, "args": args})
            except PyploopError as e:
                raise self._with_last_words(op, e, str(e)) from e
            deadline = time.monotonic() + timeout
            most = mux.taken + INBOX
            while True:
                before = mux.taken
                message = self._next(mux, op, deadline, timeout, gone)
                if mux.taken > most:
                    mux.end(ProtocolError(f"agent protocol: events without end instead of {op!r}"))
                    raise mux.failure or ReadError("the connection ended")
                if "event" in message:
                    self._hand_on(*messages.event(message), size=mux.taken - before)
                elif message.get("id") == number:
                    break
                # else: the late answer to a request that was given up
        if "error" in message:
            code, text = messages.failure(message["error"])
            raise MigrateError(code, f"{self.host}: {text}")
        return messages.answer(op, message.get("ok"))

    def _hand_on(self, name: str, at: float, fields: dict[str, Any], size: int) -> None:
        within = self._event_bytes <= EVENT_BYTES
        self._event_bytes += size + VALUE * messages.values(fields)
        if self._event_bytes <= EVENT_BYTES:
            self._on_event(name, at, fields)
        elif within:
            text = "it sends too many messages: the rest of them is left out"
            self._on_event("line", at, {"level": NOTE, "text": text})

    def _next(
        self, mux: Mux, op: str, deadline: float, timeout: float, gone: Callable[[], bool]
    ) -> wire.Message:
        while True:
            if gone():
                raise CancelledError(
                    f"{op} on {self.host} was given up: the migration is being ended"
                )
            left = deadline - time.monotonic()
            try:
                # Also when there is a message: one who always has another is late, too.
                if left <= 0 and mux.failure is None:
                    raise ReadError("no answer")
                return mux.receive(min(max(left, 0.0), deadlines.GLANCE))
            except PyploopError as e:
                why = str(e)
                if mux.failure is None:
                    if time.monotonic() < deadline:
                        continue
                    why = f"no answer within {timeout:g} s"
                raise self._with_last_words(op, e, why) from e

    def _with_last_words(self, op: str, error: PyploopError, why: str) -> PyploopError:
        if self._mux is None or self._mux.failure is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(deadlines.LAST_WORDS)
        printed = self.stderr()
        return error.saying(
            f"{op} on {self.host}: {why}" + (f" (it said: {printed})" if printed else "")
        )

    def _live(self) -> Mux:
        if self._mux is None:
            raise MigrateError(
                VzExitCode.CANNOT_CONNECT, f"the connection to {self.host} has ended"
            )
        return self._mux

    def open_channel(self) -> tuple[int, int]:
        """(number for a request, descriptor): the caller closes it.  MigrateError when
        the agent takes no more of them."""
        if self.channels_left < 1:
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"pyploop {self.version} on {self.host} takes no more than {self._channel} "
                "channels in one migration",
            )
        self._channel += 1
        return self._channel, self._live().open(self._channel)

    @property
    def channels_left(self) -> int:
        """How many can still be opened: their numbers are not used again."""
        last = channels.LAST if "channels" in self.capabilities else channels.LAST_OLD
        return last - self._channel

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """What fails in it because the connection is dead says why it is dead."""
        try:
            yield
        except MigrateError:
            raise
        except (PyploopError, OSError) as e:
            cause = self._mux.failure if self._mux is not None else None
            if cause is None or str(cause) in str(e):
                raise
            raise MigrateError(VzExitCode.COPY_FAILED, f"{self.host}: {cause} ({e})") from e

    def cut(self, cause: PyploopError) -> None:
        """From any thread: the connection is given up, and each wait for the
        target fails."""
        if self._mux is not None:
            self._mux.end(cause)

    def alive(self) -> bool:
        """A request would be sent."""
        return self._mux is not None and self._mux.failure is None

    # ---- end

    def close(self) -> None:
        """End the connection; the agent undoes what is not committed, and then
        ends, which is waited for."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        if process.stdin.closed:
            return
        if self._mux is not None:
            # The agent sees our end of stdin, and we see its: that it has undone.
            self._mux.close()
            self._mux = None
        process.stdin.close()
        deadline = time.monotonic() + deadlines.ENDING
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                if descriptors.readable(self._rfd, descriptors.POLL_SLICE) and not os.read(
                    self._rfd, 65536
                ):
                    break
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
