# SPDX-License-Identifier: Apache-2.0
"""What a run reports: one stream of events, rendered as text with
ploop's levels and timestamps, as NDJSON, or as a progress bar.

Levels are ploop's: -1 errors, 0 the important lines, 3 (default) what a user
follows, 4 and more details, and from 4 on every line carries the time since
the start, `[%2u.%06u] ` (seconds, microseconds).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any, Protocol

from pyploop.errors import ParameterError, PyploopError, joined, one_line

SCHEMA = "pyploop.events/1"
"""Name and version in each NDJSON line's `schema`; the number changes when a
field changes its meaning or goes away (docs/reference/events.md)."""

ERROR, NOTE, INFO, DETAIL = -1, 0, 3, 4


class Renderer(Protocol):
    """Something that shows events."""

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        """`at`: seconds since the start."""

    def line(self, level: int, at: float, text: str) -> None: ...

    def error(self, at: float, text: str, hint: str | None) -> None:
        """A failure, and what to do about it; None: the text says that already."""

    def close(self) -> None: ...


class Reporter:
    """Hands each event and line to the renderers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.start = clock()
        """CLOCK_MONOTONIC of the moment from which events count their time."""
        self._renderers: list[Renderer] = []
        self._deferred: list[Callable[[], None]] | None = None

    def add(self, renderer: Renderer) -> None:
        self._renderers.append(renderer)

    def now(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.start

    def event(self, name: str, /, **fields: Any) -> None:
        """Numbers are bytes and seconds."""
        at = self.now()
        for r in self._renderers:
            self._show(partial(r.event, name, at, fields))

    def line(self, level: int, text: str) -> None:
        if level == ERROR:
            self.error(text)
            return
        at = self.now()
        for r in self._renderers:
            self._show(partial(r.line, level, at, one_line(text)))

    def _show(self, show: Callable[[], None]) -> None:
        if self._deferred is None:
            show()
        else:
            self._deferred.append(show)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Show everything only at the end of the body; within another such body, at the
        end of that one.

        While a file system is frozen: the log may be a file on it, and writing
        it would wait for a thaw that waits for us.  And while a container is
        suspended, which must not wait for the reader of the log.
        """
        if self._deferred is not None:
            yield
            return
        self._deferred = []
        try:
            yield
        finally:
            deferred, self._deferred = self._deferred, None
            for show in deferred or []:
                show()

    def at_once(self, text: str) -> None:
        """A note that is written at once, even if that waits for a frozen file system:
        only for a thread that no other waits for."""
        at = self.now()
        for r in self._renderers:
            r.line(NOTE, at, one_line(text))

    def error(self, text: str, hint: str | None = None) -> None:
        at = self.now()
        hint = None if hint is None else one_line(hint)
        for r in self._renderers:
            self._show(partial(r.error, at, one_line(text), hint))

    def failure(self, error: PyploopError) -> None:
        """Its message, and its hint."""
        self.error(str(error), error.hint)

    def note(self, text: str) -> None:
        self.line(NOTE, text)

    def info(self, text: str) -> None:
        self.line(INFO, text)

    def detail(self, text: str) -> None:
        self.line(DETAIL, text)

    def close(self) -> None:
        for r in self._renderers:
            r.close()


class TextRenderer:
    """Lines at or below the level.  Errors go to `err`, others to `out`;
    None: nowhere, that descriptor belongs to the stream."""

    def __init__(self, level: int, out: IO[str] | None, err: IO[str] | None) -> None:
        self._level, self._out, self._err = level, out, err

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        if name == "sending" and self._level >= NOTE:
            self._print(self._err, at, one_line(f"Sending {fields['image']}"))
        if name == "check-failed" and fields["number"] > 1 and self._level >= ERROR:
            where = f" on {fields['host']}" if fields["host"] else ""
            text = one_line(f"Check {fields['check']} failed{where}: {fields['message']}")
            self._print(self._err, at, joined(text, fields["hint"]))

    def line(self, level: int, at: float, text: str) -> None:
        if level <= self._level:
            self._print(self._out, at, text)

    def error(self, at: float, text: str, hint: str | None) -> None:
        if self._level >= ERROR:
            self._print(self._err, at, joined(text, hint))

    def _print(self, to: IO[str] | None, at: float, text: str) -> None:
        if to is None:
            return
        if self._level >= DETAIL:
            text = f"[{int(at):2}.{int(at * 1e6) % 1000000:06}] {text}"
        try:
            to.write(f"{text}\n")  # print() lets another thread's line in between
            to.flush()
        except OSError:
            # Nobody reads the log any more; the copy matters more than that.
            return

    def close(self) -> None:
        pass


class JsonRenderer:
    """One JSON object a line; errors too, as event `error`."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        if name == "progress":
            return
        record = {"schema": SCHEMA, "event": name, "time": round(at, 6), **fields}
        try:
            self._out.write(json.dumps(record) + "\n")  # at once: there are several threads
            self._out.flush()
        except OSError:
            return

    def line(self, level: int, at: float, text: str) -> None:
        pass

    def error(self, at: float, text: str, hint: str | None) -> None:
        self.event("error", at, {"message": text} | ({"hint": hint} if hint else {}))

    def close(self) -> None:
        pass


class ProgressRenderer:
    """A bar on stderr: round, percent, rate, dirty rate, time left.

    From then on sys.stderr (with `stdout_too` also sys.stdout) is a proxy that
    prints lines above the bar.
    """

    def __init__(self, stdout_too: bool) -> None:
        # Only here: rich is large, and a copy without a bar needs none of it.
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
        except ImportError as e:
            raise ParameterError(
                "--progress needs the Python package rich, which is not installed: "
                "pip install 'pyploop[progress]', or the Debian package python3-rich"
            ) from e

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TextColumn("{task.fields[dirty]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=5,
            redirect_stdout=stdout_too,
        )
        self._task = self._progress.add_task("starting", total=None, dirty="")
        self._progress.start()

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        if name == "phase":
            total = fields.get("bytes")
            self._progress.reset(
                self._task, description=fields["phase"], total=total, dirty=fields.get("dirty", "")
            )
        elif name == "progress":
            self._progress.update(self._task, completed=fields["done"], dirty=fields["dirty"])
        elif name == "summary":
            size = fields["size"]
            self._progress.update(
                self._task, description="done", total=size, completed=size, dirty=""
            )

    def line(self, level: int, at: float, text: str) -> None:
        pass

    def error(self, at: float, text: str, hint: str | None) -> None:
        pass

    def close(self) -> None:
        self._progress.stop()
