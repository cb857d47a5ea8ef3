# SPDX-License-Identifier: Apache-2.0
"""An agent: it answers the requests of one connection, one after the other."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from pyploop.errors import PyploopError, one_line
from pyploop.report.events import Reporter
from pyploop.transport.agent_events import Events
from pyploop.transport.mux import Mux
from pyploop.wire import mux as wire
from pyploop.wire.messages import clipped


class Server(ABC):
    """One connection.  What the requests mean is a subclass's part."""

    name: str
    """Of the command, for messages."""
    peer: str
    """What the other end is, for messages."""

    def __init__(self, mux: Mux, requests: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
        """requests: name -> what answers it, with the checked arguments."""
        self._mux, self._requests = mux, requests
        self._report = Reporter()
        self._events = Events(mux)
        self._report.add(self._events)

    @abstractmethod
    def patience(self) -> float:
        """Seconds within which the next request must come."""

    @abstractmethod
    def checked(self, op: Any, args: Any) -> dict[str, Any]:
        """The checked arguments of a request; ProtocolError."""

    @abstractmethod
    def failure(self, error: PyploopError) -> dict[str, Any]:
        """The error of an answer."""

    @abstractmethod
    def bad_request(self, text: str) -> dict[str, Any]:
        """The same when the request cannot be understood, or the system refused it."""

    @abstractmethod
    def end(self) -> None:
        """The connection has ended: undo what is not complete."""

    def serve(self) -> None:
        """Answer requests until the connection ends."""
        try:
            self.answer_requests()
        finally:
            self.end()

    def answer_requests(self) -> None:
        while True:
            patience = self.patience()
            try:
                request = self._mux.receive(patience)
            except PyploopError:
                if self._mux.failure is None:  # else the peer knows
                    self.say(
                        f"the {self.peer} sent no request for {patience:g} s, so the agent ends"
                    )
                return
            self._events.asked()
            self._answer(request)

    def connect(self, mux: Mux) -> None:
        """Go on with another connection to the same peer."""
        self._mux = mux
        self._events.connect(mux)

    def _answer(self, request: wire.Message) -> None:
        number, op = request.get("id"), request.get("op")
        if type(number) is not int:
            number = None  # the peer waits for no answer
        try:
            args = self.checked(op, request.get("args"))
            answer: wire.Message = {"id": number, "ok": self._requests[str(op)](**args)}
        except PyploopError as e:
            answer = {"id": number, "error": self.failure(e)}
        except OSError as e:
            text = f"{e.filename}: {e.strerror}" if e.filename else str(e.strerror)
            answer = {"id": number, "error": self.bad_request(text)}
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            text = f"agent protocol: the request {op!r} has wrong arguments ({clipped(e)})"
            answer = {"id": number, "error": self.bad_request(text)}
        with contextlib.suppress(PyploopError):  # a dead connection ends serve()
            self._mux.send(answer)

    def say(self, text: str) -> None:
        """Print on stderr.  ssh passes it on to the peer, if that still listens."""
        with contextlib.suppress(OSError):
            os.write(2, one_line(f"{self.name}: {text}").encode() + b"\n")
