# SPDX-License-Identifier: Apache-2.0
"""What is mounted where, as the kernel's mount tables tell it.

Device numbers do not: those of a btrfs subvolume differ from its folder's with
nothing mounted there, and those of a bind mount may be the same.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pyploop.system import sysblock

OWN = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Entry:
    """One line of a mountinfo."""

    number: int
    dev: tuple[int, int]
    """Of the file system; anonymous ones have major 0."""
    root: str
    """What of the file system is mounted: a path within it."""
    point: str
    fstype: str
    source: str
    options: str
    """Of the file system, not of this mount."""

    def device(self) -> tuple[int, int] | None:
        """The block device that is mounted; None: there is none, as on tmpfs."""
        if self.dev[0]:
            return self.dev
        try:
            st = os.stat(self.source)
        except (OSError, ValueError):
            return None
        if not self.source.startswith("/") or not stat.S_ISBLK(st.st_mode):
            return None
        return os.major(st.st_rdev), os.minor(st.st_rdev)


def read(path: Path = OWN) -> list[Entry]:
    """All of it, in the order of mounting.  OSError."""
    found = []
    # Bytes: a name may hold anything but what the kernel escapes.
    for line in os.fsdecode(path.read_bytes()).split("\n"):
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(rest) < 2:
            continue
        major, _, minor = fields[2].partition(":")
        found.append(
            Entry(
                int(fields[0]),
                (int(major), int(minor)),
                sysblock.unescape(fields[3]),
                sysblock.unescape(fields[4]),
                rest[0],
                sysblock.unescape(rest[1]),
                sysblock.unescape(rest[2]) if len(rest) > 2 else "",
            )
        )
    return found


def number_of(path: str) -> int:
    """Of the mount on which the file lies that a path leads to.  OSError."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as f:
            return next(int(x.split()[1]) for x in f if x.startswith("mnt_id:"))
    finally:
        os.close(fd)


def holding(path: str) -> Entry | None:
    """The mount on which it lies; None: it is not there."""
    try:
        number = number_of(path)
    except FileNotFoundError:
        return None
    return next((e for e in read() if e.number == number), None)


def at(path: str) -> Entry | None:
    """The mount that is seen at this very path: None when nothing is mounted
    on it, or that is hidden by a mount further up."""
    real = os.path.realpath(path)
    try:
        number = number_of(real)
    except FileNotFoundError:
        return None
    except OSError:  # mounted, and dead: a server that is gone
        return next((e for e in reversed(read()) if e.point == real), None)
    found = next((e for e in read() if e.number == number), None)
    return found if found is not None and found.point == real else None


def below(path: str) -> list[Entry]:
    """What is mounted, and can be seen, below this folder."""
    real = os.path.realpath(path)
    return [e for e in read() if within(e.point, real, itself=False) and _is_seen(e)]


def _is_seen(entry: Entry) -> bool:
    try:
        return number_of(entry.point) == entry.number
    except FileNotFoundError:
        return False
    except OSError:
        return True


def within(path: str, folder: str, itself: bool = True) -> bool:
    """Below the folder by its name, or the folder itself."""
    if path == folder:
        return itself
    return path.startswith(folder.rstrip("/") + "/")


def path_in(entry: Entry, path: str) -> str:
    """Where a file of the mount lies within its file system."""
    rest = path[len(entry.point.rstrip("/")) :].lstrip("/")
    return f"{entry.root.rstrip('/')}/{rest}".rstrip("/") or "/"
