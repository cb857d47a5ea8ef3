# SPDX-License-Identifier: Apache-2.0
"""What the target has kept of a source, so that only the rest is sent.

What the target's digests show to be the same is left out of the first pass.  That is
as safe as sending it.  Tracking is on before the first block is read here, so what is
written from then on is sent in a round.  All other data of the target's file are
overwritten, with zeroes where the source has none.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass

from pyploop._core import Bitmap, Known
from pyploop.diskcopy.digests import PIECE, Reader, equal_parts
from pyploop.disks import small_reads
from pyploop.disks.source import Source
from pyploop.errors import ReadError


@dataclass(frozen=True)
class Reused:
    """What need not be sent of one file or disk."""

    kept: int
    """Bytes of data that the target had kept; whole clusters."""
    same: int
    """Bytes of these that are the same at the source."""


def compare_disk(
    source: Source, known: Known, digests: Reader, check: Callable[[], None]
) -> tuple[Bitmap, Reused]:
    """(what the target has and is the same here, the figures).  `known` learns what data
    the target has.  Tracking must be on.  check: called now and then; may raise."""
    same = Bitmap(source.size)
    kept = 0
    with _Blocks(source) as blocks:

        def read(pos: int, length: int) -> memoryview:
            check()
            return blocks.read(pos, length)

        for pos, data, equal in equal_parts(digests.runs(source.size), source.size, read):
            kept += len(data)
            if equal:
                known.note(pos, data)
                same.set(pos, pos + len(data))
            else:
                known.assume_data(pos, pos + len(data))
    return same, Reused(kept, same.bytes)


class _Blocks:
    """Reads of a source that may need alignment."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._page = mmap.mmap(-1, small_reads.room(source, PIECE))

    def read(self, pos: int, length: int) -> memoryview:
        """The data at `pos`, valid until the next call.  ReadError."""
        found = small_reads.read(self._source, memoryview(self._page), pos, length)
        if len(found) < length:
            raise ReadError(
                f"{self._source.path} ends before byte {pos + length}: it has become shorter",
                path=self._source.path,
            )
        return found

    def __enter__(self) -> _Blocks:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(BufferError):  # a view in a traceback keeps it
            self._page.close()
