# SPDX-License-Identifier: Apache-2.0
"""The agent's log lines and events, sent to the end that asks."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from pyploop.errors import PyploopError, joined
from pyploop.report.events import ERROR, NOTE
from pyploop.transport.mux import Mux
from pyploop.wire import mux as wire
from pyploop.wire.messages import clipped

MOST_EVENTS = 1000
"""Events that are sent between two requests at most.  The others are only counted."""


class Events:
    """A renderer that sends the agent's events to the end that asks."""

    def __init__(self, mux: Mux) -> None:
        self._mux = mux
        self._unsent: list[wire.Message] = []
        self._sent = 0
        """Events since the last request.  The peer may not be reading them."""

    def asked(self) -> None:
        """A request came, so the peer has read the events that were sent before."""
        left_out, self._sent = self._sent - MOST_EVENTS, 0
        if left_out > 0:
            self.line(NOTE, 0.0, f"{left_out} messages were left out: too many at once")

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        self._sent += 1
        if self._sent > MOST_EVENTS:
            return
        message = {"event": name, "at": time.monotonic(), "fields": fields}
        try:
            self._mux.send(message)
        except PyploopError:  # the connection's end is reported elsewhere
            if name == "progress":
                self._sent -= 1
            else:
                self._unsent.append(message)

    def connect(self, mux: Mux) -> None:
        """Another connection has come: what the one before did not take goes over it."""
        self._mux = mux
        unsent, self._unsent, self._sent = self._unsent, [], 0
        with contextlib.suppress(PyploopError):
            for message in unsent:
                mux.send(message)

    def line(self, level: int, at: float, text: str) -> None:
        self.event("line", at, {"level": level, "text": clipped(text)})

    def error(self, at: float, text: str, hint: str | None) -> None:
        self.line(ERROR, at, joined(text, hint))

    def close(self) -> None:
        pass
