# SPDX-License-Identifier: Apache-2.0
"""The last output of a program, however much it prints: a pipe, a thread that reads it, and
the last bytes in memory.  A file could grow without limit when a peer prints."""

from __future__ import annotations

import os
import threading

from pyploop.system import descriptors, signals
from pyploop.units import KIB

KEPT = 64 * KIB
LAST = 0.5
"""Seconds to wait for the last output of a program that has ended."""
DRAINED = 30.0
"""Seconds to wait for all output, when other processes keep it open."""


class LastWords:
    """`fd` is for the program.  Call `started` when the program has it, and `close` on every
    path."""

    def __init__(self) -> None:
        self._r, self.fd = os.pipe2(os.O_CLOEXEC)
        self._last = b""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def started(self) -> None:
        """Close our copy of the program's end, and begin to read."""
        self._close_ours()
        with signals.deferred():
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
        """Called in the thread with all output, as it comes."""

    def wait(self) -> None:
        """Call it when the program has ended: it reads all of the output."""
        if self._thread.is_alive():
            self._thread.join(DRAINED)

    def text(self, ended: bool = False) -> str:
        """The last output.  ended: the program has ended, so wait for the rest of it."""
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
