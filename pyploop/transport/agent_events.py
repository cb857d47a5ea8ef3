# SPDX-License-Identifier: Apache-2.0
"""The agent's log lines and events, sent to the end that asks."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from pyploop.errors import PyploopError, joined
from pyploop.report.events import ERROR, NOTE
from pyploop.transport.mux import Mux
from pyploop.wire.messages import clipped

MOST_EVENTS = 1000
"""Events that are sent between two requests at most.  The others are only counted."""


class Events:
    """A renderer that sends the agent's events to the end that asks."""

    def __init__(self, mux: Mux) -> None:
        self._mux = mux
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
        with contextlib.suppress(PyploopError):  # the connection's end is reported elsewhere
            self._mux.send({"event": name, "at": time.monotonic(), "fields": fields})

    def line(self, level: int, at: float, text: str) -> None:
        self.event("line", at, {"level": level, "text": clipped(text)})

    def error(self, at: float, text: str, hint: str | None) -> None:
        self.line(ERROR, at, joined(text, hint))

    def close(self) -> None:
        pass
