# SPDX-License-Identifier: Apache-2.0
"""The parts of a file that have data, as its file system reports them (SEEK_DATA, SEEK_HOLE).

A file system may not know them, fail, or give a position that does not advance.  From
there on everything counts as data, which is always right.  (A file system that reports
data as a hole cannot be found out.)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from pyploop.units import SECTOR

Report = Callable[[str], None]


def data_extents(
    fd: int, start: int, end: int, report: Report = lambda _: None
) -> Iterator[tuple[int, int]]:
    """Parts of the file with data from `start` to `end`: ascending, disjoint,
    none empty.

    report: called with the reason when the rest of the file counts as data."""
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
        except OSError:  # ENXIO, too: there is data, so this is not the end
            break
        # Holes begin at blocks.  One at any other byte could repeat without an end.
        if data < pos or hole <= data or (hole < end and hole % SECTOR):
            break
        yield data, min(hole, end)
        pos = hole
    else:
        return
    report(f"its file system does not show the holes from byte {pos} on: all of it is read as data")
    yield pos, end
