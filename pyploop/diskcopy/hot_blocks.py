# SPDX-License-Identifier: Apache-2.0
"""Blocks that are rewritten in every round: left for last.

A block that was dirty in the last two rounds and is dirty in this one will probably
be dirty in the next one, too: to send it now is in vain.  It is sent once a round
finds it clean.  The last round before the freeze sends everything.

Invariant: what was taken from the tracker and not returned is in `_left`.
"""

from __future__ import annotations

from pyploop._core import Bitmap
from pyploop.trackers import Batch

ROUNDS = 2
"""Earlier rounds in a row that make a block hot, if it is dirty again."""


class HotBlocks:
    """Between the tracker's `take` and the pump; positions in bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._before: list[Bitmap] = []
        """What was dirty in the last rounds, the latest last."""
        self._left: Bitmap | None = None

    @property
    def left(self) -> int:
        """Bytes that are left for last now."""
        return 0 if self._left is None else self._left.bytes

    def sift(self, batches: list[Batch]) -> list[Batch]:
        """What to send of a round's batches.  All of a comparison's, since the pump
        itself skips what has not changed."""
        if any(b.changed or b.holes for b in batches):
            return batches
        dirty = self._union(batches)
        hot = None
        if len(self._before) == ROUNDS:
            hot = self._copy(dirty)
            for before in self._before:
                hot.intersect(before)
        now = self._copy(dirty)
        if self._left is not None:
            now.update(self._left)
        if hot is not None:
            now.subtract(hot)
        self._left = hot
        self._before = [*self._before, dirty][-ROUNDS:]
        return [Batch(now.extents())]

    def all(self, batches: list[Batch]) -> list[Batch]:
        """The batches, and what was left.  No block counts as hot after that."""
        left, self._left = self._left, None
        self._before = []
        if left is None or not left.count:
            return batches
        apart = [b for b in batches if b.changed or b.holes]
        left.update(self._union([b for b in batches if b not in apart]))
        return [Batch(left.extents()), *apart]

    def _union(self, batches: list[Batch]) -> Bitmap:
        union = Bitmap(self._size)
        for batch in batches:
            union.add(batch.extents)
        return union

    def _copy(self, of: Bitmap) -> Bitmap:
        copy = Bitmap(self._size)
        copy.update(of)
        return copy
