# SPDX-License-Identifier: Apache-2.0
"""Which pages of a dump are loaded lazily, from CRIU's own lists of them."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path

from pyploop.wire import criu
from pyploop.wire.criu import Pagemap
from pyploop.wire.protobuf import Malformed

LARGEST = 64 << 20
"""Bytes of one list that is read: some five million pieces."""
PAGE = os.sysconf("SC_PAGESIZE")
HIGHEST = 1 << 63
"""Addresses are below it."""


class LazyPages:
    """Of one process: ranges of addresses, in their order."""

    def __init__(self) -> None:
        self.starts, self.ends = array("Q"), array("Q")

    def add(self, start: int, pages: int) -> None:
        """Behind those that are there.  Malformed when it is not."""
        if start % PAGE or not 0 < pages < HIGHEST // PAGE or start + pages * PAGE >= HIGHEST:
            raise Malformed(f"{pages} pages at {start:#x}")
        if self.ends and start < self.ends[-1]:
            raise Malformed(f"the pages at {start:#x} are not in order")
        self.starts.append(start)
        self.ends.append(start + pages * PAGE)

    def end_of(self, address: int) -> int:
        """Of the range with the address; 0 when there is none."""
        at = bisect_right(self.starts, address) - 1
        return self.ends[at] if at >= 0 and address < self.ends[at] else 0


def _lazy(path: Path) -> Iterator[tuple[int, int]]:
    """(address, pages) of one process."""
    with path.open("rb") as f:
        data = f.read(LARGEST)
    for entry in criu.entries("pagemap", data):
        if (entry.number(Pagemap.FLAGS) or 0) & criu.LAZY_PAGES:
            pages = entry.number(Pagemap.PAGES) or entry.number(Pagemap.OLD_PAGES) or 0
            yield entry.number(Pagemap.ADDRESS) or 0, pages


def lazy_bytes(images: Path) -> int | None:
    """Of all processes; None when that cannot be read (any more)."""
    try:
        lists = images.glob("pagemap-[0-9]*.img")
        return sum(pages for path in lists for _, pages in _lazy(path)) * PAGE
    except (OSError, Malformed):
        return None


def lazy_pages(
    images: Path, elsewhere: Callable[[int, int], bool] | None = None
) -> dict[int, LazyPages]:
    """By process.  elsewhere: whether those from an address of a process on are left out.
    OSError and Malformed when the lists cannot be read."""
    found = {}
    for path in images.glob("pagemap-[0-9]*.img"):
        process = LazyPages()
        pid = int(path.stem.partition("-")[2])
        for start, pages in _lazy(path):
            if not (elsewhere and elsewhere(pid, start)):
                process.add(start, pages)
        if process.starts:
            found[pid] = process
    return found
