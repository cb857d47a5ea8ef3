# SPDX-License-Identifier: Apache-2.0
"""Writing into a folder, and making durable there.  The file has no name, and is gone when
it is closed."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

from pyploop import _core
from pyploop.bench.stages import Stage, rates, times
from pyploop.errors import CreateError, WriteError
from pyploop.units import BLOCK, MIB

PIECE = MIB
"""Bytes of one write."""
PART = 32 * MIB
"""Bytes of one sample of writing."""
MOST = 1024 * MIB
"""Bytes of the file at most; then it is written from its beginning again."""
ROOM = 8
"""The part of the free space that is used at most: one of so many."""
DIRECT, BUFFERED, SYNC = "write, O_DIRECT", "write, buffered", "fdatasync"


def measure(folder: str, seconds: float) -> list[Stage]:
    """CreateError if no file can be made there, WriteError if it cannot be written."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise CreateError.of(f"cannot make a file in {folder}", e, path=folder) from e
    try:
        free = os.fstatvfs(fd)
        most = min(MOST, free.f_bavail * free.f_frsize // ROOM) // PART * PART
        if not most:
            raise WriteError(
                f"cannot measure writing in {folder}: less than {PART * ROOM // MIB} MiB are free",
                path=folder,
            )
        with mmap.mmap(-1, PIECE) as page:
            page.write(os.urandom(PIECE))
            return [_direct(folder, fd, page, most, seconds), *_buffered(fd, page, most, seconds)]
    except OSError as e:
        raise WriteError.of(f"cannot write a file in {folder}", e, path=folder) from e
    finally:
        os.close(fd)


def _direct(folder: str, fd: int, page: mmap.mmap, most: int, seconds: float) -> Stage:
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return Stage(DIRECT, "bytes/s", (), f"the file system of {folder} does not take it")
    try:
        return Stage(DIRECT, "bytes/s", rates(seconds, _writer(direct, page, most)), "1 MiB each")
    finally:
        os.close(direct)


def _buffered(fd: int, page: mmap.mmap, most: int, seconds: float) -> list[Stage]:
    write = _writer(fd, page, most)

    def one() -> int:
        done = write()
        _core.fdatasync(fd)
        return done

    def sync() -> None:
        os.pwrite(fd, page[:BLOCK], 0)
        _core.fdatasync(fd)

    return [
        Stage(BUFFERED, "bytes/s", rates(seconds, one), "32 MiB each, with fdatasync"),
        Stage(SYNC, "s", times(seconds, sync), "after 4 KiB"),
    ]


def _writer(fd: int, page: mmap.mmap, most: int) -> Callable[[], int]:
    at = 0

    def one() -> int:
        nonlocal at
        for _ in range(PART // PIECE):
            done = 0
            with memoryview(page) as memory:
                while done < PIECE:
                    done += os.pwrite(fd, memory[done:], at + done)
            at = (at + PIECE) % most
        return PART

    return one
