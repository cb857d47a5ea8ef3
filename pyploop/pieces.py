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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyploop._core import fdatasync
from pyploop.errors import ProtocolError, ReadError, SyncError, WriteError
from pyploop.holes import data_extents
from pyploop.jobs import Job
from pyploop.units import KIB, MIB

HEADER = struct.Struct("<HHIQ")
LONGEST_NAME = 1024
PIECE = 256 * KIB
LARGEST = MIB
"""Bytes of data of one piece that are taken."""
LARGEST_FILE = 1 << 50
MOST_FILES = 100_000


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
        self._sock.settimeout(stall)

    def exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            try:
                n = self._sock.recv_into(view[got:])
            except OSError as e:
                raise ReadError.of("cannot read files from the source", e) from e
            if n == 0:
                raise ReadError("the source's files ended early (did it fail?)")
            got += n
        return bytes(data)

    def close(self) -> None:
        self._sock.close()


def receive(fd: int, stall: float, create: Callable[[str], int], durable: bool) -> list[str]:
    """Take pieces until the end of the stream; returns the files' names.

    create: opens a new file for a name, or refuses it.  durable: each file is
    on the disk when this returns.  The descriptor is closed.
    """
    reader = _Reader(fd, stall)
    files: dict[str, int] = {}
    complete: set[str] = set()
    try:
        while (head := HEADER.unpack(reader.exactly(HEADER.size)))[0]:
            name_length, mode, length, pos = head
            if name_length > LONGEST_NAME or length > LARGEST or pos + length > LARGEST_FILE:
                raise ProtocolError(f"a piece of {length} bytes at {pos} is not one that may come")
            name = os.fsdecode(reader.exactly(name_length))
            data = reader.exactly(length)
            if name in complete or len(files) > MOST_FILES:
                raise ProtocolError(f"{name!r} came after its end")
            if name not in files:
                files[name] = create(name)
            _put(files[name], name, mode, pos, data)
            if not data:
                complete.add(name)
        if missing := set(files) - complete:
            raise ProtocolError(f"the stream ended before the end of {sorted(missing)[0]!r}")
        if durable:
            _sync(files)
        return list(files)
    finally:
        reader.close()
        for file in files.values():
            os.close(file)


def _put(fd: int, name: str, mode: int, pos: int, data: bytes) -> None:
    try:
        if not data:
            os.ftruncate(fd, pos)
            os.fchmod(fd, mode & 0o7777)
            return
        view = memoryview(data)
        while view:
            n = os.pwrite(fd, view, pos)
            view, pos = view[n:], pos + n
    except OSError as e:
        raise WriteError.of(f"cannot write {name}", e) from e


def _sync(files: dict[str, int]) -> None:
    for name, fd in files.items():
        try:
            fdatasync(fd)
            with contextlib.suppress(OSError):  # only a hint
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as e:
            raise SyncError.of(f"cannot sync {name}", e) from e
