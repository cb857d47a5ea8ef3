# SPDX-License-Identifier: Apache-2.0
"""The pages that the relay of a post-copy has asked the source for, and that CRIU does not
have yet (read_ahead.py).

Memory is bounded: those that were read ahead may have AHEAD bytes, asked for or here.  Those
that CRIU asked for itself, with their neighbours, may have WANTED bytes; the oldest go first.
What has gone is asked for again when CRIU wants it, since the source keeps it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from pyploop.runtimes.lazy_images import PAGE

AHEAD = 64 << 20
WANTED = 16 << 20


class Chunk:
    """Pages of one process, one after the other, which come with one answer."""

    __slots__ = (
        "ahead",
        "asked",
        "before",
        "data",
        "end",
        "filled",
        "first",
        "process",
        "start",
        "used",
    )

    def __init__(self, process: int, start: int, end: int, ahead: bool) -> None:
        self.process, self.start, self.end, self.ahead = process, start, end, ahead
        self.first = start
        """Address from which on CRIU may still want them."""
        self.asked = 0.0
        """When, and how much had come by then in all."""
        self.before = 0
        self.data = bytearray()
        """All of them, once their answer has begun."""
        self.filled = 0
        self.used = False
        """CRIU has some of them."""

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def complete(self) -> bool:
        return self.filled == self.size

    def pages_from(self, address: int) -> int:
        """That are here."""
        return (self.start + self.filled - address) // PAGE


class PageStore:
    """The chunks of all processes, which do not overlap."""

    def __init__(self) -> None:
        self._starts: dict[int, list[int]] = {}
        self._chunks: dict[int, list[Chunk]] = {}
        self._wanted: deque[Chunk] = deque()
        self.ahead = self.wanted = 0
        """Bytes."""

    def add(self, chunk: Chunk) -> None:
        starts = self._starts.setdefault(chunk.process, [])
        at = bisect_right(starts, chunk.start)
        starts.insert(at, chunk.start)
        self._chunks.setdefault(chunk.process, []).insert(at, chunk)
        if chunk.ahead:
            self.ahead += chunk.size
            return
        self.wanted += chunk.size
        self._wanted.append(chunk)
        if self.wanted > WANTED:
            for old in [c for c in self._wanted if c.used]:
                self.drop(old)
                if self.wanted <= WANTED:
                    break

    def find(self, process: int, address: int) -> Chunk | None:
        """The one with the address."""
        at = bisect_right(self._starts.get(process, ()), address) - 1
        if at < 0:
            return None
        chunk = self._chunks[process][at]
        return chunk if address < chunk.end else None

    def next_start(self, process: int, address: int, end: int) -> int:
        """The first address behind this one that is in a chunk; at most `end`."""
        starts = self._starts.get(process, ())
        at = bisect_right(starts, address)
        return min(end, starts[at]) if at < len(starts) else end

    def shorten(self, chunk: Chunk, end: int) -> None:
        """The source has fewer pages than were asked for."""
        less = chunk.end - end
        chunk.end = end
        if chunk.ahead:
            self.ahead -= less
        else:
            self.wanted -= less

    def used(self, chunk: Chunk, address: int, end: int, *, in_order: bool) -> None:
        """CRIU has the pages of the chunk from `address` to `end`.  in_order: it asks for all
        pages in their order, so it has those before them, or does not need them."""
        chunk.used = True
        if in_order:
            chunks = self._chunks[chunk.process]
            while (before := chunks[0]) is not chunk and before.complete:
                self.drop(before)
        if in_order or address <= chunk.first:
            chunk.first = max(chunk.first, end)
        if chunk.complete and chunk.first >= chunk.end:
            self.drop(chunk)

    def drop(self, chunk: Chunk) -> None:
        starts = self._starts[chunk.process]
        at = bisect_right(starts, chunk.start) - 1
        del starts[at]
        del self._chunks[chunk.process][at]
        if chunk.ahead:
            self.ahead -= chunk.size
        else:
            self.wanted -= chunk.size
            self._wanted.remove(chunk)
