# SPDX-License-Identifier: Apache-2.0
"""A client of rsync's daemon that says what it likes.  Protocol 31, as of rsync 3.1."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

INFO, ERROR_XFER, ERROR, WARNING = 2, 1, 3, 4
"""Kinds of messages (rsync.h)."""


def entry(name: bytes) -> bytes:
    """An empty file in the list of files, with the owner, group and time of the one before."""
    return bytes([0x98, len(name)]) + name + bytes(3) + struct.pack("<I", 0o100644)


class Client:
    """Of the module `tree`, up to where the server waits for the list of files."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(30)
        self._line()
        sock.sendall(b"@RSYNCD: 31.0\ntree\n")
        while not self._line().startswith(b"@RSYNCD: OK"):
            pass
        sock.sendall(b"--server\0-re.LsfxCIu\0.\0tree/\0\0")
        sock.recv(1)
        self._drain = threading.Thread(target=self._read, daemon=True)
        self._drain.start()

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            line += self._sock.recv(1)
        return line

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while self._sock.recv(1 << 16):
                pass

    def say(self, kind: int, text: bytes) -> None:
        self._sock.sendall(struct.pack("<I", (7 + kind) << 24 | len(text)) + text)

    def send_list(self, name: bytes) -> None:
        """Of one empty file.  The server asks for it then."""
        self.say(0, entry(name) + b"\0")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._drain.join()
        self._sock.close()
