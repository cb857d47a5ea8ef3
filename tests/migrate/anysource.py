# SPDX-License-Identifier: Apache-2.0
"""A source that sends the agent whatever it likes.  The agent is a thread here."""

from __future__ import annotations

import contextlib
import platform
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyploop import __version__
from pyploop.errors import MigrateError, WriteError
from pyploop.migration import commit_record, file_stream
from pyploop.migration.target import agent
from pyploop.runtimes import config
from pyploop.runtimes.policy import Source
from pyploop.system import cpu
from pyploop.transport.mux import Mux
from pyploop.wire import mux as wire

SECONDS = 30.0


class Hostile:
    """A connection to an agent."""

    def __init__(self, host: config.HostConfig, name: str) -> None:
        """name: as the agent's --source has it."""
        ours, theirs = socket.socketpair()
        self._ends = (ours, theirs)
        self.crash: BaseException | None = None
        ours.sendall(wire.hello(__version__))
        self._agent = agent.Agent(host, theirs.fileno(), theirs.fileno(), Source(name=name))
        while ours.recv(1) != b"\n":
            pass
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self._mux: Mux | None = Mux(ours.fileno(), ours.fileno())
        self._channel = self._number = 0

    def _serve(self) -> None:
        try:
            self._agent.serve()
        except BaseException as e:
            self.crash = e
        finally:  # as the process ends
            with contextlib.suppress(OSError):
                self._ends[1].shutdown(socket.SHUT_RDWR)

    def ask(self, op: str, **args: Any) -> dict[str, Any]:
        """One request; MigrateError as the agent has refused it."""
        assert self._mux is not None
        self._number += 1
        self._mux.send({"id": self._number, "op": op, "args": args})
        while (message := self._mux.receive(SECONDS)).get("id") != self._number:
            pass
        if "error" in message:
            raise MigrateError(int(message["error"]["code"]), message["error"]["message"])
        return dict(message["ok"])

    def check(self, container: str, runtime: str, facts: dict[str, Any], **args: Any) -> None:
        facts = {"machine": platform.machine(), "cpu": cpu.flags(), "trees": [], **facts}
        rest = {"live": False, "sizes": [], "nodeps": [], **args}
        self.ask("check", container=container, runtime=runtime, facts=facts, **rest)

    def begin(self) -> None:
        self.ask("begin", migration=commit_record.new_id(), stall=SECONDS, keep=False)

    def send_items(self, files: Sequence[tuple[str, int, bytes]]) -> None:
        """Files, each (label, mode, data)."""
        assert self._mux is not None
        self._channel += 1
        with file_stream.Writer(self._mux.open(self._channel), SECONDS) as out:
            self.ask("items", channel=self._channel)
            with contextlib.suppress(WriteError):  # refused meanwhile: the agent says why
                for name, mode, data in files:
                    out.piece(name or "x", mode, 0, data)
                    out.complete(name or "x", mode, len(data))
                out.end()
            self.ask("join", name="items", timeout=SECONDS)

    def close(self) -> None:
        """The agent has undone what it did when this returns."""
        if self._mux is not None:
            self._mux.close()
            self._mux = None
            self._ends[0].shutdown(socket.SHUT_RDWR)
            self._thread.join(SECONDS)
            for end in self._ends:
                end.close()
            assert not self._thread.is_alive()
            assert self.crash is None, self.crash


@contextlib.contextmanager
def source(config_file: Path, name: str = "a") -> Iterator[Hostile]:
    """Of an agent with this configuration."""
    made = Hostile(config.load(str(config_file)), name)
    try:
        yield made
    finally:
        made.close()
