# SPDX-License-Identifier: Apache-2.0
"""What `criu lazy-pages` and CRIU's page server say to each other.  No I/O.

Each message begins with struct page_server_iov (criu/page-xfer.c in CRIU's sources): command,
number of pages, address, process.  CRIU 4.2 has 64 bits for the number of pages, older ones
have 32, and both ends must be of the same kind.  A request is that alone.  An answer has the
address of its request and at most as many pages, which follow.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

GET = 7
ANSWER = 4 << 16 | 6
"""PS_IOV_ADD_F with the flag of pages that are present."""


class Message(NamedTuple):
    command: int
    pages: int
    address: int
    process: int


class Layout:
    """How one kind of CRIU writes a message."""

    def __init__(self, text: str) -> None:
        self._struct = struct.Struct(text)
        self.size = self._struct.size

    def read(self, data: bytes | bytearray) -> Message:
        """data: `size` bytes."""
        return Message(*self._struct.unpack(data))

    def write(self, message: Message) -> bytes:
        return self._struct.pack(*message)


WIDE, NARROW = Layout("<I4xQQQ"), Layout("<IIQQ")
