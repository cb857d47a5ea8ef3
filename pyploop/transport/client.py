# SPDX-License-Identifier: Apache-2.0
"""An agent on another host, over one ssh connection."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

from pyploop import __version__
from pyploop.errors import CancelledError, ProtocolError, PyploopError, ReadError
from pyploop.report.events import NOTE
from pyploop.transport import deadlines
from pyploop.transport.mux import INBOX, Mux
from pyploop.transport.place import is_host
from pyploop.transport.ssh import NoHelloError, Ssh
from pyploop.transport.ssh_cipher import chosen
from pyploop.units import MIB
from pyploop.wire import messages
from pyploop.wire import mux as wire

EVENT_BYTES = 8 * MIB
"""Bytes of events that one connection may add to the log."""
VALUE = 100
"""Bytes that each value in an event counts for in addition to its length."""
OnEvent = Callable[[str, float, dict[str, Any]], None]
"""Called with an event's name, its time on the other host's clock, and its fields."""


class Client(ABC):
    """The connection to an agent; a context manager that ends it.  What its answers mean, and
    which errors it raises, is a subclass's part."""

    def __init__(
        self,
        host: str,
        ssh: Sequence[str],
        options: Sequence[str],
        agent: Sequence[str],
        on_event: OnEvent = lambda *_: None,
        *,
        on_dead: Callable[[PyploopError], None] | None = None,
    ) -> None:
        """ssh: program and arguments.  options: the user's options for ssh, which come
        before ours.  agent: the command on the host, as words.  `unreachable` when no agent
        answers, or one of another version.  on_dead: called once, from any thread, when the
        connection has ended."""
        if not is_host(host):
            raise self.not_a_host(f"{host!r} is not a host name")
        self.host, self.options = host, tuple(options)
        self._on_event = on_event
        self._lock = threading.Lock()
        self.capabilities: Sequence[str] = ()
        """Optional parts of the protocol that the agent knows, by its answer to `check`."""
        self._request = 0
        self._event_bytes = 0
        try:
            self._ssh = Ssh(host, ssh, options, agent)
        except OSError as e:
            error = self.unreachable(
                f"cannot run {ssh[0]} on this host: {e.strerror}", self.install_ssh
            )
            error.path = ssh[0]
            raise error from e
        self._mux: Mux | None = None
        try:
            early = self._greet()
            self.cipher = chosen(self._ssh.raw_output)
            """Of the connection, empty when ssh did not say."""
            self._mux = Mux(self._ssh.rfd, self._ssh.wfd, early, on_dead=on_dead)
        except BaseException:
            self._ssh.terminate()  # no request was sent, so nothing has to be undone
            self.close()
            raise

    def _greet(self) -> bytes:
        """Exchange hellos.  Returns the bytes that came after the peer's."""
        try:
            peer, data = self._ssh.wait_for(wire.find_hello, "the agent")
        except NoHelloError as e:
            status = self._ssh.status()
            raise self.no_agent(str(e), self._ssh.printed(), status) from None
        self.version = peer.version
        if why := wire.mismatch(peer, __version__):
            raise self.unreachable(
                f"cannot work with the pyploop on {self.host}: {why}",
                "install the same version of pyploop on both hosts",
            )
        with contextlib.suppress(BrokenPipeError):  # the next read reports it
            os.write(self._ssh.wfd, wire.hello(__version__))
        return data[peer.end :]

    # ---- errors

    what: str
    """What the connection is for, in messages."""
    not_in_log: Collection[str] = ()
    """Events that `on_event` does not log, so that any number of them may come."""
    install_ssh = "install it"
    """The hint when ssh cannot be run."""

    @abstractmethod
    def not_a_host(self, text: str) -> PyploopError: ...

    @abstractmethod
    def unreachable(self, text: str, hint: str | None = None) -> PyploopError:
        """There is no connection to an agent that could be used."""

    @abstractmethod
    def no_agent(self, why: str, printed: str, status: int | None) -> PyploopError:
        """No hello came.  printed: by ssh and the other host on stderr.  status: ssh's exit
        status; None: it has not ended."""

    @abstractmethod
    def failed_there(self, error: Any) -> PyploopError:
        """The agent reports a failure of its own in an answer."""

    def lost(self, error: PyploopError, op: str, why: str) -> PyploopError:
        """A request was not answered: the connection is dead, or the answer is late."""
        return error.saying(f"the request {op!r} to {self.host} failed: {why}")

    @abstractmethod
    def checked(self, op: str, value: Any) -> dict[str, Any]:
        """The checked answer to a request; ProtocolError."""

    # ---- requests

    def call(
        self, op: str, timeout: float, gone: Callable[[], bool] = bool, /, **args: Any
    ) -> dict[str, Any]:
        """Send one request, and return its answer.  `failed_there`: the agent's own failure.
        PyploopError: the connection is dead, or the answer is late.  CancelledError: `gone`
        says that the answer is not needed any more."""
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
                    mux.end(
                        ProtocolError(
                            f"agent protocol: more than {INBOX >> 20} MiB of events came instead "
                            f"of the answer to {op!r}"
                        )
                    )
                    raise mux.failure or ReadError("the connection to the peer has ended")
                if "event" in message:
                    self._hand_on(*messages.event(message), size=mux.taken - before)
                elif message.get("id") == number:
                    break
                # else: the late answer to a request that is not waited for any more
        if "error" in message:
            raise self.failed_there(message["error"])
        return self.checked(op, message.get("ok"))

    def _hand_on(self, name: str, at: float, fields: dict[str, Any], size: int) -> None:
        if name in self.not_in_log:
            self._on_event(name, at, fields)
            return
        within = self._event_bytes <= EVENT_BYTES
        self._event_bytes += size + VALUE * messages.values(fields)
        if self._event_bytes <= EVENT_BYTES:
            self._on_event(name, at, fields)
        elif within:
            text = "this host sends too many messages: the rest of them is left out"
            self._on_event("line", at, {"level": NOTE, "text": text})

    def _next(
        self, mux: Mux, op: str, deadline: float, timeout: float, gone: Callable[[], bool]
    ) -> wire.Message:
        while True:
            if gone():
                raise CancelledError(
                    f"the request {op!r} to {self.host} was cancelled: {self.what} is being ended"
                )
            left = deadline - time.monotonic()
            try:
                # Even if there is another message: a peer that always sends one more event
                # is late, too.
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
        dead = self._mux is None or self._mux.failure is not None
        printed = self._ssh.printed(deadlines.LAST_WORDS if dead else 0.0)
        return self.lost(error, op, why + (f" (its output: {printed})" if printed else ""))

    def _live(self) -> Mux:
        if self._mux is None:
            raise self.unreachable(f"the connection to {self.host} has ended")
        return self._mux

    def cut(self, cause: PyploopError) -> None:
        """From any thread: end the connection, so that each wait for the other host fails."""
        if self._mux is not None:
            self._mux.end(cause)

    def alive(self) -> bool:
        """Whether a request can still be sent."""
        return self._mux is not None and self._mux.failure is None

    def reconnect(self, ssh: Ssh) -> None:
        """Go on over this connection to the same agent, which has replaced its own end."""
        with self._lock:
            mux, old = self._mux, self._ssh
            self._ssh, self._mux = ssh, Mux(ssh.rfd, ssh.wfd)
        if mux is not None:
            mux.close()
        old.terminate()
        old.close(deadlines.LAST_WORDS)

    # ---- end

    def close(self) -> None:
        """End the connection.  The agent then undoes what is not committed, and ends.  Wait
        for that."""
        if self._mux is not None:
            # The agent sees the end of its stdin.  We see the end of its output, which says
            # that it has undone everything.
            self._mux.close()
            self._mux = None
        self._ssh.close(deadlines.ENDING)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
