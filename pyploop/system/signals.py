# SPDX-License-Identifier: Apache-2.0
"""Moments at which a signal's exception (cli/main.py) must not come."""

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
    """From now on signals end nothing, and the user is told why.  Nobody takes this
    back but who handled them before, when the process ends: after each earlier
    moment there would be one at which a signal lies about what became of the work."""

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
