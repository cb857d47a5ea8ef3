# SPDX-License-Identifier: Apache-2.0
"""Code that the exception of a signal (cli/main.py) must not interrupt.

Handlers belong to the program.  `deferred` delays what they do for some microseconds,
since an exception there would lose a thread or a process.  Only our command line, which
says so by `handled_here`, has them replaced for good.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from pyploop.report.events import Reporter

T = TypeVar("T")

NAMES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM)
"""SIGALRM: with it cli/main.py raises a signal a second time."""

_ours = False
"""The handlers of this process are those of our command line."""


@contextlib.contextmanager
def handled_here() -> Iterator[None]:
    """The handlers are our command line's: in the body, `ignore` replaces them."""
    global _ours  # noqa: PLW0603 - handlers are the process's, too
    before, _ours = _ours, True
    try:
        yield
    finally:
        _ours = before


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Delay signals until the end of the body, so that its result is always known."""
    came: list[int] = []
    old = _handle(lambda number, _: came.append(number))
    try:
        yield
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)
        if came:
            signal.raise_signal(came[0])


def begun(begin: Callable[[], T], end: Callable[[T], object]) -> T:
    """Return what `begin` made.  When a signal came meanwhile, call `end` with it before the
    signal's exception goes on.  (Else a command that Popen has started would stay behind.)"""
    made: list[T] = []
    try:
        with deferred():
            made.append(begin())
    except BaseException:
        for one in made:
            end(one)
        raise
    return made[0]


def ignore(report: Reporter, why: str) -> None:
    """In our command line: from now on a signal only reports why it is ignored.  The handlers
    come back only when the process ends: earlier, a signal could give the wrong outcome of the
    work.  In a program that imports pyploop nothing changes: its handlers are its own."""
    if not _ours:
        return

    def log(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # another line is being written
            report.note(f"Ignoring {signal.Signals(number).name}: {why}")

    _handle(log)


def _handle(
    handler: Callable[[int, FrameType | None], object],
) -> dict[signal.Signals, signal._HANDLER]:
    """Set the handler in the main thread, the only one that signals interrupt; returns the
    old handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    ignored = (signal.SIG_IGN, None)
    names = [name for name in NAMES if signal.getsignal(name) not in ignored]
    return {name: signal.signal(name, handler) for name in names}
