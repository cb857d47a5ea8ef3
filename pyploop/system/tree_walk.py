# SPDX-License-Identifier: Apache-2.0
"""Go through folders while another program, such as a container, changes them.

Each folder is opened from the open one above it, so a folder that becomes a link meanwhile
is not followed.  Nothing recurses, two descriptors are open at most, and no path is built,
so names may be longer than a path can be.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENODEV}
Entry = os.DirEntry[str]


@dataclass
class _Level:
    """A folder on the way down."""

    name: str
    identity: tuple[int, int]
    below: list[str] = field(default_factory=list)
    """Folders in it that are still to be visited."""


def walk(top: str) -> Iterator[tuple[list[str], int, Iterator[Entry]]]:
    """Each folder of the top's file system, the top first: (names from the top
    on, its descriptor, its entries), good until the next one is asked for.  What
    goes away, or is moved, meanwhile is left out.  OSError.

    Entries are read one by one: a folder may have any number of them."""
    first = fd = os.open(top, FLAGS)
    try:
        levels = [_Level("", _identity(fd))]
        while True:
            entries = _entries(fd, levels[-1].below)
            yield [level.name for level in levels[1:]], fd, entries
            for _ in entries:  # those that nobody has looked at
                pass
            entered = False
            while not entered:
                if levels[-1].below:
                    below = _down(fd, levels)
                    entered = below >= 0
                elif len(levels) == 1:
                    return
                else:
                    below = _up(first, fd, levels)
                if below >= 0 and below != fd:
                    if fd != first:
                        os.close(fd)
                    fd = below
    finally:
        if fd != first:
            os.close(fd)
        os.close(first)


def _identity(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


def _entries(fd: int, below: list[str]) -> Iterator[Entry]:
    """below: gets the names of folders."""
    try:
        with os.scandir(fd) as listing:
            for entry in listing:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.name)
                yield entry
    except OSError as e:
        if e.errno not in _GONE:
            raise


def _open(name: str, fd: int) -> int:
    """Its descriptor; -1 when it is gone, or is not a folder."""
    try:
        return os.open(name, FLAGS, dir_fd=fd)
    except OSError as e:
        if e.errno in _GONE:
            return -1
        raise


def _down(fd: int, levels: list[_Level]) -> int:
    """Into the next folder below; -1 when it is gone, or is on another file system."""
    name = levels[-1].below.pop()
    below = _open(name, fd)
    if below >= 0:
        identity = _identity(below)
        if identity[0] != levels[0].identity[0]:
            os.close(below)
            return -1
        levels.append(_Level(name, identity))
    return below


def _up(first: int, fd: int, levels: list[_Level]) -> int:
    """To the folder above.  If the current one was moved: to the nearest folder that is
    still in its place."""
    levels.pop()
    if len(levels) == 1:
        return first
    above = _open("..", fd)
    if above >= 0:
        if _identity(above) == levels[-1].identity:
            return above
        os.close(above)
    return _again(first, levels)


def _again(first: int, levels: list[_Level]) -> int:
    """Open by name from the top on.  Folders that were moved are dropped from the levels."""
    fd = first
    for number, level in enumerate(levels[1:], 1):
        below = _open(level.name, fd)
        if below >= 0 and _identity(below) != level.identity:
            os.close(below)
            below = -1
        if below < 0:
            del levels[number:]
            break
        if fd != first:
            os.close(fd)
        fd = below
    return fd
