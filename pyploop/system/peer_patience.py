# SPDX-License-Identifier: Apache-2.0
"""How long a peer may keep a reader waiting.  The waits for each PROGRESS bytes are added
up, so a peer that sends single bytes is given up, too.  csrc/patience.h does the same."""

from __future__ import annotations

import socket
import time

from pyploop.units import KIB

PROGRESS = 64 * KIB


class Patience:
    """The waits for one socket.  Each call sets the socket's timeout."""

    def __init__(self, sock: socket.socket, stall: float) -> None:
        """stall: seconds to wait for PROGRESS bytes; 0: for ever."""
        self._sock, self._stall = sock, stall
        self._waited = 0.0
        self._moved = 0

    def recv_into(self, view: memoryview) -> int:
        """Like socket.recv_into; TimeoutError when too little has come for `stall` seconds."""
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

    def exactly(self, size: int) -> bytes:
        """So many bytes.  EOFError when the peer has ended before, else as `recv_into`."""
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            n = self.recv_into(view[got:])
            if not n:
                raise EOFError
            got += n
        return bytes(data)
