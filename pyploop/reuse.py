# SPDX-License-Identifier: Apache-2.0
"""The source's end of going on from what its target has kept (--keep-dst).

What the target's digests show to be the same is left out of the first pass.
That is as safe as sending it: tracking is on before the first block is read
here, so what is written from then on is sent in a round, and whatever else the
kept file holds is overwritten, with zeroes where the source has none.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyploop import reading
from pyploop._core import Bitmap, Known
from pyploop.digests import PIECE, Reader, cluster, data_extents, equal_parts
from pyploop.errors import ReadError
from pyploop.pieces import Writer
from pyploop.source import Source


@dataclass(frozen=True)
class Reused:
    """What need not be sent of one file, or disk."""

    held: int
    """Bytes of data that the target had kept; whole clusters."""
    same: int
    """Bytes of these that are as they are at the source."""


def identity(state_dir: str) -> dict[str, str]:
    """Of this host as a source: a target takes what it has kept of a container
    only for the same one from the same host."""
    machine = ""
    with contextlib.suppress(OSError):
        machine = Path("/etc/machine-id").read_text().strip()
    text = "\0".join((machine, platform.node(), os.path.abspath(state_dir)))
    own = hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest()
    return {"id": own, "name": platform.node()[:64]}


def compare_disk(
    source: Source, known: Known, digests: Reader, check: Callable[[], None]
) -> tuple[Bitmap, Reused]:
    """What of the source the target holds already; `known` learns what it holds.
    Tracking is on.  check: raises to end this."""
    same = Bitmap(source.size)
    held = 0
    with _Blocks(source) as blocks:

        def read(pos: int, length: int) -> memoryview:
            check()
            return blocks.read(pos, length)

        for pos, data, equal in equal_parts(digests.runs(source.size), source.size, read):
            held += len(data)
            if equal:
                known.note(pos, data)
                same.set(pos, pos + len(data))
            else:
                known.assume_data(pos, pos + len(data))
    return same, Reused(held, same.bytes)


class _Blocks:
    """Reads of a source that may want them aligned."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._page = mmap.mmap(-1, reading.room(source, PIECE))

    def read(self, pos: int, length: int) -> memoryview:
        """Valid until the next one."""
        found = reading.read(self._source, memoryview(self._page), pos, length)
        if len(found) < length:
            raise ReadError(f"{self._source.path} ends before byte {pos + length}")
        return found

    def __enter__(self) -> _Blocks:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(BufferError):  # a view in a traceback keeps it
            self._page.close()


def send_file(out: Writer, name: str, path: str, size: int, digests: Reader) -> Reused:
    """A file that nobody writes, of which the target has kept something, and has
    told so for a file of `size` bytes."""
    covered = Bitmap(size, cluster(size).bit_length() - 1)
    held = equals = 0
    try:
        with open(path, "rb", buffering=0) as f:
            fd = f.fileno()
            st = os.fstat(fd)
            if st.st_size != size:
                raise ReadError(f"{path} had {size} bytes at the start and has {st.st_size} now")

            def read(pos: int, length: int) -> memoryview:
                return memoryview(os.pread(fd, length, pos))

            for pos, data, equal in equal_parts(digests.runs(size), size, read):
                covered.set(pos, pos + len(data))
                held += len(data)
                if equal:
                    equals += len(data)
                else:
                    out.piece(name, st.st_mode & 0o7777, pos, bytes(data))
            for start, end in _others(fd, size, covered):
                pos = start
                while pos < end and (part := os.pread(fd, min(PIECE, end - pos), pos)):
                    out.piece(name, st.st_mode & 0o7777, pos, part)
                    pos += len(part)
            out.complete(name, st.st_mode & 0o7777, size)
    except OSError as e:
        raise ReadError.of(f"cannot read {path}", e) from e
    return Reused(held, equals)


def _others(fd: int, size: int, covered: Bitmap) -> Iterator[tuple[int, int]]:
    """The file's data that were not compared."""
    left = Bitmap(covered.size, covered.shift)
    for start, end in data_extents(fd, size):
        left.set(start, end)
    left.subtract(covered)
    yield from left.extents()
