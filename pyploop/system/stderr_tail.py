# SPDX-License-Identifier: Apache-2.0
"""The end of what a program prints, however much that is: a pipe, a thread that
reads it, and the last bytes in memory.  A file would take what a peer likes to say."""

from __future__ import annotations

import os
import threading

from pyploop.system import descriptors, signals
from pyploop.units import KIB

KEPT = 64 * KIB
LAST = 0.5
"""Seconds for the last words of a program that has ended."""
DRAINED = 30.0
"""Seconds for all that it said, if others hold its output open."""


class LastWords:
    """`fd` is for the program; `started` when it has it, `close` on every path."""

    def __init__(self) -> None:
        self._r, self.fd = os.pipe2(os.O_CLOEXEC)
        self._last = b""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def started(self) -> None:
        """Only the program has the other end from now on."""
        self._close_ours()
        with signals.held_back():
            self._thread.start()

    def _close_ours(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _run(self) -> None:
        while not self._closing.is_set():
            if not descriptors.readable(self._r, descriptors.POLL_SLICE):
                continue
            data = os.read(self._r, KEPT)
            if not data:
                return
            self._last = (self._last + data)[-KEPT:]
            self.took(data)

    def took(self, data: bytes) -> None:
        """All of it, as it comes; in the thread."""

    def wait(self) -> None:
        """The program has ended: all that it said is read, when this returns."""
        if self._thread.is_alive():
            self._thread.join(DRAINED)

    def text(self, ended: bool = False) -> str:
        """ended: the program has, so what it said last is waited for."""
        if ended and self._thread.is_alive():
            self._thread.join(LAST)
        return self._last.decode(errors="replace")

    def close(self) -> None:
        self._closing.set()
        self._close_ours()
        if self._thread.is_alive():
            self._thread.join()
        if self._r >= 0:
            os.close(self._r)
            self._r = -1
