# SPDX-License-Identifier: Apache-2.0
"""How long a peer may keep a reader waiting, as csrc/patience.h has it for copies: the
sum of the waits for each PROGRESS bytes counts, so that one who drips is given up."""

from __future__ import annotations

import socket
import time

from pyploop.units import KIB

PROGRESS = 64 * KIB


class Patience:
    """Of one socket, which gets a timeout with each call."""

    def __init__(self, sock: socket.socket, stall: float) -> None:
        """stall: seconds; 0: for ever."""
        self._sock, self._stall = sock, stall
        self._waited = 0.0
        self._moved = 0

    def recv_into(self, view: memoryview) -> int:
        """As socket.recv_into; TimeoutError when nothing, or next to nothing, came."""
        left = self._stall - self._waited
        if self._stall and left <= 0:
            raise TimeoutError
        start = time.monotonic()
        self._sock.settimeout(left if self._stall else None)
        n = self._sock.recv_into(view)
        self._waited += time.monotonic() - start
        self._moved += n
        if self._moved >= PROGRESS:
            self._waited, self._moved = 0.0, 0
        return n
