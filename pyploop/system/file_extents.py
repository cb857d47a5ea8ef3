# SPDX-License-Identifier: Apache-2.0
"""Where a file has data, as its file system says (SEEK_DATA, SEEK_HOLE).

A file system may not know, fail, or answer nonsense: a position that does not
advance, goes back, or is empty.  From there on everything is data, which is
always right.  (That something is a hole although it has data nobody can know.)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from pyploop.units import SECTOR

Say = Callable[[str], None]


def data_extents(
    fd: int, start: int, end: int, say: Say = lambda _: None
) -> Iterator[tuple[int, int]]:
    """Parts of the file with data from `start` to `end`: ascending, disjoint,
    none empty.

    say: gets the reason, in words, when the rest is taken for data."""
    pos = start
    while pos < end:
        try:
            data = os.lseek(fd, pos, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but a hole until the end
                return
            break
        if data >= end:
            return
        try:
            hole = os.lseek(fd, data, os.SEEK_HOLE)
        except OSError:  # ENXIO, too: there is data, so it is no end
            break
        # Blocks have holes between them, bytes do not: that would have no end.
        if data < pos or hole <= data or (hole < end and hole % SECTOR):
            break
        yield data, min(hole, end)
        pos = hole
    else:
        return
    say(f"its file system does not tell the holes from byte {pos} on: all of that is read as data")
    yield pos, end
