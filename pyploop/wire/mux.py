# SPDX-License-Identifier: Apache-2.0
"""Frames of the agent's protocol (docs/internals/agent-protocol.md): bytes <-> frames, no I/O.

Invariant: a frame's length is checked against its kind before anything is
allocated for it.
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any, NamedTuple

from pyploop.errors import ProtocolError
from pyploop.units import KIB, MIB
from pyploop.wire.messages import finite, integer

MAJOR = 1
"""The protocol's major version, which must be the same at both ends."""

HEADER = struct.Struct("<BBHI")
"""kind u8, zero u8, channel u16, length u32 of the payload that follows."""
HEADER_SIZE: int = HEADER.size

CONTROL, DATA, CREDIT, END, RESET, PING = range(1, 7)
MAX_CONTROL = 256 * KIB
MAX_DATA = 256 * KIB
WINDOW = 2 * MIB
"""Bytes of one channel that may be under way in one direction."""
IMAGE_WINDOW = 16 * MIB
"""The same of a channel of memory images, when both ends know `window`.  ssh's own window
(2 MiB) and the pipes lie within it, so it is never what slows a long line."""
BULK_WINDOW = 32 * MIB
"""The same in a connection over several lanes: on a long line 16 MiB are what 1 Gb/s has
under way in 130 ms, and the way through the lanes takes its time, too."""
DEEPEST = 64
"""Levels of nested objects and lists in a message."""
HELLO_LIMIT = 64 * KIB
"""Bytes that a login shell may print before the hello."""

_LIMITS = {CONTROL: MAX_CONTROL, DATA: MAX_DATA, CREDIT: 4, END: 0, RESET: 0, PING: 0}
_HELLO = re.compile(rb"PYPLOOP-AGENT (\d{1,4}) ([0-9A-Za-z.+-]{1,40})\n")

Message = dict[str, Any]


class Frame(NamedTuple):
    """A checked header."""

    kind: int
    channel: int
    length: int


def frame(kind: int, channel: int, length: int) -> bytes:
    """The header of a frame whose payload is `length` bytes."""
    return HEADER.pack(kind, 0, channel, length)


def parse(header: bytes) -> Frame:
    """ProtocolError unless it is a valid frame."""
    kind, zero, channel, length = HEADER.unpack(header)
    limit = _LIMITS.get(kind)
    if limit is None or zero:
        raise ProtocolError(f"agent protocol: unknown frame {header.hex()}")
    # The end of a channel is an END frame, so there is no empty DATA.
    if length > limit or (kind == CREDIT and length != 4) or (kind == DATA and not length):
        raise ProtocolError(f"agent protocol: frame of kind {kind} with {length} bytes")
    with_channel = kind in (DATA, CREDIT, END, RESET)
    if with_channel != (channel > 0):
        raise ProtocolError(f"agent protocol: frame of kind {kind} on channel {channel}")
    return Frame(kind, channel, length)


def encode(message: Message) -> bytes:
    """One control message; ProtocolError when it is longer than allowed."""
    payload = json.dumps(message).encode()
    if len(payload) > MAX_CONTROL:
        raise ProtocolError(f"agent protocol: message of {len(payload)} bytes")
    return frame(CONTROL, 0, len(payload)) + payload


def decode(payload: bytes) -> Message:
    """ProtocolError unless it is a valid JSON object: numbers of 64 bits, texts that can be
    encoded, and not nested deeper than DEEPEST."""
    try:
        message = json.loads(
            payload.decode(), parse_float=finite, parse_int=integer, parse_constant=_no_constant
        )
        check_values(message)
    except (ValueError, RecursionError) as e:
        raise ProtocolError(f"agent protocol: message is not JSON ({e})") from None
    if not isinstance(message, dict):
        raise ProtocolError("agent protocol: message is not an object")
    return message


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def check_values(message: Any) -> None:
    """ValueError for a text that UTF-8 does not have, and for a value that is nested too deep."""
    level: list[Any] = [message]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair: UnicodeEncodeError, a ValueError
            elif isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
        if not below:
            return
        level = below
    raise ValueError(f"lists and objects are nested more than {DEEPEST} deep")


def hello(version: str) -> bytes:
    """The first line that each end sends."""
    return f"PYPLOOP-AGENT {MAJOR} {version}\n".encode()


_PAGES = re.compile(rb"PYPLOOP-PAGES (\d{1,4}) ([0-9A-Za-z.+-]{1,40}) ([0-9a-f]{16})\n")


def pages_hello(version: str, migration: str) -> str:
    """The first line of a connection for the pages of a post-copy migration."""
    return f"PYPLOOP-PAGES {MAJOR} {version} {migration}\n"


def find_pages(data: bytes) -> str:
    """The migration that such a line names; empty: it is another line."""
    found = _PAGES.fullmatch(data)
    return found[3].decode() if found and int(found[1]) == MAJOR else ""


_LANE = re.compile(rb"PYPLOOP-LANE (\d{1,4}) ([0-9a-f]{32})\n")
_LANE_READY = re.compile(rb"PYPLOOP-LANE-READY\n")


def lane_hello(token: str) -> bytes:
    """The first line of a connection for a lane of a remote copy.  token: by which its agent
    knows it, 32 hex digits."""
    return f"PYPLOOP-LANE {MAJOR} {token}\n".encode()


def find_lane(line: bytes) -> str:
    """The token in such a line; empty: it is another line."""
    found = _LANE.fullmatch(line)
    return found[2].decode() if found and int(found[1]) == MAJOR else ""


LANE_READY = b"PYPLOOP-LANE-READY\n"
"""The answer to it.  What follows, in both directions, belongs to the copy."""


def lane_is_ready(data: bytes) -> bool | None:
    """True when that has come, after anything that a login shell has printed; None: not yet."""
    return True if _LANE_READY.search(data) else None


class Hello(NamedTuple):
    """Protocol major, pyploop's version, and where the frames begin."""

    major: int
    version: str
    end: int


def find_hello(data: bytes) -> Hello | None:
    """The peer's hello, after anything that a login shell has printed before it, perhaps without
    an end of its line."""
    found = _HELLO.search(data)
    if found is None:
        return None
    return Hello(int(found[1]), found[2].decode(), found.end())


def mismatch(peer: Hello, version: str) -> str | None:
    """Why the two ends cannot work together; None when they can."""
    if peer.major != MAJOR:
        return f"it speaks agent protocol {peer.major}, this is {MAJOR}"
    if peer.version.split(".")[0] != version.split(".", maxsplit=1)[0]:
        return f"it is pyploop {peer.version}, this is {version}: another major version"
    return None
