# SPDX-License-Identifier: Apache-2.0
"""Static files of which the target has a resumable file (--keep-dst): only the delta is
sent."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pyploop._core import Bitmap
from pyploop.diskcopy.delta import Reused
from pyploop.diskcopy.digests import PIECE, Reader, cluster, data_extents, equal_parts
from pyploop.errors import ReadError
from pyploop.migration.file_stream import Writer


def send_file(out: Writer, name: str, path: str, size: int, digests: Reader) -> Reused:
    """Send what differs between a file and the target's resumable file.  Nothing may write
    to the file.  digests: those of the target's file.  size: of the file when the digests
    were requested, in bytes."""
    covered = Bitmap(size, cluster(size).bit_length() - 1)
    compared = equals = 0
    try:
        with open(path, "rb", buffering=0) as f:
            fd = f.fileno()
            st = os.fstat(fd)
            if st.st_size != size:
                raise ReadError(
                    f"the size of {path} has changed during the migration, from {size} to "
                    f"{st.st_size} bytes",
                    path=path,
                )

            def read(pos: int, length: int) -> memoryview:
                return memoryview(os.pread(fd, length, pos))

            for pos, data, equal in equal_parts(digests.runs(size), size, read):
                covered.set(pos, pos + len(data))
                compared += len(data)
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
        raise ReadError.of(f"cannot read {path}", e, path=path) from e
    return Reused(compared, equals)


def _others(fd: int, size: int, covered: Bitmap) -> Iterator[tuple[int, int]]:
    """Extents of the file with data that were not compared."""
    left = Bitmap(covered.size, covered.shift)
    for start, end in data_extents(fd, size):
        left.set(start, end)
    left.subtract(covered)
    yield from left.extents()
