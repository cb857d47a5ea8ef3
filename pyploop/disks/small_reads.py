# SPDX-License-Identifier: Apache-2.0
"""Read a few bytes of a source in the same way as the pump (csrc/pump_read.c)."""

from __future__ import annotations

import os

from pyploop.disks.source import Source
from pyploop.errors import ReadError
from pyploop.units import BLOCK


def room(source: Source, length: int) -> int:
    """The size of the page-aligned memory that `read` needs for `length` bytes."""
    return length + 2 * max(source.align, BLOCK)


def read(source: Source, memory: memoryview, pos: int, length: int) -> memoryview:
    """`length` bytes of the source at byte `pos`, or fewer at its end.  The result is valid
    until `memory` is used again.  ReadError."""
    at = source.base + pos
    lead = at % source.align
    at -= lead
    want = -(-(lead + length) // source.align) * source.align
    tail = source.tail
    whole = source.base + source.size - (tail.size if tail else 0)
    got = 0
    try:
        while got < lead + length:
            if tail is not None and at + got >= whole:
                # Drop the cache: it misses writes that bypassed it.
                os.posix_fadvise(tail.fd, tail.pos, 0, os.POSIX_FADV_DONTNEED)
                there = tail.pos + at + got - whole
                n = os.preadv(tail.fd, [memory[got : lead + length]], there)
            else:
                end = want if tail is None else min(want, whole - at)
                n = os.preadv(source.fd, [memory[got:end]], at + got)
            if not n:
                break
            got += n
    except OSError as e:
        raise ReadError.of(f"cannot read {source.path} at byte {pos}", e) from e
    return memory[lead : max(lead, min(got, lead + length))]
