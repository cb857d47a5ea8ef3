# SPDX-License-Identifier: Apache-2.0
"""Digests of what a file contains, for a sender that sends only what differs.

Runs `position u64, count u32`, little endian, in ascending order.  Each is followed
by `count` digests of one cluster each; the last cluster of a file may be shorter.
What lies in no run is zeroes.  A count of 0 ends the file.

A digest stands for its data.  So it is a cryptographic one: a container's user may
have written both, and must not be able to find two blocks with one digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import Callable, Iterator

from pyploop._core import fdatasync
from pyploop.errors import ProtocolError, ReadError, WriteError
from pyploop.system import file_extents
from pyploop.system.peer_patience import Patience
from pyploop.units import KIB, MIB

CLUSTERS = (16 * KIB, 64 * KIB)
"""Bytes of the smallest and the largest cluster.  A small write sends its whole cluster
again, but each cluster costs a digest."""
MANY = 1 << 21
"""A file with more clusters gets larger ones.  The hashes of the pump grow there, too,
so that a cluster is never smaller than what one of them covers (source_pump.py)."""
SIZE = 32
"""Bytes of a digest: BLAKE2b-256."""
UNKNOWN = bytes(SIZE)
"""In place of a digest: the cluster could not be read.  It equals no digest."""
RUN = struct.Struct("<QI")
LONGEST_RUN = 4096
PIECE = MIB
"""Bytes that are read and compared at a time."""


def digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=SIZE).digest()


def cluster(size: int) -> int:
    """Bytes that a digest covers of a file of this size."""
    unit = CLUSTERS[0]
    while unit < CLUSTERS[1] and size > unit * MANY:
        unit *= 2
    return unit


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where the file has data below `size`, as (start, end), widened to whole clusters
    that do not overlap."""
    pos, unit = 0, cluster(size)
    for first, last in file_extents.data_extents(fd, 0, size):
        if last <= pos:
            continue
        start = max(first // unit * unit, pos)
        pos = min(-(-last // unit) * unit, size)
        yield start, pos


def send(fd: int, size: int, out: socket.socket) -> None:
    """Send the digests of the file `fd`, which has `size` bytes.  WriteError.

    It is read from the disk, not from the page cache, which would hide that a
    writeback has failed.
    """
    with contextlib.suppress(OSError):  # then the digests show what the disk has
        fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    unit = cluster(size)
    try:
        for start, end in data_extents(fd, size):
            for pos in range(start, end, PIECE):
                found = list(_digests(fd, pos, min(PIECE, end - pos), unit))
                out.sendall(RUN.pack(pos, len(found)) + b"".join(found))
        out.sendall(RUN.pack(size, 0))
    except TimeoutError as e:
        raise WriteError(
            "the source does not read the digests of the resumable files (--timeout)"
        ) from e
    except OSError as e:
        raise WriteError.of("cannot send the digests of the resumable files", e) from e


def _digests(fd: int, pos: int, length: int, unit: int) -> Iterator[bytes]:
    try:
        data = memoryview(os.pread(fd, length, pos))
    except OSError:
        data = memoryview(b"")
    for at in range(0, length, unit):
        part = data[at : min(at + unit, length)]
        yield digest(part) if len(part) == min(unit, length - at) else UNKNOWN


class Reader:
    """Reads the digests of one file after the other from a channel's descriptor, and
    closes it."""

    def __init__(self, fd: int, stall: float) -> None:
        """stall: seconds without progress until the peer is given up; 0: never."""
        self._sock = socket.socket(fileno=fd)
        self._patience = Patience(self._sock, stall)
        self.received = 0
        """Bytes so far."""

    def runs(self, size: int) -> Iterator[tuple[int, list[bytes]]]:
        """(position, digests) of the next file, which has `size` bytes here.  ProtocolError,
        ReadError."""
        floor, unit = 0, cluster(size)
        while True:
            pos, count = RUN.unpack(self._exactly(RUN.size))
            if not count:
                return
            last = pos + (count - 1) * unit
            if pos % unit or pos < floor or count > LONGEST_RUN or last >= size:
                raise ProtocolError(
                    f"the target sent {count} digests at byte {pos}, which is out of order or past "
                    "the end"
                )
            floor = last + unit
            raw = self._exactly(count * SIZE)
            yield pos, [raw[i : i + SIZE] for i in range(0, len(raw), SIZE)]

    def _exactly(self, size: int) -> bytes:
        try:
            data = self._patience.exactly(size)
        except TimeoutError as e:
            raise ReadError(
                "the target does not send the digests of its resumable files (--timeout)"
            ) from e
        except EOFError as e:
            raise ReadError(
                "the digests of the resumable files ended early (the target has failed)"
            ) from e
        except OSError as e:
            raise ReadError.of("cannot read the digests of the resumable files", e) from e
        self.received += size
        return data

    def cancel(self) -> None:
        """From any thread: a read of digests fails."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


def equal_parts(
    runs: Iterator[tuple[int, list[bytes]]],
    size: int,
    read: Callable[[int, int], memoryview],
) -> Iterator[tuple[int, memoryview, bool]]:
    """(position, data here, whether the peer has the same) for all data that the peer's
    file may have.  Neighbours with the same answer are joined, up to PIECE bytes.
    read: the data at (position, length), valid until the next call."""
    unit = cluster(size)
    step = PIECE // unit
    for pos, found in runs:
        for at in range(0, len(found), step):
            start, wanted = pos + at * unit, found[at : at + step]
            data = read(start, min(len(wanted) * unit, size - start))
            same = [
                digest(data[i * unit : (i + 1) * unit]) == theirs for i, theirs in enumerate(wanted)
            ]
            first = 0
            for i in range(1, len(same) + 1):
                if i == len(same) or same[i] != same[first]:
                    yield start + first * unit, data[first * unit : i * unit], same[first]
                    first = i
