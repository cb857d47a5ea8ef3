# SPDX-License-Identifier: Apache-2.0
"""The file stream: files in a data channel, piece by piece.  It carries configuration and
lower deltas; memory images go the same way, by image_channels.py.

A piece is `name length u16, mode u16, data length u32, position u64`, little
endian, then the name and the data.  A piece without data says that the file is
complete and `position` bytes long.  A piece without a name ends the stream.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pyploop._core import fdatasync
from pyploop.errors import ProtocolError, ReadError, SyncError, WriteError
from pyploop.runtimes import LARGEST_FILE
from pyploop.system.file_extents import data_extents
from pyploop.system.peer_patience import Patience
from pyploop.units import KIB, MIB

HEADER = struct.Struct("<HHIQ")
LONGEST_NAME = 1024
PIECE = 256 * KIB
LARGEST = MIB
"""Bytes of data in one piece at most, when it is received."""
MOST_FILES = 100_000
"""Enough for more than 10,000 processes: CRIU writes about seven files for each."""
MOST_NAMES = 8 * MIB
"""Bytes of all names together."""
MOST_OPEN = 64
"""Files that are open at a time.  CRIU's files grow one after the other."""
PLAIN = 0o666
"""Mode bits of a file that must not be a program, whatever mode the source sends."""


class Writer:
    """Writes pieces into a channel's descriptor, and closes it."""

    def __init__(self, fd: int, stall: float, rate: int = 0) -> None:
        """stall: seconds within which the peer must take a piece.  rate: bytes per second
        at most; 0: no limit."""
        self._sock = socket.socket(fileno=fd)
        self._sock.settimeout(stall)
        self._rate, self._start = rate, time.monotonic()
        self.sent = 0
        """Bytes of data so far."""

    def _send(self, data: bytes) -> None:
        if self._rate:
            time.sleep(max(self._start + self.sent / self._rate - time.monotonic(), 0.0))
        try:
            self._sock.sendall(data)
        except OSError as e:
            raise WriteError.of("cannot send files to the target", e) from e

    def piece(self, name: str, mode: int, pos: int, data: bytes) -> None:
        raw = os.fsencode(name)
        self._send(HEADER.pack(len(raw), mode, len(data), pos) + raw + data)
        self.sent += len(data)

    def complete(self, name: str, mode: int, size: int) -> None:
        self.piece(name, mode, size, b"")

    def file(self, name: str, path: str) -> None:
        """Send a whole file, without its holes."""
        try:
            with open(path, "rb", buffering=0) as f:
                st = os.fstat(f.fileno())
                for start, end in data_extents(f.fileno(), 0, st.st_size):
                    pos = start
                    while pos < end and (data := os.pread(f.fileno(), min(PIECE, end - pos), pos)):
                        self.piece(name, st.st_mode & 0o7777, pos, data)
                        pos += len(data)
                self.complete(name, st.st_mode & 0o7777, st.st_size)
        except OSError as e:
            raise ReadError.of(f"cannot read {path}", e, path=path) from e

    def end(self) -> None:
        self._send(HEADER.pack(0, 0, 0, 0))

    def cancel(self) -> None:
        """From any thread: from now on sending fails here, and reading fails at the peer."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Reader:
    def __init__(self, fd: int, stall: float) -> None:
        self._sock = socket.socket(fileno=fd)
        self._patience = Patience(self._sock, stall)

    def exactly(self, size: int) -> bytes:
        try:
            return self._patience.exactly(size)
        except EOFError as e:
            raise ended_early() from e
        except OSError as e:
            raise cannot_read(e) from e

    def close(self) -> None:
        self._sock.close()


@dataclass(frozen=True)
class Received:
    """A whole stream: its files, in the order of their ends, and bytes of data."""

    names: list[str]
    data: int


class Budget:
    """Bytes of data that several streams may bring together, even if some of them fail."""

    def __init__(self, most: int) -> None:
        self.most = self._left = most
        self._lock = threading.Lock()

    def lease(self) -> int:
        """All bytes that are left, for one stream.  What it does not use it gives back."""
        with self._lock:
            left, self._left = max(self._left, 0), min(self._left, 0)
            return left

    def give_back(self, size: int) -> None:
        with self._lock:
            self._left += size

    def spend(self, size: int) -> None:
        """ProtocolError when fewer than `size` bytes are left."""
        with self._lock:
            self._left -= size
            if self._left < 0:
                raise ProtocolError(
                    f"the source sent more than {self.most} bytes of memory images, which is the "
                    "limit for what it announced"
                )


@dataclass(frozen=True)
class Place:
    """Where the files of a stream go, and the limits that they must keep."""

    create: Callable[[str], int]
    """Opens a new file of that name, or raises when the name is refused."""
    reopen: Callable[[str], int] | None = None
    """Opens again a file that `create` has made.  None: each file must be complete before
    the next one begins."""
    largest: Callable[[str], int] = lambda _: LARGEST_FILE
    """Size of the file of that name at most, in bytes, holes included."""
    most_files: int = MOST_FILES
    budget: Budget | None = None
    """For the data of all pieces."""
    durable: bool = False
    """Whether each complete file is written to the disk before the next piece is read."""
    modes: int = 0o777
    """Mode bits that are taken over from the source."""
    completed: Callable[[str], None] = lambda _: None
    """Called with the name of each file that is complete."""


class Files:
    """The files of one stream.  At most MOST_OPEN of the incomplete ones are open."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._open: dict[str, int] = {}
        """The file whose last piece is the longest ago comes first."""
        self._began: set[str] = set()
        self._complete: dict[str, None] = {}
        self._names = self._bytes = 0

    def take(self, name: str, mode: int, pos: int, data: bytes) -> None:
        """Store one piece.  ProtocolError when it breaks a rule of the stream or a limit."""
        fd = self.admit(name, pos, len(data))
        if data:
            _write(fd, name, pos, data)
        else:
            self.complete(name, mode, pos)

    def admit(self, name: str, pos: int, length: int) -> int:
        """The descriptor for a piece with so many bytes of data.  ProtocolError when it
        breaks a rule of the stream or a limit."""
        place, fd = self._place, self._file(name)
        if pos + length > place.largest(name):
            raise ProtocolError(
                f"{name[:80]!r} is larger than {place.largest(name)} bytes, which is the limit"
            )
        self.count(length)
        if place.budget is not None:
            place.budget.spend(length)
        return fd

    def count(self, length: int) -> None:
        """So many bytes of data were taken."""
        self._bytes += length

    def complete(self, name: str, mode: int, size: int) -> None:
        """The piece that was admitted last ends its file."""
        place, fd = self._place, self._open[name]
        try:
            os.ftruncate(fd, size)
            os.fchmod(fd, mode & place.modes)
        except OSError as e:
            raise cannot_write(name, e) from e
        if place.durable:
            _sync(fd, name)
        self._close(name)
        self._complete[name] = None
        place.completed(name)

    def _file(self, name: str) -> int:
        if name in self._open:
            fd = self._open.pop(name)
        elif name not in self._began:
            fd = self._begin(name)
        elif self._place.reopen is None or name in self._complete:
            raise ProtocolError(f"the source sent more of {name[:80]!r} after its end")
        else:
            self._make_room()
            fd = self._place.reopen(name)
        self._open[name] = fd
        return fd

    def _begin(self, name: str) -> int:
        self._names += len(name)
        if len(self._began) >= self._place.most_files:
            raise ProtocolError(
                f"the source sent more than {len(self._began)} files, which is the limit"
            )
        if self._names > MOST_NAMES:
            raise ProtocolError(
                f"the names of the source's files have more than {MOST_NAMES} bytes together, "
                "which is the limit"
            )
        self._make_room()
        fd = self._place.create(name)
        self._began.add(name)
        return fd

    def _make_room(self) -> None:
        if len(self._open) < MOST_OPEN:
            return
        if self._place.reopen is None:
            raise ProtocolError(
                f"the source began another file while {MOST_OPEN} are not complete, which is the "
                "limit"
            )
        self._close(next(iter(self._open)))

    def _close(self, name: str) -> None:
        os.close(self._open.pop(name))

    def end(self) -> Received:
        """No more pieces come.  ProtocolError when a file is not complete."""
        if missing := self._began.difference(self._complete):
            raise ProtocolError(f"the file stream ended before {min(missing)!r} was complete")
        return Received(list(self._complete), self._bytes)

    def close(self) -> None:
        for name in list(self._open):
            self._close(name)


def receive(fd: int, stall: float, place: Place) -> Received:
    """Receive pieces until the stream ends.  Closes the descriptor."""
    reader = _Reader(fd, stall)
    files = Files(place)
    try:
        while (head := HEADER.unpack(reader.exactly(HEADER.size)))[0]:
            name_length, mode, length, pos = head
            check_piece(name_length, length, pos)
            name = decode_name(reader.exactly(name_length))
            files.take(name, mode, pos, reader.exactly(length))
        return files.end()
    finally:
        reader.close()
        files.close()


def check_piece(name_length: int, length: int, pos: int) -> None:
    """The numbers in its head, before anything else is read.  ProtocolError."""
    if name_length > LONGEST_NAME or length > LARGEST or pos + length > LARGEST_FILE:
        raise ProtocolError(
            f"the source sent a piece that is out of bounds: {length} bytes at byte {pos} "
            f"of a file, with a name of {name_length} bytes"
        )


def decode_name(raw: bytes) -> str:
    if b"\0" in raw:
        raise ProtocolError("the source sent a file whose name contains a NUL byte")
    return os.fsdecode(raw)


def cannot_write(name: str, e: OSError) -> WriteError:
    return WriteError.of(f"cannot write the incoming file {name[:80]!r}", e)


def cannot_read(e: OSError) -> ReadError:
    """The stream, not a file."""
    if isinstance(e, TimeoutError) or e.errno == errno.ETIMEDOUT:
        return ReadError(
            "the source sent less than 64 KiB within --timeout",
            hint="give `pyploop migrate` a longer --timeout if the connection is slow",
        )
    return ReadError.of("cannot read files from the source", e)


def ended_early() -> ReadError:
    return ReadError("the file stream ended too early: the source may have failed")


def _write(fd: int, name: str, pos: int, data: bytes) -> None:
    try:
        view = memoryview(data)
        while view:
            n = os.pwrite(fd, view, pos)
            view, pos = view[n:], pos + n
    except OSError as e:
        raise cannot_write(name, e) from e


def _sync(fd: int, name: str) -> None:
    try:
        fdatasync(fd)
        with contextlib.suppress(OSError):  # this is only advice to the kernel
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as e:
        raise SyncError.of(f"cannot sync the incoming file {name[:80]!r}", e) from e
