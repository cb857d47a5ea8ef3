# SPDX-License-Identifier: Apache-2.0
"""Dialect D1, the stream of `ploop copy`: bytes, no I/O (docs/internals/protocol.md).

Data frames are made and parsed in C (csrc/pump_d1.c, csrc/recv_head.c); what is
here are the control frames and the replies on the feedback channel.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

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
HELLO_2 = b"PYP\x02"
"""Of a second SYNC, to a peer that answered HELLO: are times wanted, too?"""
HELLO_2_REPLY = b"PYPLOOP\x02"
"""Instead of SUCCESS: a record of times follows this and every later answer."""

PLACE = b"PYP\x03"
"""Of a third SYNC, to a peer of version 2: can the target have as many bytes as its
position says, and where does it lie?"""
PLACE_REPLY = b"PYPLOOP\x03"
"""Instead of SUCCESS: a `Place` follows the record of times."""
REFUSED = b"PYP\x04"
"""Of a SYNC that is not answered: the sender ends, with the exit code that its
position is, because of what it was told about the place."""

TIMES = struct.Struct("<7Q")
PLACE_HEAD = struct.Struct("<16sQI")
THING = struct.Struct("<IIQ")
MANY_THINGS = 4096
"""In one place at most."""
UNKNOWN_ROOM = (1 << 64) - 1


class Times(NamedTuple):
    """What follows an answer of version 2: the receiver's CLOCK_MONOTONIC in
    ns, 0 where there is nothing to tell, and bytes."""

    first: int = 0
    """The first data since the last answer began to arrive."""
    arrived: int = 0
    """The frame that is answered was read."""
    written: int = 0
    """All before it was written to the file."""
    synced: int = 0
    """And synced."""
    named: int = 0
    """END: the file has its name, durably."""
    answered: int = 0
    dirty: int = 0
    """Bytes that were written since the last sync, and may not have been on the
    disk before this one."""

    def pack(self) -> bytes:
        return TIMES.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Times:
        return cls(*TIMES.unpack(data))


class Place(NamedTuple):
    """Where a target lies.  boot: tells this run of a machine's kernel from others.
    room: bytes that it may still get, or UNKNOWN_ROOM.  things: major, minor and
    inode (0: itself) of the devices, file systems and files below it."""

    boot: bytes
    room: int
    things: tuple[tuple[int, int, int], ...]

    def pack(self) -> bytes:
        things = self.things[:MANY_THINGS]
        head = PLACE_HEAD.pack(self.boot, self.room, len(things))
        return head + b"".join(THING.pack(*thing) for thing in things)

    @classmethod
    def unpack(cls, read: Callable[[int], bytes]) -> Place:
        """read: the next bytes of the answer.  ValueError for more than may come."""
        boot, room, count = PLACE_HEAD.unpack(read(PLACE_HEAD.size))
        if count > MANY_THINGS:
            raise ValueError(f"{count} things below a target")
        return cls(boot, room, tuple(THING.iter_unpack(read(count * THING.size))))


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
