# SPDX-License-Identifier: Apache-2.0
"""Locks: which process may touch a container, and how many migrations a host has at once.

A container's lock is the one of vzctl and vzmigrate: LOCKDIR/CTID.lck, which contains the
owner's PID.  It appears whole or not at all, as with O_EXCL.  So vzctl respects our lock
(under it we call vzctl with --skiplock), and we respect vzctl's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pyploop.errors import BusyError, CreateError, OpenError
from pyploop.system import private_folder

POLL = 0.1
"""Seconds between two attempts to get a place on a host that has none free."""
MAX_LOCK = 64
"""Bytes that are read of a lock file: it contains a number."""


@contextlib.contextmanager
def container_lock(folder: Path, ctid: str) -> Iterator[None]:
    """Have the lock FOLDER/CTID.lck.  BusyError while its owner lives.  A lock whose owner
    is dead is taken over."""
    name = f"{ctid}.lck"
    try:
        # Only one of two processes that find the same stale lock may take it over.
        with private_folder.opened(folder, make=True) as fd, private_folder.alone(fd):
            _remove_stale(fd, name)
            _make(fd, folder / name, f"container {ctid} is locked ({folder / name}, process {{}})")
    except OSError as e:
        raise CreateError.of(
            f"cannot make the lock of container {ctid}, {folder / name}",
            e,
            path=str(folder / name),
        ) from e
    try:
        yield
    finally:
        with contextlib.suppress(OSError, OpenError), private_folder.opened(folder) as fd:
            if _owner(fd, name) == os.getpid():
                os.unlink(name, dir_fd=fd)


def remove_dead(folder: Path) -> None:
    """Remove the locks whose owners are dead."""
    with (
        contextlib.suppress(FileNotFoundError),
        private_folder.opened(folder) as fd,
        private_folder.alone(fd),
    ):
        for name in os.listdir(fd):
            if name.endswith(".lck"):
                _remove_stale(fd, name)


def _make(folder: int, path: Path, taken: str) -> None:
    """taken: the message of the BusyError, with {} for the owner's PID."""
    # Made under another name first, so that a lock is never seen without its PID.
    name = path.name
    temp = f".{name}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):  # left by a process that was killed here
        os.unlink(temp, dir_fd=folder)
    fd = private_folder.create(folder, temp)
    try:
        os.write(fd, f"{os.getpid()}\n".encode())
        os.link(temp, name, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        owner = _owner(folder, name) or "?"
        raise BusyError(
            taken.format(owner), path=str(path), hint="wait for that process to end"
        ) from None
    finally:
        os.close(fd)
        os.unlink(temp, dir_fd=folder)


def _remove_stale(folder: int, name: str) -> None:
    owner = _owner(folder, name)
    if owner is None:
        return
    # An empty lock is being written at this moment, or was left by a crash.  Only its age
    # can tell.
    if owner == 0 and time.time() - os.stat(name, dir_fd=folder).st_mtime < 60:
        return
    if owner and (owner == os.getpid() or _may_own(owner)):
        return
    os.unlink(name, dir_fd=folder)


def _may_own(pid: int) -> bool:
    """Whether this process could have made a lock here.  The PID may have passed to a
    process of another user, who could then keep the container locked."""
    try:
        return os.stat(f"/proc/{pid}").st_uid in (0, os.geteuid())
    except OSError:
        return False


def _owner(folder: int, name: str) -> int | None:
    """The PID in the lock file.  0: the file contains no PID.  None: there is no file."""
    try:
        text = private_folder.read(folder, name, MAX_LOCK)
    except FileNotFoundError:
        return None
    try:
        return max(int(text.split()[0]), 0)
    except (ValueError, IndexError):
        return 0


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make other processes that do the same with this folder wait."""
    with private_folder.opened(folder) as fd, private_folder.alone(fd):
        yield


@contextlib.contextmanager
def host_slot(folder: Path, slots: int, wait: float) -> Iterator[None]:
    """Have one of this host's `slots` places for migrations.  It is a lock in the kernel, so
    a killed owner frees it.  BusyError when none is free within `wait` seconds."""
    deadline = time.monotonic() + wait
    try:
        with private_folder.opened(folder, make=True) as places:
            while (fd := _free_slot(places, slots)) is None:
                if time.monotonic() >= deadline:
                    raise BusyError(
                        f"{slots} migrations are under way on this host, which is the limit",
                        path=str(folder),
                        hint="wait for one to end, or raise `migrations` in migrate.toml",
                    )
                time.sleep(POLL)
    except OSError as e:
        raise CreateError.of(
            f"cannot lock one of the host's places for migrations in {folder}",
            e,
            path=str(folder),
        ) from e
    try:
        yield
    finally:
        os.close(fd)


def _free_slot(folder: int, slots: int) -> int | None:
    for number in range(slots):
        fd = private_folder.open_file(folder, f"migration.{number}", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        return fd
    return None
