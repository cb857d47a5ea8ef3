# SPDX-License-Identifier: Apache-2.0
"""Dialect D1, the stream of `ploop copy`: bytes, no I/O (docs/protocol.md).

Data frames are made and parsed in C (csrc/pump_out.c, csrc/recv.c); what is
here are the control frames and the replies on the feedback channel.
"""

from __future__ import annotations

import struct

HEADER = struct.Struct("<IIQ")
"""marker u32, size u32, pos u64: 16 bytes, little-endian, no padding."""
MARK = 0x4CC0AC3D
SYNC_SIZE = 4
REPLY_SIZE = 8
SUCCESS = b"SUCCESS\n"
FAILURE = b"FAILURE\n"

HELLO = b"PYP\x01"
"""Payload of a SYNC by which our sender asks whether the peer is ours.  Every
other receiver takes it for a SYNC: those that have feedback ignore the bytes,
and those before 1.11 write them at position 0, which is sent again after it."""
HELLO_REPLY = b"PYPLOOP\x01"
"""What our receiver answers instead of SUCCESS: it will also answer END."""


def sync(payload: bytes = bytes(SYNC_SIZE), pos: int = 0) -> bytes:
    """A SYNC frame; the payload is 4 bytes that the peer may ignore."""
    if len(payload) != SYNC_SIZE:
        raise ValueError("SYNC carries 4 bytes")
    return HEADER.pack(MARK, SYNC_SIZE, pos) + payload


def end() -> bytes:
    """The END frame."""
    return HEADER.pack(MARK, 0, 0)


def data(pos: int, payload: bytes) -> bytes:
    """One data frame.  ValueError for 4 bytes: that would be a SYNC."""
    if len(payload) in (0, SYNC_SIZE):
        raise ValueError(f"a data frame cannot have {len(payload)} bytes")
    return HEADER.pack(MARK, len(payload), pos) + payload
