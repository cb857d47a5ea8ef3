# SPDX-License-Identifier: Apache-2.0
"""Files below a folder whose contents another user may have made.  No name and no symbolic
link in it leads out of it.

A path is opened once, as a descriptor of the folder above its last part.  All later calls
use that descriptor and the last part.  So it does not matter when a folder on the way is
replaced meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from pyploop.system import kernel

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Place(NamedTuple):
    """The place of a file that is there or will be made."""

    dir_fd: int
    """The folder above, opened with O_PATH: only for the *at() calls."""
    name: str
    path: str
    """The whole path, for messages."""


def parts_of(root: str, path: str) -> list[str]:
    """The names that lead from the root to the path.  OSError (EXDEV) when the path
    is not below the root as it is written."""
    top = root.rstrip("/") + "/"
    parts = path[len(top) :].split("/")
    if not path.startswith(top) or "\0" in path or {"", ".", ".."} & {*parts}:
        raise OSError(errno.EXDEV, f"it does not lie below {root}", path)
    return parts


@contextlib.contextmanager
def place(path: str, root: str = "") -> Iterator[Place]:
    """root: an absolute folder above the path whose contents are not trusted.  The root
    itself is opened by its name, so everything above it must be trusted.  Without a root,
    the folder above the path is trusted.  OSError: ELOOP for a symbolic link below the root,
    EXDEV for a path that leads out of it, ENOENT, ENOTDIR."""
    above, name = os.path.split(path)
    parts = parts_of(root, path) if root else parts_of("/", f"/{name}")
    fd = os.open(root or above, _FOLDER)
    try:
        if len(parts) > 1:
            fd, top = _below(fd, parts[:-1], path), fd
            os.close(top)
        yield Place(fd, parts[-1], path)
    finally:
        os.close(fd)


def _below(fd: int, parts: list[str], path: str) -> int:
    try:
        return kernel.open_beneath(fd, "/".join(parts), _FOLDER)
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.EPERM):  # older container runtimes say EPERM
            raise OSError(e.errno, e.strerror, path) from None
    return walk(fd, parts, path)


def walk(fd: int, parts: list[str], path: str) -> int:
    """What openat2 does, on the kernels of OpenVZ that do not have it."""
    at = os.dup(fd)
    for part in parts:
        try:
            below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
        except OSError as e:
            why = errno.ELOOP if e.errno == errno.ENOTDIR and _is_link(part, at) else e.errno
            raise OSError(why, os.strerror(why or 0), path) from None
        finally:
            os.close(at)
        at = below
    return at


def _is_link(name: str, dir_fd: int) -> bool:
    try:
        os.readlink(name, dir_fd=dir_fd)
    except OSError:
        return False
    return True


def exists(at: Place) -> bool:
    """Something has this name; a dangling link counts, too."""
    try:
        os.lstat(at.name, dir_fd=at.dir_fd)
    except FileNotFoundError:
        return False
    return True


def create(at: Place) -> int:
    """A new empty file (0600), open for writing.  FileExistsError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(at.name, flags, 0o600, dir_fd=at.dir_fd)


def remove(at: Place) -> None:
    """A file or a link; nothing if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(at.name, dir_fd=at.dir_fd)
