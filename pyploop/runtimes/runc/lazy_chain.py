# SPDX-License-Identifier: Apache-2.0
"""Makes the pages of memory rounds lazy: those that a dump has only in its parents' images
(docs/internals/lazy-restore.md).

CRIU marks such a page as the parent's, and its restore copies it.  Here its list of pages is
written anew, so that they are lazy, and the daemon asks for them as for those of a page
server.  A file says where they are, for the process that answers it (page_local.py).

Invariant: only pages that CRIU itself could have made lazy: they were so in the round that
has them, and their mapping allows it in the dump.
"""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyploop.runtimes.lazy_images import LARGEST, PAGE
from pyploop.runtimes.runc.page_local import INDEX
from pyploop.wire import criu
from pyploop.wire.criu import LAZY_PAGES, Pagemap, Vma
from pyploop.wire.protobuf import Malformed

LISTS = "lists"
"""Folder in CRIU's working folder: the lists as the dump has them."""
DEEPEST = 21
"""Images in a chain."""
PARENT, PRESENT = 1, 4
"""Flags of a list's entry."""


class Piece(NamedTuple):
    """Pages of one process, from `start` to `end`."""

    start: int
    end: int
    flags: int
    file: Path
    offset: int
    """Of the first one in the file, if they are present."""


class Level:
    """The list of one process in one folder of the chain."""

    def __init__(self, folder: Path, name: str) -> None:
        with (folder / name).open("rb") as f:
            self._data = f.read(LARGEST)
        self.starts, self.ends = array("Q"), array("Q")
        self._flags, self._offsets = array("B"), array("Q")
        offset = 0
        entries = criu.entries("pagemap", self._data)
        head = next(entries, None)
        if head is None:
            raise Malformed(f"{name} is empty")
        self.file = folder / f"pages-{head.number32(1) or 0}.img"
        for entry in entries:
            start = entry.number(Pagemap.ADDRESS) or 0
            pages = entry.number(Pagemap.PAGES) or entry.number(Pagemap.OLD_PAGES) or 0
            end, flags = start + pages * PAGE, (entry.number(Pagemap.FLAGS) or 0) & 7
            if not self._after() <= start < end < 1 << 63:
                raise Malformed(f"{name}: {pages} pages at {start:#x} are not in order")
            self.starts.append(start)
            self.ends.append(end)
            self._flags.append(flags)
            self._offsets.append(offset)
            offset += end - start if flags & PRESENT else 0

    def _after(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def head(self) -> bytes:
        """The bytes before the first entry for pages."""
        return self._data[: 12 + int.from_bytes(self._data[8:12], "little")]

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Those that it has between two addresses."""
        at = max(bisect_right(self.starts, start) - 1, 0)
        while at < len(self.starts) and self.starts[at] < end:
            a, b = max(start, self.starts[at]), min(end, self.ends[at])
            if a < b:
                offset = self._offsets[at] + a - self.starts[at]
                yield Piece(a, b, self._flags[at], self.file, offset)
            at += 1


def _levels(images: Path, name: str) -> list[Level]:
    """From the dump back."""
    found: list[Level] = []
    folder = images
    while (folder / name).is_file():
        if len(found) == DEEPEST:
            raise Malformed(f"{images} has more than {DEEPEST} parents")
        found.append(Level(folder, name))
        if not (folder / "parent").is_symlink():
            break
        folder = (folder / "parent").resolve()
    return found


def _origin(levels: list[Level], start: int, end: int) -> Iterator[Piece]:
    """Where the pages are, which the level before these has from its parent."""
    at = start
    for piece in levels[0].pieces(start, end) if levels else ():
        if at < piece.start:
            yield Piece(at, piece.start, PARENT, Path(), 0)
        if piece.flags & PARENT:
            yield from _origin(levels[1:], piece.start, piece.end)
        else:
            yield piece
        at = piece.end
    if at < end:
        yield Piece(at, end, PARENT, Path(), 0)


class Mappings:
    """Of one process, those whose pages can be loaded by page faults."""

    def __init__(self, image: bytes) -> None:
        self._starts, self._ends = array("Q"), array("Q")
        for vma in criu.only("mm", image).messages(criu.MM_VMAS):
            if criu.can_be_lazy(vma):
                self._starts.append(vma.number(Vma.START) or 0)
                self._ends.append(vma.number(Vma.END) or 0)

    def split(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether it can be lazy), one after the other."""
        while start < end:
            at = bisect_right(self._starts, start) - 1
            if at >= 0 and start < self._ends[at]:
                stop, lazy = min(end, self._ends[at]), True
            else:
                after = at + 1
                stop = min(end, self._starts[after]) if after < len(self._starts) else end
                lazy = False
            yield start, stop, lazy
            start = stop


def _rewritten(levels: list[Level], mappings: Mappings, found: list[Piece]) -> bytes:
    """The list of a process, with what is in the parents as lazy pages.  found: gets where the
    lazy pages are that this host has."""
    out: list[tuple[int, int, int]] = []

    def add(start: int, end: int, flags: int) -> None:
        if flags == LAZY_PAGES and out and out[-1][1:] == (start, ~LAZY_PAGES):
            out[-1] = (out[-1][0], end, ~LAZY_PAGES)
        else:
            out.append((start, end, ~LAZY_PAGES if flags == LAZY_PAGES else flags))

    for piece in levels[0].pieces(0, 1 << 63):
        if not piece.flags & PARENT:
            out.append((piece.start, piece.end, piece.flags))
            if piece.flags & LAZY_PAGES and piece.flags & PRESENT:
                found.append(piece)
            continue
        for start, end, lazy in mappings.split(piece.start, piece.end):
            for origin in _origin(levels[1:], start, end):
                if lazy and origin.flags & LAZY_PAGES and origin.flags & PRESENT:
                    add(origin.start, origin.end, LAZY_PAGES)
                    found.append(origin)
                else:
                    out.append((origin.start, origin.end, PARENT))
    entries = (
        criu.pagemap_entry(start, (end - start) // PAGE, LAZY_PAGES if flags < 0 else flags)
        for start, end, flags in out
    )
    return levels[0].head + b"".join(entries)


def flatten(images: Path, work: Path) -> None:
    """Of all processes.  work: CRIU's working folder, for the lists as they were, and the
    index.  OSError and Malformed when it cannot be; then nothing is changed."""
    index: dict[str, Any] = {"files": [], "pages": {}}
    numbers: dict[Path, int] = {}
    lists: dict[str, bytes] = {}
    for path in sorted(images.glob("pagemap-[0-9]*.img")):
        pid = path.stem.partition("-")[2]
        found: list[Piece] = []
        mappings = Mappings((images / f"mm-{pid}.img").read_bytes())
        lists[path.name] = _rewritten(_levels(images, path.name), mappings, found)
        for piece in found:
            numbers.setdefault(piece.file, len(numbers))
        index["pages"][pid] = [(p.start, p.end, numbers[p.file], p.offset) for p in found]
    index["files"] = [str(file) for file in numbers]
    (work / LISTS).mkdir()
    try:
        for name, data in lists.items():
            os.rename(images / name, work / LISTS / name)
            (images / name).write_bytes(data)
        (work / INDEX).write_text(json.dumps(index))
    except OSError:
        put_back(images, work)
        raise


def put_back(images: Path, work: Path) -> None:
    """The lists as they were, for an eager restore."""
    with contextlib.suppress(FileNotFoundError):
        for path in (work / LISTS).iterdir():
            os.replace(path, images / path.name)
