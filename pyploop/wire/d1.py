# SPDX-License-Identifier: Apache-2.0
"""Dialect D1, the stream of `ploop copy`: bytes, no I/O (docs/internals/protocol.md).

C makes and parses the data frames (csrc/pump_d1.c, csrc/recv_head.c).  Here are the control
frames, and the replies on the feedback channel.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from enum import IntFlag
from typing import NamedTuple

HEADER = struct.Struct("<IIQ")
"""marker u32, size u32, pos u64: 16 bytes, little-endian, no padding."""
MARK = 0x4CC0AC3D
SYNC_SIZE = 4
REPLY_SIZE = 8
SUCCESS = b"SUCCESS\n"
FAILURE = b"FAILURE\n"

HELLO = b"PYP\x01"
"""Payload of a SYNC with which our sender asks whether the peer is pyploop.  Every other
receiver treats it as a SYNC.  Receivers with feedback ignore the bytes.  Those before 1.11
write them at position 0, which is sent again later."""
HELLO_REPLY = b"PYPLOOP\x01"
"""Our receiver's answer instead of SUCCESS: it will also answer END."""
HELLO_2 = b"PYP\x02"
"""Payload of a second SYNC, to a peer that answered HELLO: can it send times, too?"""
HELLO_2_REPLY = b"PYPLOOP\x02"
"""The answer instead of SUCCESS: a record of times follows this and each later answer."""

PLACE = b"PYP\x03"
"""Payload of a third SYNC, to a peer of version 2.  It asks whether the target has room for
as many bytes as the SYNC's position, and where the target lies."""
PLACE_REPLY = b"PYPLOOP\x03"
"""The answer instead of SUCCESS: a `Place` follows the record of times."""
REFUSED = b"PYP\x04"
"""Payload of a SYNC without an answer: the sender ends because of the target's place, with
the SYNC's position as its exit code."""

FEATURES = b"PYP\x05"
"""Payload of a fourth SYNC, to a peer of version 3: a set of features is offered as the
SYNC's position."""
FEATURES_REPLY = b"PYPLOOP\x05"
"""The answer instead of SUCCESS: after the record of times comes ACCEPTED."""
ACCEPTED = struct.Struct("<QQ")
"""The features that apply from the next frame on, and 8 bytes that are sent as 0."""

CELL_HEAD = struct.Struct("<QII")
"""With DIGESTS, after ACCEPTED and a key: what the target has, cell by cell.  The position,
the number of blocks, the number of digests; then a bit for each block, and a digest for each
bit.  A cell without blocks ends it."""

PROOF_MARK = 0x4CC0AC51
"""Marker of PROOF frames, once both ends have agreed on them."""
CLAIM = struct.Struct("<QII16s16x")
"""Payload of a PROOF frame at position 0, right before END: the image's size, the bytes of
a block, the algorithm, the root of the tree."""
DIFFERS = b"DIFFERS\n"
"""The answer to END when the target is not what PROOF says.  The sender may ask for nodes
(`question`) and send blocks again, and then PROOF and END."""
MANY_NODES = 256
"""Most nodes in one question."""
NODE = struct.Struct("<Q")
BARRIER_MARK = 0x4CC0AC52
BARRIER_HEAD = struct.Struct("<II")
"""The sequence, and the number of lanes that are named, or the lane's own.  C makes and
parses them (csrc/pump_lanes.c, csrc/recv_lanes.c)."""
LOST_LANES = b"LOSTLANE"
"""Instead of SUCCESS, where lanes are agreed: lanes have ended before the barrier.  After
the record of times come LOST_HEAD (their number, and 4 bytes that are sent as 0) and a
LANE_END for each."""
LOST_HEAD = struct.Struct("<II")
LANE_END = struct.Struct("<IIQ")
"""The lane, 4 bytes that are sent as 0, and the bytes of its stream that have arrived."""
MANY_LANES = 64
"""Most lanes in one such answer."""

TIMES = struct.Struct("<7Q")
PLACE_HEAD = struct.Struct("<16sQI")
THING = struct.Struct("<IIQ")
MANY_THINGS = 4096
"""Most things in one `Place`."""
UNKNOWN_ROOM = (1 << 64) - 1


class Feature(IntFlag):
    """What the two ends may agree on, as bits on the wire.  Others are kept: a newer
    peer may know them."""

    COMPRESSED = 0x1
    PROOF = 0x2
    LANES = 0x4
    DIGESTS = 0x8
    RESUME = 0x10
    """The stream may go on over another connection, which the callers of both ends make."""


NO_FEATURES = Feature(0)


class Times(NamedTuple):
    """The record after an answer of version 2: times of the receiver's CLOCK_MONOTONIC in ns
    (0: not known), and bytes."""

    first: int = 0
    """When the first data after the last answer arrived."""
    arrived: int = 0
    """When the answered frame was read."""
    written: int = 0
    """When all data before it was written to the file."""
    synced: int = 0
    """When that data was synced."""
    named: int = 0
    """END: when the file had its name, durably."""
    answered: int = 0
    dirty: int = 0
    """Bytes written since the last sync, which this sync may have had to write back."""

    def pack(self) -> bytes:
        return TIMES.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Times:
        return cls(*TIMES.unpack(data))


class Place(NamedTuple):
    """Where a target lies.  boot: the kernel's boot_id, different on each machine and after
    each boot.  room: free bytes for the target, or UNKNOWN_ROOM.  things: major, minor and
    inode of the files below it, and with inode 0 the devices and file systems."""

    boot: bytes
    room: int
    things: tuple[tuple[int, int, int], ...]

    def pack(self) -> bytes:
        things = self.things[:MANY_THINGS]
        head = PLACE_HEAD.pack(self.boot, self.room, len(things))
        return head + b"".join(THING.pack(*thing) for thing in things)

    @classmethod
    def unpack(cls, read: Callable[[int], bytes]) -> Place:
        """read: returns the next bytes of the answer.  ValueError for too many things."""
        boot, room, count = PLACE_HEAD.unpack(read(PLACE_HEAD.size))
        if count > MANY_THINGS:
            raise ValueError(f"{count} things below a target")
        return cls(boot, room, tuple(THING.iter_unpack(read(count * THING.size))))


def pack_lost(ends: Sequence[tuple[int, int]]) -> bytes:
    """What follows LOST_LANES and the times.  ends: lanes, and bytes that have arrived."""
    body = (LANE_END.pack(lane, 0, received) for lane, received in ends)
    return LOST_HEAD.pack(len(ends), 0) + b"".join(body)


def unpack_lost(read: Callable[[int], bytes]) -> list[tuple[int, int]]:
    """read: returns the next bytes of the answer.  ValueError for too many lanes."""
    count, _ = LOST_HEAD.unpack(read(LOST_HEAD.size))
    if count > MANY_LANES:
        raise ValueError(f"{count} lanes have ended")
    ends = LANE_END.iter_unpack(read(count * LANE_END.size)) if count else ()
    return [(lane, received) for lane, _, received in ends]


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


def proof(size: int, block: int, algorithm: int, root: bytes) -> bytes:
    """The PROOF frame of an image."""
    payload = CLAIM.pack(size, block, algorithm, root)
    return HEADER.pack(PROOF_MARK, len(payload), 0) + payload


def question(level: int, nodes: list[int]) -> bytes:
    """The PROOF frame that asks for the children of these nodes."""
    payload = b"".join(NODE.pack(node) for node in nodes)
    return HEADER.pack(PROOF_MARK, len(payload), level + 1) + payload
