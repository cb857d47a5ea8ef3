# SPDX-License-Identifier: Apache-2.0
"""Files in a data channel, piece by piece: configuration and lower deltas while
the container runs, and a memory dump while it is being written.

A piece is `name length u16, mode u16, data length u32, position u64`, little
endian, then the name and the data.  One without data says that the file is
complete and `position` bytes long; one without a name ends the stream.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop._core import fdatasync
from pyploop.errors import ProtocolError, ReadError, SyncError, WriteError
from pyploop.runtimes import LARGEST_FILE
from pyploop.system.file_extents import data_extents
from pyploop.system.jobs import Job
from pyploop.system.peer_patience import Patience
from pyploop.units import KIB, MIB

HEADER = struct.Struct("<HHIQ")
LONGEST_NAME = 1024
PIECE = 256 * KIB
LARGEST = MIB
"""Bytes of data of one piece that are taken."""
MOST_FILES = 100_000
"""Of a container with more than 10,000 processes: CRIU writes seven or so for each."""
MOST_NAMES = 8 * MIB
"""Bytes of all names together."""
MOST_OPEN = 64
"""Files that are open at a time.  CRIU's grow one after the other."""
PLAIN = 0o666
"""Mode bits of a file that is no program, whatever its source has made of it."""


class Writer:
    """Pieces into a channel's descriptor, which it closes."""

    def __init__(self, fd: int, stall: float, rate: int = 0) -> None:
        """stall: seconds for the peer to take a piece; rate: bytes per second at
        most, 0 for any."""
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

    def grown(self, name: str, path: Path, pos: int) -> int:
        """What the file has from `pos` on; returns where it ends now."""
        with open(path, "rb", buffering=0) as f:
            while data := os.pread(f.fileno(), PIECE, pos):
                self.piece(name, 0o600, pos, data)
                pos += len(data)
        return pos

    def complete(self, name: str, mode: int, size: int) -> None:
        self.piece(name, mode, size, b"")

    def file(self, name: str, path: str) -> None:
        """A whole file, without its holes."""
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
            raise ReadError.of(f"cannot read {path}", e) from e

    def end(self) -> None:
        self._send(HEADER.pack(0, 0, 0, 0))

    def cancel(self) -> None:
        """From any thread: sending fails, and so does the peer's reading."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def stream_dump(folder: Path, out: Writer, dump: Job[Any]) -> None:
    """Send a folder of CRIU images that is being written until `dump` has ended;
    its failure is raised here too, and the stream has no end then.

    CRIU writes the pages strictly in order, and they are nearly all of it, so
    they go as they grow; the other files may be changed yet, and go at the end.
    """
    at: dict[str, int] = {}
    done = False
    while not done:
        done = dump.over.wait(0.002)
        for path in folder.glob("pages-*.img"):
            at[path.name] = out.grown(path.name, path, at.get(path.name, 0))
    dump.join()
    for path in sorted(folder.iterdir()):
        if path.name in at:
            out.complete(path.name, 0o600, at[path.name])
        elif path.is_file():  # and not the link to a pre-dump's folder
            out.file(path.name, str(path))
    out.end()


class _Reader:
    def __init__(self, fd: int, stall: float) -> None:
        self._sock = socket.socket(fileno=fd)
        self._patience = Patience(self._sock, stall)

    def exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            try:
                n = self._patience.recv_into(view[got:])
            except TimeoutError as e:
                raise ReadError("the source sent less than 64 KiB within --timeout") from e
            except OSError as e:
                raise ReadError.of("cannot read files from the source", e) from e
            if n == 0:
                raise ReadError("the stream of files ended too early: the source may have failed")
            got += n
        return bytes(data)

    def close(self) -> None:
        self._sock.close()


@dataclass(frozen=True)
class Received:
    """A whole stream: its files, in the order in which they ended, and bytes of data."""

    names: list[str]
    data: int


class Budget:
    """Bytes that some streams may bring together, whatever becomes of each."""

    def __init__(self, most: int) -> None:
        self.most = self._left = most
        self._lock = threading.Lock()

    def spend(self, size: int) -> None:
        """ProtocolError when it is not enough."""
        with self._lock:
            self._left -= size
            if self._left < 0:
                raise ProtocolError(
                    f"more than {self.most} bytes came, which is all that was announced"
                )


@dataclass(frozen=True)
class Place:
    """Where the files of a stream go, and how much they may be."""

    create: Callable[[str], int]
    """Opens a new file for a name, or refuses it."""
    reopen: Callable[[str], int] | None = None
    """The same for one that `create` made; None: each is complete before the next."""
    largest: Callable[[str], int] = lambda _: LARGEST_FILE
    """Bytes of the file of that name at most: where it may end, sparse or not."""
    most_files: int = MOST_FILES
    budget: Budget | None = None
    """Of the data of all pieces."""
    durable: bool = False
    """Each file is on the disk when it is complete."""
    modes: int = 0o777
    """Bits of the source's modes that are taken over."""


class _Files:
    """The files of one stream.  Of those that are not complete, MOST_OPEN are open."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._open: dict[str, int] = {}
        """The one that was longest in no piece comes first."""
        self._began: set[str] = set()
        self._complete: dict[str, None] = {}
        self._names = self._bytes = 0

    def take(self, name: str, mode: int, pos: int, data: bytes) -> None:
        """One piece.  ProtocolError when it may not come."""
        place, fd = self._place, self._file(name)
        if pos + len(data) > place.largest(name):
            raise ProtocolError(
                f"{name[:80]!r} is larger than {place.largest(name)} bytes, which is the limit"
            )
        self._bytes += len(data)
        if place.budget is not None:
            place.budget.spend(len(data))
        _put(fd, name, mode & place.modes, pos, data)
        if not data:
            if place.durable:
                _sync(fd, name)
            self._close(name)
            self._complete[name] = None

    def _file(self, name: str) -> int:
        if name in self._open:
            fd = self._open.pop(name)
        elif name not in self._began:
            fd = self._begin(name)
        elif self._place.reopen is None or name in self._complete:
            raise ProtocolError(f"{name[:80]!r} came after its end")
        else:
            self._make_room()
            fd = self._place.reopen(name)
        self._open[name] = fd
        return fd

    def _begin(self, name: str) -> int:
        self._names += len(name)
        if len(self._began) >= self._place.most_files or self._names > MOST_NAMES:
            raise ProtocolError(f"more than {len(self._began)} files came, which is the limit")
        self._make_room()
        fd = self._place.create(name)
        self._began.add(name)
        return fd

    def _make_room(self) -> None:
        if len(self._open) < MOST_OPEN:
            return
        if self._place.reopen is None:
            raise ProtocolError(f"{MOST_OPEN} files are not complete, and another one comes")
        self._close(next(iter(self._open)))

    def _close(self, name: str) -> None:
        os.close(self._open.pop(name))

    def end(self) -> Received:
        """No more pieces: each file must be complete."""
        if missing := self._began.difference(self._complete):
            raise ProtocolError(f"the stream ended before the end of {min(missing)!r}")
        return Received(list(self._complete), self._bytes)

    def close(self) -> None:
        for name in list(self._open):
            self._close(name)


def receive(fd: int, stall: float, place: Place) -> Received:
    """Take pieces until the end of the stream.  The descriptor is closed."""
    reader = _Reader(fd, stall)
    files = _Files(place)
    try:
        while (head := HEADER.unpack(reader.exactly(HEADER.size)))[0]:
            name_length, mode, length, pos = head
            if name_length > LONGEST_NAME or length > LARGEST or pos + length > LARGEST_FILE:
                raise ProtocolError(f"a piece of {length} bytes at {pos} is out of bounds")
            raw = reader.exactly(name_length)
            if b"\0" in raw:
                raise ProtocolError("a file's name with a NUL in it")
            files.take(os.fsdecode(raw), mode, pos, reader.exactly(length))
        return files.end()
    finally:
        reader.close()
        files.close()


def _put(fd: int, name: str, mode: int, pos: int, data: bytes) -> None:
    try:
        if not data:
            os.ftruncate(fd, pos)
            os.fchmod(fd, mode)
            return
        view = memoryview(data)
        while view:
            n = os.pwrite(fd, view, pos)
            view, pos = view[n:], pos + n
    except OSError as e:
        raise WriteError.of(f"cannot write {name}", e) from e


def _sync(fd: int, name: str) -> None:
    try:
        fdatasync(fd)
        with contextlib.suppress(OSError):  # only a hint
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as e:
        raise SyncError.of(f"cannot sync {name}", e) from e
