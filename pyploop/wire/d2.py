# SPDX-License-Identifier: Apache-2.0
"""Dialect D2, packets and replies on one socket: bytes, no I/O (docs/internals/protocol.md).

C makes and parses the data packets (csrc/pump_d2.c, csrc/recv_head.c).  Here are the
control packets and the replies.  D3 is D2 after a handshake about features (wire/d3.py).
After both ends have agreed on MD5, each packet carries a digest of its data.
"""

from __future__ import annotations

import os
import struct

HEADER = struct.Struct("<IIIIQ")
"""marker, type, size, padding u32, pos u64: 24 bytes, little-endian."""
REPLY = struct.Struct("<i")
"""0, the exit code of a failed receiver, or a negative errno."""
MARK = 0x4CC0AC3E

DATA, CMD, DATA_ASYNC = 0, 1, 2
TYPES = {0: "DATA", 1: "CMD", 2: "DATA_ASYNC", 3: "DATA_DEVICE", 4: "DATA_CBT"}
SYNC = 0
COMMANDS = {0: "SYNC", 1: "FINISH", 2: "INIT_PLOOP", 3: "INIT_QCOW", 4: "MOUNT", 5: "UMOUNT"}
HEADER_PACKET = 4096
"""Bytes of the DATA packet that ends a ploop1 image."""


MEANING = {
    1: "its target cannot be created, or exists",
    5: "a packet is too large for it",
    6: "it cannot read the stream",
    7: "it cannot write its target",
    13: "it does not understand the stream",
    16: "it cannot make its target durable",
    38: "it does not support what was sent",
}
"""Exit codes of a receiver (docs/reference/exit-codes.md)."""


def packet(kind: int, pos: int, payload: bytes, digest: bool = False) -> bytes:
    """One packet; digest: with the MD5 of the payload (D3)."""
    head = HEADER.pack(MARK, kind, len(payload), 0, pos)
    if digest:
        import hashlib  # only when needed: it loads OpenSSL

        head += hashlib.md5(payload, usedforsecurity=False).digest()
    return head + payload


def sync(features: int = 0, digest: bool = False) -> bytes:
    """A SYNC; with `features` it is D3's handshake."""
    return packet(CMD, features, struct.pack("<I", SYNC), digest)


def end(digest: bool = False) -> bytes:
    """END, as D3's FINISH: a command of no bytes."""
    return packet(CMD, 0, b"", digest)


def reply(code: int) -> bytes:
    """The answer to one packet."""
    return REPLY.pack(code)


def meaning(code: int) -> str:
    """The text for a reply that is not 0; negative ones are errnos."""
    if -4096 < code < 0:  # the range of errnos
        return f"{os.strerror(-code)} (reply {code})"
    return f"{MEANING.get(code, 'unknown reason')} (reply {code})"


def name_of(kind: int, command: int) -> str:
    """A packet's type, or its command, for a message."""
    if kind == CMD:
        return f"command {command} ({COMMANDS.get(command, 'unknown')})"
    return f"packet type {kind} ({TYPES.get(kind, 'unknown')})"
