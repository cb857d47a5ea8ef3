# SPDX-License-Identifier: Apache-2.0
"""Scripts (scripts.py) through the agent's protocol: bytes and frames, a hostile
source against a real agent, a hostile agent against a real migration.

The container is made up (made_up.py), and everything else is the product.  After
each conversation it runs on one host, or is suspended where the commit is in doubt,
and neither host has a file, a lock, a descriptor or a thread of it left.
guide.py is for campaigns, test_conversations.py for what they found.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

from made_up import SOURCE, Box, Finding, World
from scripts import agent_seeds, frame_of, message_seeds, source_seeds

from pyploop.diskcopy.options import Options
from pyploop.errors import MigrateError, ProtocolError, PyploopError, VzExitCode
from pyploop.migration import deadlines, undo_kinds
from pyploop.migration.source import orchestrator, recover
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.request import Request
from pyploop.migration.target import agent
from pyploop.report.events import Reporter
from pyploop.runtimes import State, config
from pyploop.runtimes.config import HostConfig
from pyploop.transport import deadlines as waits
from pyploop.transport import ssh_cipher
from pyploop.transport.mux import Mux
from pyploop.undo import journal
from pyploop.wire import messages
from pyploop.wire import mux as wire

HANGS = 30.0
"""Seconds for a conversation to end after its script has."""
ANSWER = 0.03
"""Seconds in which a hostile source waits for an answer, which may not come yet; when
it has not, it waits for no later one."""
CALL = 0.05
"""Seconds that a request of a migration takes at most here."""
LAST_WORDS = 0.005
"""Seconds that a migration waits for the end of an ssh whose connection has ended."""
SO_SNDBUFFORCE = 32


def _roomy() -> tuple[socket.socket, socket.socket]:
    """A connection that takes a whole conversation though nobody reads it."""
    pair = socket.socketpair()
    for s in pair:
        with contextlib.suppress(PermissionError):
            s.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 << 20)
    return pair


class Frames:
    """The messages of the end that is tested, as they come."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = b""
        self._hello = False
        self.over = False

    def next(self, timeout: float) -> dict[str, Any] | None:
        """None: none in time, or the connection has ended."""
        deadline = time.monotonic() + timeout
        while (found := self._parse()) is None and not self.over:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._sock.settimeout(left)
            try:
                part = self._sock.recv(1 << 16)
            except TimeoutError:
                return None
            except OSError:
                part = b""
            self.over = not part
            self._data += part
        return found

    def _parse(self) -> dict[str, Any] | None:
        if not self._hello:
            at = self._data.find(b"\n")
            if at < 0:
                return None
            self._data, self._hello = self._data[at + 1 :], True
        while len(self._data) >= wire.HEADER_SIZE:
            frame = wire.parse(self._data[: wire.HEADER_SIZE])
            end = wire.HEADER_SIZE + frame.length
            if len(self._data) < end:
                return None
            payload, self._data = self._data[wire.HEADER_SIZE : end], self._data[end:]
            if frame.kind == wire.CONTROL:
                return wire.decode(payload)
        return None


# ---- bytes and frames


def run_frames(data: bytes) -> None:
    """Whatever comes, the connection ends with an error that a person can read."""
    ours, theirs = _roomy()
    with ours, theirs:
        threading.excepthook = _raise_in_thread
        mux = Mux(ours.fileno(), ours.fileno())
        ends = [mux.open(n) for n in (1, 2)]
        try:
            for line in data.split(b"\n"):
                with contextlib.suppress(OSError):
                    theirs.sendall(frame_of(line))
            theirs.shutdown(socket.SHUT_WR)
            with contextlib.suppress(PyploopError):
                while True:
                    message = mux.receive(HANGS)
                    with contextlib.suppress(ProtocolError):
                        messages.request(message.get("op"), message.get("args"))
                    with contextlib.suppress(ProtocolError):
                        messages.event(message)
                    messages.failure(message.get("error"))
                    for op in messages._ANSWERS:
                        with contextlib.suppress(ProtocolError):
                            messages.answer(op, message.get("ok"))
            if mux.failure is None or "\n" in str(mux.failure):
                raise Finding(f"it ended with {mux.failure!r}")
        finally:
            mux.close()
            for fd in ends:
                os.close(fd)
    _thread_failed()


def read_messages(data: bytes) -> None:
    """Messages, one a line, as requests, as answers to each, and as events."""
    for line in data.split(b"\n"):
        with contextlib.suppress(ProtocolError):
            message = wire.decode(line)
            code, text = messages.failure(message.get("error"))
            if not 0 < code < 128 or len(text) > messages.LONGEST_TEXT + 1:
                raise Finding(f"failure {code} with {len(text)} characters")
            op, args, ok = (message.get(name) for name in ("op", "args", "ok"))
            for check in (
                lambda: messages.request(op, args),  # noqa: B023 - called at once
                lambda: messages.answer(str(op), ok),  # noqa: B023
                lambda: messages.event(message),  # noqa: B023
            ):
                with contextlib.suppress(ProtocolError):
                    json.dumps(check(), allow_nan=False).encode()


_failures: list[threading.ExceptHookArgs] = []


def _raise_in_thread(args: threading.ExceptHookArgs) -> None:
    _failures.append(args)


def _thread_failed() -> None:
    if _failures:
        failure = _failures.pop()
        _failures.clear()
        raise Finding(f"a thread ended with {failure.exc_value!r}") from failure.exc_value


# ---- a hostile source


def run_agent(world: World, data: bytes) -> None:
    """The script against a real agent; what it did is undone, or the container runs."""
    threading.excepthook = _raise_in_thread
    box = Box(world.folder, State(False), has_disk=True)

    def runtime(host: HostConfig, name: object, container: str) -> Box:
        if name != "command" or container != "box":
            raise MigrateError(10, "no such container")
        return box

    ours, theirs = _roomy()
    failure: list[BaseException] = []

    def serve() -> None:
        try:
            try:
                served = agent.Agent(world.host(), ours.fileno(), ours.fileno(), SOURCE)
            except PyploopError:
                return  # as the process ends that has no peer
            served.serve()
        except BaseException as e:
            failure.append(e)

    with (
        ours,
        theirs,
        mock.patch.object(agent, "make_runtime", runtime),
        mock.patch.object(undo_kinds, "make_runtime", runtime),
        mock.patch.object(config, "load", lambda _: world.host()),
        mock.patch.object(deadlines, "SETTLE_WAIT", 0.0),
    ):
        thread = threading.Thread(target=serve)
        thread.start()
        theirs.sendall(wire.hello("0.1.0"))
        _talk(theirs, data)
        with contextlib.suppress(OSError):
            theirs.shutdown(socket.SHUT_WR)
        theirs.close()
        thread.join(HANGS)
        if thread.is_alive():
            raise Finding("the agent does not end")
    if failure:
        raise Finding(f"the agent ended with {failure[0]!r}") from failure[0]
    _thread_failed()
    runs = box.status.running
    if "undump" in box.told and box.told[:2] != ["check images", "release"]:
        raise Finding(f"it was restored from images that nobody checked: {box.told}")
    if runs and "undump" not in box.told and "start" not in box.told:
        raise Finding(f"it runs, after {box.told}")
    # Its record waits for the source's question: the connection has ended.
    if runs and [r for r in journal.records(world.folder / "state") if r.fields["side"]]:
        raise Finding("it runs, and the journal would undo it")
    world.check(moved=runs)


def _talk(sock: socket.socket, data: bytes) -> None:
    """A source's script."""
    answers, missed = Frames(sock), False
    for line in data.split(b"\n"):
        try:
            sock.settimeout(HANGS)
            sock.sendall(frame_of(line))
        except OSError:
            return
        if line == b"W":
            time.sleep(0.002)
        if not line.startswith(b"C ") or missed:
            continue
        while (message := answers.next(ANSWER)) is not None and "event" in message:
            pass
        missed = message is None
        if answers.over:
            return


# ---- a hostile agent


class Ssh:
    """What subprocess.Popen gives for ssh, with a script behind it."""

    pid = 0
    returncode = 0

    def __init__(self, script: bytes) -> None:
        self._ours, out = _roomy()
        self._requests, into = _roomy()  # its end is seen by itself, as a pipe's
        self.stdin, self.stdout = (
            os.fdopen(into.detach(), "wb", 0),
            os.fdopen(out.detach(), "rb", 0),
        )
        self._thread = threading.Thread(target=self._run, args=(script,))
        self._thread.start()

    def _run(self, script: bytes) -> None:
        with self._ours, self._requests, contextlib.suppress(OSError):
            requests = Frames(self._requests)
            self._ours.sendall(wire.hello("0.1.0"))
            for line in script.split(b"\n"):
                if line.startswith(b"A "):
                    while requests.next(HANGS) is None and not requests.over:
                        raise Finding("the source asks for nothing")
                    if requests.over:
                        return
                if line == b"W":
                    time.sleep(0.002)
                self._ours.sendall(frame_of(line))

    def poll(self) -> int | None:
        return None if self._thread.is_alive() else 0

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(HANGS if timeout is None else timeout)
        if timeout is not None and self._thread.is_alive():
            raise subprocess.TimeoutExpired("ssh", timeout)
        return 0

    def terminate(self) -> None:
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)

    kill = terminate


def run_source(world: World, data: bytes) -> None:
    """A real migration to the script: the container runs here, or it was moved, or
    the target was asked to restore, and nobody knows."""
    threading.excepthook = _raise_in_thread
    box = Box(world.folder, State(True, True))
    scripts = iter(data.split(b"\n---\n"))
    connections: list[Ssh] = []

    def popen(command: list[str], stderr: int, **_: object) -> Ssh:
        connections.append(Ssh(next(scripts, b"")))
        return connections[-1]

    asked = Remote.call

    def call(self: Remote, op: str, timeout: float, /, *more: Any, **args: Any) -> dict[str, Any]:
        return asked(self, op, min(timeout, CALL), *more, **args)

    failure: BaseException | None = None
    request = Request("made-up", live=True, copy=Options(stall=1))
    with (
        mock.patch.object(subprocess, "Popen", popen),
        mock.patch.object(ssh_cipher, "choose", lambda *_: ssh_cipher.Choice((), False, "")),
        mock.patch.object(Remote, "call", call),
        mock.patch.object(waits, "LAST_WORDS", LAST_WORDS),
        mock.patch.object(recover, "settled", partial(recover.settled, patience=0.0)),
        mock.patch.object(undo_kinds, "make_runtime", lambda *_: box),
        mock.patch.object(config, "load", lambda _: world.host()),
    ):
        try:
            orchestrator.migrate(world.host(), box, request, Reporter())  # type: ignore[arg-type]
        except PyploopError as e:
            failure = e
        for connection in connections:
            connection.wait()
    _thread_failed()
    doubt = box.status.suspended
    if doubt and not (
        isinstance(failure, MigrateError) and failure.exit_code == VzExitCode.CANNOT_CONNECT
    ):
        raise Finding(f"it stays suspended after {failure!r}")
    if failure is not None and not doubt and not box.status.running:
        raise Finding(f"it does not run after {failure!r}: {box.told}")
    if failure is None and box.status.running:
        raise Finding(f"it runs although it was moved: {box.told}")
    if failure is not None and "\n" in str(failure):
        raise Finding(f"a message of several lines: {failure!r}")
    world.check(doubt=doubt, moved=failure is None)


TARGETS: dict[str, tuple[Callable[[World, bytes], None], Callable[[], list[bytes]]]] = {
    "frames": (lambda _, data: run_frames(data), lambda: agent_seeds() + source_seeds()),
    "messages": (lambda _, data: read_messages(data), message_seeds),
    "agent": (run_agent, agent_seeds),
    "source": (run_source, source_seeds),
}
