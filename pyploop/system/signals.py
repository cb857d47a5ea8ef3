# SPDX-License-Identifier: Apache-2.0
"""Moments at which a signal's exception (cli/main.py) must not come.

Handlers are the program's own matter.  `held_back` defers what they do for some
microseconds, since an exception there would lose a thread or a process.  Only our command
line, which says so by `handled_here`, has them replaced for good.
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
"""SIGALRM: cli/main.py raises a signal again by it."""

_ours = False
"""The handlers of this process are those of our command line."""


@contextlib.contextmanager
def handled_here() -> Iterator[None]:
    """The handlers are our command line's: in the body, `only_told` replaces them."""
    global _ours  # noqa: PLW0603 - handlers are the process's, too
    before, _ours = _ours, True
    try:
        yield
    finally:
        _ours = before


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals take effect at its end: for acts that must be known to have been done."""
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
    """What `begin` made.  A signal that came meanwhile does not lose it: `end` gets it
    first.  (Popen returns when the command runs: it would have been left behind.)"""
    made: list[T] = []
    try:
        with held_back():
            made.append(begin())
    except BaseException:
        for one in made:
            end(one)
        raise
    return made[0]


def only_told(report: Reporter, why: str) -> None:
    """In our command line, signals end nothing from now on, and the log says why.  Only
    the end of the process takes this back: after each earlier moment there would be one
    at which a signal lies about what became of the work.  In a program that imports
    pyploop nothing changes: its handlers are its own."""
    if not _ours:
        return

    def tell(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # another line is being written
            report.note(f"Signal {number} {why}")

    _handle(tell)


def _handle(
    handler: Callable[[int, FrameType | None], object],
) -> dict[signal.Signals, signal._HANDLER]:
    """In the main thread, where signals' exceptions come; returns the old handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    ignored = (signal.SIG_IGN, None)
    names = [name for name in NAMES if signal.getsignal(name) not in ignored]
    return {name: signal.signal(name, handler) for name in names}
