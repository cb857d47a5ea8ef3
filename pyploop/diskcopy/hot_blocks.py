# SPDX-License-Identifier: Apache-2.0
"""Blocks that are rewritten in every round: left for last.

A block that was dirty in the last two rounds, and is in this one, will be in
the next one as well: sending it now is in vain.  Once a round finds it clean
it is sent; and the last round before the freeze sends everything.

Invariant: what was taken from the tracker and not handed on is in `_left`.
"""

from __future__ import annotations

from pyploop._core import Bitmap
from pyploop.trackers import Batch

ROUNDS = 2
"""Rounds in a row that make a block hot, beside the present one."""


class HotBlocks:
    """Between the tracker's `take` and the pump; positions in bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._before: list[Bitmap] = []
        """Dirty in the last rounds, latest last."""
        self._left: Bitmap | None = None

    @property
    def left(self) -> int:
        """Bytes that are left for last at present."""
        return 0 if self._left is None else self._left.bytes

    def sift(self, batches: list[Batch]) -> list[Batch]:
        """What to send of a round's batches.  Those of a comparison pass: the
        pump itself skips what has not changed."""
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
        """The batches, and what was left; hot is from now on what is hot again."""
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
