# SPDX-License-Identifier: Apache-2.0
"""Remove folders that a container or a source has filled.

A container can nest folders so deeply that no path is long enough.  So nothing here
recurses or builds paths.  Links are not followed and other file systems not entered.
When something cannot be removed, the rest still is.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

from pyploop.system.mount_table import number_of_file

MOST_SHOWN = 5
"""Failures that the message shows one by one."""
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class _Level:
    """A folder on the way down."""

    name: str
    """In the folder above."""
    inode: int
    below: list[str] = field(default_factory=list)
    """Folders in it that are still there."""


class _Failures:
    def __init__(self) -> None:
        self._shown: list[str] = []
        self._first = 0
        self.number = 0

    def add(self, levels: list[_Level], name: str, error: OSError) -> None:
        self.number += 1
        self._first = self._first or error.errno or errno.EIO
        if len(self._shown) < MOST_SHOWN:
            path = "/".join([level.name for level in levels[1:]] + [name])
            shown = path if len(path) <= 200 else f"{path[:100]}...{path[-90:]}"
            self._shown.append(f"{shown}: {error.strerror}")

    def check(self, path: str) -> None:
        if self.number:
            more = (
                f" (and {self.number - len(self._shown)} more)" if self.number > MOST_SHOWN else ""
            )
            raise OSError(self._first, f"not removed: {'; '.join(self._shown)}{more}", path)


def remove_contents(path: str) -> None:
    """Empty a folder, if it is there.  OSError names what could not be removed; the rest is
    gone.  Two descriptors are open at most, however deep the folder is."""
    try:
        fd = os.open(path, _FLAGS)
    except FileNotFoundError:
        return
    failures = _Failures()
    try:
        st = os.fstat(fd)
        mount = number_of_file(fd)
        levels = [_Level("", st.st_ino)]
        _enter(fd, levels, failures)
        while True:
            level = levels[-1]
            if level.below:
                fd = _down(fd, level.below.pop(), mount, levels, failures)
            elif len(levels) == 1:
                break
            else:
                fd = _up(fd, levels)
                _drop(fd, level.name, levels, failures, folder=True)
    finally:
        os.close(fd)
    failures.check(path)


def remove_tree(path: str) -> None:
    """`remove_contents`, and remove the folder itself."""
    remove_contents(path)
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return


def _enter(fd: int, levels: list[_Level], failures: _Failures) -> None:
    """Remove the folder's files, and note its folders."""
    try:
        with os.scandir(fd) as listing:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing]
    except OSError as e:
        failures.add(levels, "", e)
        return
    levels[-1].below = [name for name, folder in found if folder]
    for name, folder in found:
        if not folder:
            _drop(fd, name, levels, failures, folder=False)


def _drop(fd: int, name: str, levels: list[_Level], failures: _Failures, folder: bool) -> None:
    try:
        if folder:
            os.rmdir(name, dir_fd=fd)
        else:
            os.unlink(name, dir_fd=fd)
    except FileNotFoundError:
        pass
    except OSError as e:
        if e.errno != errno.ENOTEMPTY or not failures.number:  # else the reason is known
            failures.add(levels, name, e)


def _down(fd: int, name: str, mount: int | None, levels: list[_Level], failures: _Failures) -> int:
    try:
        below = os.open(name, _FLAGS, dir_fd=fd)
    except FileNotFoundError:
        return fd
    except OSError as e:
        failures.add(levels, name, e)
        return fd
    try:
        if number_of_file(below) != mount:
            raise OSError(errno.EBUSY, "something is mounted there")
        levels.append(_Level(name, os.fstat(below).st_ino))
    except OSError as e:
        os.close(below)
        failures.add(levels, name, e)
        return fd
    os.close(fd)
    _enter(below, levels, failures)
    return below


def _up(fd: int, levels: list[_Level]) -> int:
    """Back to the folder above.  OSError when the one below was moved meanwhile:
    its `..` would be somewhere else."""
    levels.pop()
    above = os.open("..", _FLAGS, dir_fd=fd)
    if os.fstat(above).st_ino != levels[-1].inode:
        os.close(above)
        raise OSError(errno.EAGAIN, "its folders are being moved while they are removed")
    os.close(fd)
    return above
