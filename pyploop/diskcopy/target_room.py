# SPDX-License-Identifier: Apache-2.0
"""Room for a copy: checked before the first byte, and watched while the copy grows on
a file system that its source needs, too.

A sparse source in use grows.  If the copy filled the file system below it, its users
would get I/O errors: so the copy fails before that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pyploop.disks import backing
from pyploop.disks.backing import Below, Thing
from pyploop.disks.source import Source
from pyploop.errors import WriteError
from pyploop.system import kernel
from pyploop.units import GIB, SECTOR, format_size

PART = 0.05
LEAST = GIB
"""The default reserve is this part of the free bytes, and at least LEAST bytes, but at
most half of the free bytes."""
WITHOUT_HOLES = ("vfat", "msdos", "exfat")


def default_reserve(free: int) -> int:
    return min(max(int(free * PART), LEAST), free // 2)


def free_bytes(path: str, *, of_all: bool = False) -> int | None:
    """Bytes that this process may still write there; None: not known.  of_all: that every
    process may, without what ext4 reserves for root."""
    try:
        st = os.statvfs(path)
    except OSError:
        return None
    if not st.f_blocks:
        return None
    root = os.geteuid() == 0 and not of_all
    free = (st.f_bfree if root else st.f_bavail) * st.f_frsize
    return min(free, _memory()) if _is_tmpfs(path) else free


def _is_tmpfs(path: str) -> bool:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            return kernel.is_tmpfs(fd, path)
        finally:
            os.close(fd)
    return False


def _memory() -> int:
    """Free bytes of memory and swap, for a file system in memory."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return (values["MemAvailable"] + values["SwapFree"]) << 10


def data_of(source: Source, enough: int | None = None) -> int:
    """Bytes that a copy of the source takes now, by the holes of its file; 0: not known.
    enough: a result up to this need not be exact, but is not too small."""
    fd = source.fd if source.sparse_fd is None else source.sparse_fd
    st = os.fstat(fd)
    if not stat.S_ISREG(st.st_mode):
        return 0
    allocated = min(st.st_blocks * SECTOR, source.size)
    if enough is not None and allocated <= enough:
        return allocated
    return sum(end - start for start, end in source.holes()[0])


def of_target(target: Below) -> tuple[int | None, str]:
    """Bytes that the target may still grow, and the file system that limits it: of those
    below it, the one that is full first.  None: not known."""
    room: int | None = None
    where = ""
    for fs in target.file_systems:
        free = free_bytes(fs.path)
        if free is None or (fs.growth is not None and fs.growth <= free):
            continue
        if room is None or free < room:
            room, where = free, fs.name
    return room, where


def check_size(fd: int, size: int, fstype: str, path: str) -> None:
    """WriteError when the file system, or a limit of this process, does not allow a file
    of `size` bytes.  It is tried now, since it would show only at the end."""
    try:
        if size >> 63:  # no file has, and no call takes it
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if fstype in WITHOUT_HOLES:
            _check_position(fd, size)
            return
        before = os.fstat(fd).st_size
        if size > before:
            os.ftruncate(fd, size)
            os.ftruncate(fd, before)
    except OSError as e:
        raise WriteError.of(
            f"{path} cannot become {size} bytes large, as the source is (a limit of its file "
            "system, or of this process: ulimit -f); nothing was copied",
            e,
            path=path,
        ) from e


def _check_position(fd: int, size: int) -> None:
    """By a seek to that position: to set the size would write zeroes here."""
    probe = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.lseek(probe, size, os.SEEK_SET)
    except OSError as e:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG)) from e
    finally:
        os.close(probe)


def check(source: Source, room: int | None, where: str) -> None:
    """WriteError when the source has more data than there is room."""
    if room is not None and (data := data_of(source, room)) > room:
        raise WriteError(
            f"{source.path} has {format_size(data)} of data, and {where} has room for "
            f"{format_size(room)}; nothing was copied (--reserve 0 copies anyway)"
        )


@dataclass(frozen=True)
class Watched:
    """A file system that the source and the target share."""

    name: str
    path: str
    reserve: int

    def check(self) -> None:
        free = free_bytes(self.path, of_all=True)
        if free is not None and free < self.reserve:
            raise WriteError(
                f"stopped so that the source keeps {format_size(self.reserve)} free to grow "
                f"(--reserve): {self.name}, where both lie, has {format_size(free)} left; no "
                "target was made"
            )


def shared(source: Source, things: set[Thing], reserve: int | None, has: int = 0) -> list[Watched]:
    """The file systems below both source and target, to be watched.  WriteError when the
    copy does not fit beside the reserve.  has: bytes that the target has already."""
    found = []
    for fs in backing.of_source(source).file_systems:
        if (*fs.number, 0) not in things:
            continue
        free = free_bytes(fs.path, of_all=True)
        if free is None:
            continue
        keep = default_reserve(free) if reserve is None else reserve
        left = free - keep + has
        if (data := data_of(source, max(left, 0))) > left:
            raise WriteError(
                f"{source.path} has {format_size(data)} of data, and its copy would lie on the "
                f"file system on which the source grows ({fs.name}): {format_size(free)} are free, "
                f"of which {format_size(keep)} are left to the source (--reserve); nothing was "
                "copied",
                path=source.path,
                hint="copy to another file system, or leave less to the source (--reserve)",
            )
        found.append(Watched(fs.name, fs.path, keep))
    return found
