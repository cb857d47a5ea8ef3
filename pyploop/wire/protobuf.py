# SPDX-License-Identifier: Apache-2.0
"""A reader of protocol buffers without a schema, for CRIU's images (wire/criu.py).  A
hostile source may have written them.

The encoding: https://protobuf.dev/programming-guides/encoding/.  When a field that may
come once comes twice, some readers merge both and others take the last one.  Here that is
an error, so that no other reader sees another value.
"""

from __future__ import annotations

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LONGEST_VARINT = 10
"""Bytes of one: 64 bits, 7 in each."""
MOST_FIELDS = 1 << 16
"""Fields in one message, and numbers in one field.  Real messages have a few hundred."""


class Malformed(ValueError):
    """The bytes are not a valid message."""


class Message:
    """The fields of one message, each by its number."""

    def __init__(self, data: bytes) -> None:
        """Malformed for anything that is not well-formed to its last byte."""
        found: dict[int, list[int | bytes]] = {}
        self._fields = found
        at, count, end = 0, 0, len(data)
        # Thousands are read while a container is suspended.  Most numbers have one byte, and
        # are read without a call.
        while at < end:
            tag = data[at]
            at += 1
            if tag > 0x7F:
                tag, at = varint(data, at - 1)
            number, kind = tag >> 3, tag & 7
            count += 1
            if not 0 < number < 1 << 29 or count > MOST_FIELDS:
                raise Malformed(f"field {number}")
            value: int | bytes
            if kind in (VARINT, BYTES):
                if at < end and data[at] < 0x80:
                    size, at = data[at], at + 1
                else:
                    size, at = varint(data, at)
                value = size
                if kind == BYTES:
                    value, at = data[at : at + size], at + size
            elif kind in (FIXED64, FIXED32):
                size = 8 if kind == FIXED64 else 4
                value, at = int.from_bytes(data[at : at + size], "little"), at + size
            else:
                raise Malformed(f"field {number} is of the unknown kind {kind}")
            if at > end:
                raise Malformed(f"field {number} ends behind the message")
            if number in found:
                found[number].append(value)
            else:
                found[number] = [value]

    def _one(self, number: int, kind: type) -> int | bytes | None:
        found = self._fields.get(number, [])
        if not found:
            return None
        if len(found) > 1 or not isinstance(found[0], kind):
            raise Malformed(f"field {number} comes twice, or is of another type")
        return found[0]

    def number(self, number: int) -> int | None:
        """An unsigned integer of 32 or 64 bits; None when the field is missing."""
        value = self._one(number, int)
        return None if value is None else int(value)

    def number32(self, number: int) -> int | None:
        """An unsigned integer of 32 bits: the low bits of a longer one."""
        value = self.number(number)
        return None if value is None else value & 0xFFFFFFFF

    def raw(self, number: int) -> bytes | None:
        value = self._one(number, bytes)
        return value if isinstance(value, bytes) else None

    def text(self, number: int) -> str | None:
        """A file name: any bytes except NUL, which would end it in C."""
        value = self.raw(number)
        if value is None:
            return None
        if b"\0" in value:
            raise Malformed(f"field {number} has a NUL")
        return value.decode(errors="surrogateescape")

    def message(self, number: int) -> Message | None:
        value = self.raw(number)
        return None if value is None else Message(value)

    def messages(self, number: int) -> list[Message]:
        found = self._fields.get(number, [])
        if not all(isinstance(v, bytes) for v in found):
            raise Malformed(f"field {number} is of another type")
        return [Message(v) for v in found if isinstance(v, bytes)]

    def texts(self, number: int) -> list[str]:
        found = self._fields.get(number, [])
        if not all(isinstance(v, bytes) and b"\0" not in v for v in found):
            raise Malformed(f"field {number} is of another type")
        return [v.decode(errors="surrogateescape") for v in found if isinstance(v, bytes)]

    def numbers32(self, number: int) -> list[int]:
        """Repeated integers of 32 bits, one by one or packed."""
        result = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                result.append(value & 0xFFFFFFFF)
                continue
            at = 0
            while at < len(value):
                one, at = varint(value, at)
                if len(result) >= MOST_FIELDS:
                    raise Malformed(f"field {number} has more than {MOST_FIELDS} numbers")
                result.append(one & 0xFFFFFFFF)
                if len(result) > MOST_FIELDS:
                    raise Malformed(f"field {number} has more than {MOST_FIELDS} numbers")
        return result


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position after it).  Malformed when it is longer than LONGEST_VARINT."""
    value = 0
    for n, byte in enumerate(data[at : at + LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * n)
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + n + 1
    raise Malformed(f"a number at {at} does not end")


def varint_of(value: int) -> bytes:
    """value: not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
