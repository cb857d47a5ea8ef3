# SPDX-License-Identifier: Apache-2.0
"""Where the events and lines of a call go: the logger `pyploop`, and a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pyploop.errors import joined
from pyploop.report.events import DETAIL, INFO, NOTE, Reporter

if TYPE_CHECKING:
    from pyploop.report.event_types import Event

_NAMES: dict[int, Literal["note", "info", "detail"]] = {
    NOTE: "note",
    INFO: "info",
    DETAIL: "detail",
}


def make_reporter(on_event: Callable[[Event], None] | None) -> Reporter:
    """Lines go to the logger `pyploop`; events and lines go to `on_event`.

    It is called in the thread that does the work, and what it raises ends that.  What
    happens while the source is frozen is reported after the thaw.
    """
    report = Reporter()
    report.add(_Logger())
    if on_event is not None:
        report.add(_Typed(on_event))
    return report


class _Logger:
    """Lines for the logger `pyploop`, which the program configures."""

    def __init__(self) -> None:
        import logging

        self._log = logging.getLogger("pyploop")
        if not self._log.handlers:
            # Else logging prints warnings for a program that configures nothing.
            self._log.addHandler(logging.NullHandler())
        self._levels = {NOTE: logging.WARNING, INFO: logging.INFO}
        self._other = logging.DEBUG

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        if name == "sending":
            self._log.info("Sending %s", fields["image"])

    def line(self, level: int, at: float, text: str) -> None:
        self._log.log(self._levels.get(level, self._other), "%s", text)

    def error(self, at: float, text: str, hint: str | None) -> None:
        self._log.error("%s", joined(text, hint))

    def close(self) -> None:
        pass


class _Typed:
    """Typed events for a function of the program."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        from pyploop.report import event_types

        self._types, self._on_event = event_types, on_event

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        self._on_event(self._types.typed(name, at, fields))

    def line(self, level: int, at: float, text: str) -> None:
        name = _NAMES.get(level, "detail")
        self._on_event(self._types.Message(time=at, level=name, text=text))

    def error(self, at: float, text: str, hint: str | None) -> None:
        self._on_event(self._types.Error(time=at, message=text, hint=hint))

    def close(self) -> None:
        pass
