# SPDX-License-Identifier: Apache-2.0
"""Folders whose contents decide what root does: locks, journals, records, dumps.

A user who can write to such a folder, or replace it, decides that, too.  So each use
opens the folder anew and checks the opened folder.  Its files are reached only through
that descriptor.

    with private_folder.opened(Path("/run/pyploop"), make=True) as folder:
        private_folder.replace(folder, "7.json", data)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pyploop.errors import OpenError

MOST_LINKS = 40
"""Symbolic links on the way to one file: the kernel's own limit."""
LARGEST = 64 << 20
"""Bytes of one file here.  A journal has an entry for each step."""
GUARD = ".pyploop.guard"
"""This file is locked instead of a folder that others can read, such as vzctl's.  It is
removed after use."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def check_way(path: Path) -> None:
    """OpenError unless only root and this user can change each folder above, and each
    symbolic link on the way.  The end of the path is not checked, and may be missing."""
    here, links = "/", 0
    # Not normalised: after a link, `..` leads to another folder.
    whole = path if path.is_absolute() else Path(os.getcwd(), path)
    todo = [*reversed(whole.parts[1:])]
    while todo:
        _check_above(here, path)
        name = todo.pop()
        step = os.path.dirname(here) if name == ".." else os.path.join(here, name)
        try:
            st = os.lstat(step)
        except FileNotFoundError:
            return
        if not stat.S_ISLNK(st.st_mode):
            here = step
            continue
        links += 1
        if links > MOST_LINKS:
            raise OpenError(f"{path}: too many symbolic links")
        if st.st_uid not in (0, os.geteuid()):
            raise OpenError(
                f"{path} is not used: user {st.st_uid} owns the link {step} in it", path=step
            )
        text = os.readlink(step)
        here = "/" if text.startswith("/") else here
        todo += reversed([part for part in text.split("/") if part not in ("", ".")])


def _check_above(folder: str, path: Path) -> None:
    st = os.lstat(folder)
    if st.st_uid not in (0, os.geteuid()):
        raise OpenError(
            f"{path} is not used: {folder} above it belongs to user {st.st_uid}",
            path=folder,
            hint="choose a folder that only root and this user can move or replace",
        )
    # In a folder with the sticky bit (/tmp) others cannot replace what is ours.
    if st.st_mode & 0o022 and not st.st_mode & stat.S_ISVTX:
        mode = stat.S_IMODE(st.st_mode)
        raise OpenError(
            f"{path} is not used: others can write to {folder} above it ({mode:04o})",
            path=folder,
            hint=f"chmod go-w {folder}, or choose another folder",
        )


@contextlib.contextmanager
def opened(path: Path, *, make: bool = False, private: bool = False) -> Iterator[int]:
    """The folder's descriptor.  OpenError unless it is a folder of this user that no other
    can write to, or (private) read.  make: make it (0700) with those above it when it is
    missing; else FileNotFoundError."""
    check_way(path)
    if make and not os.path.lexists(path):
        _make(path)
        check_way(path)
    fd = _open(path)
    try:
        _check(fd, path, 0o077 if private else 0o022)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def reopened(path: Path) -> Iterator[int]:
    """`opened` for a folder that was checked before, with the way to it.  Checks only that
    it is still ours, which takes microseconds."""
    fd = _open(path)
    try:
        _check(fd, path, 0o022)
        yield fd
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    try:
        return os.open(path, _FOLDER)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENOTDIR):
            why = "it is a file or a symbolic link, and is not used"
            raise OpenError(f"{path} is not a folder of our own: {why}") from None
        raise


def _make(path: Path) -> None:
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)


def _check(fd: int, path: Path, forbidden: int) -> None:
    st = os.fstat(fd)
    if st.st_uid != os.geteuid():
        raise OpenError(
            f"{path} is not a folder of our own: it belongs to user {st.st_uid}, not to "
            f"{os.geteuid()}; nothing in it is used (remove it, or choose another folder)"
        )
    if mode := stat.S_IMODE(st.st_mode) & forbidden:
        what = "write to it" if mode & 0o022 else "look into it"
        raise OpenError(
            f"{path} is not a folder of our own: others can {what} (mode "
            f"{stat.S_IMODE(st.st_mode):04o}); nothing in it is used (see what is in it, then "
            "chmod it)"
        )


def make_new(path: Path) -> None:
    """Make a folder (0700) that no other user can read or change.  The one above may be
    shared with others (/dev/shm).  FileExistsError when the name is taken."""
    check_way(path)
    _make(path.parent)
    check_way(path)
    os.mkdir(path, 0o700)
    with reopened(path):
        pass


def is_ours(path: Path) -> bool:
    """True for a folder (not a link) that this user owns, and for a path that is free."""
    try:
        st = os.lstat(path)
    except FileNotFoundError:
        return True
    return stat.S_ISDIR(st.st_mode) and st.st_uid == os.geteuid()


def read_trusted(path: str) -> tuple[str, bytes]:
    """(the path without links, the contents) of a file that decides what root does, such as
    a configuration.  OpenError unless only root and this user can change or replace it;
    OSError."""
    check_way(Path(path))
    real = os.path.realpath(path)
    with open(os.open(real, os.O_RDONLY | _FILE), "rb") as f:
        st = os.fstat(f.fileno())
        if not stat.S_ISREG(st.st_mode):
            raise OpenError(f"{path} is not a regular file")
        if st.st_uid not in (0, os.geteuid()):
            raise OpenError(f"{path} is not used: it belongs to user {st.st_uid}", path=path)
        if st.st_mode & 0o022:
            mode = stat.S_IMODE(st.st_mode)
            raise OpenError(
                f"{path} is not used: others can write to it ({mode:04o}; chmod go-w)", path=path
            )
        return real, f.read(LARGEST)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder below TMPDIR that is removed after the body.  OpenError when others could
    replace it."""
    check_way(Path(tempfile.gettempdir()) / "x")
    with tempfile.TemporaryDirectory(prefix="pyploop-") as name:
        yield Path(name)


# ---- files in such a folder


@contextlib.contextmanager
def alone(folder: int, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock on this folder.  wait: wait for other processes that hold it; else
    BlockingIOError.  A user who can open a folder, if only to read it, can lock it for
    ever.  So where others can read the folder, a private file in it is locked instead."""
    how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    if not os.fstat(folder).st_mode & 0o044:
        fcntl.flock(folder, how)
        try:
            yield
        finally:
            fcntl.flock(folder, fcntl.LOCK_UN)
        return
    while True:
        fd = open_file(folder, GUARD, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, how)
            if not os.fstat(fd).st_nlink:
                continue  # its last owner has removed it
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(GUARD, dir_fd=folder)
            return
        finally:
            os.close(fd)


def create(folder: int, name: str) -> int:
    """A new file (0600).  FileExistsError for anything that has the name."""
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE, 0o600, dir_fd=folder)


def open_file(folder: int, name: str, flags: int = os.O_RDONLY) -> int:
    """OpenError unless it is a regular file of this user."""
    try:
        fd = os.open(name, flags | _FILE, 0o600, dir_fd=folder)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise OpenError(f"{name} is not a regular file: not used") from None
        raise
    st = os.fstat(fd)
    if not stat.S_ISREG(st.st_mode) or st.st_uid != os.geteuid():
        os.close(fd)
        regular = stat.S_ISREG(st.st_mode)
        why = f"belongs to user {st.st_uid}" if regular else "is not a regular file"
        raise OpenError(f"{name} {why}: not used")
    return fd


def read(folder: int, name: str, limit: int = LARGEST) -> bytes:
    """The file's contents, `limit` bytes at most."""
    with open(open_file(folder, name), "rb") as f:
        return f.read(limit)


def read_path(path: Path) -> bytes:
    """`read` of a file in a folder whose way was checked before."""
    with reopened(path.parent) as folder:
        return read(folder, path.name)


def replace(folder: int, name: str, data: bytes, *, durable: bool = False) -> None:
    """Replace the file in one step: a reader sees the old contents or the new ones."""
    new = f"{name}.new"
    with contextlib.suppress(FileNotFoundError):  # left by a crash
        os.unlink(new, dir_fd=folder)
    try:
        with open(create(folder, new), "wb") as f:
            f.write(data)
            if durable:
                f.flush()
                os.fsync(f.fileno())
        os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=folder)
        raise
    if durable:
        os.fsync(folder)
