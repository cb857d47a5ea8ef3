# SPDX-License-Identifier: Apache-2.0
"""Which process may touch a container, and how many migrations a host takes at once.

The lock is vzctl's and vzmigrate's own: LOCKDIR/CTID.lck, made with O_EXCL,
holding the owner's PID, so that vzctl respects ours (it is called with
--skiplock under it) and we respect theirs.
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
"""Seconds between looks at the slots of a host that is full."""
MAX_LOCK = 64
"""Bytes read of a lock file: it holds a number."""


@contextlib.contextmanager
def container_lock(folder: Path, ctid: str) -> Iterator[None]:
    """Hold FOLDER/CTID.lck.  BusyError while its owner lives; a lock whose
    owner is gone is taken over."""
    name = f"{ctid}.lck"
    try:
        # Two processes that find the same stale lock must not both take it over.
        with private_folder.opened(folder, make=True) as fd, private_folder.alone(fd):
            _remove_stale(fd, name)
            _make(fd, name, f"container {ctid} is locked ({folder / name}, process {{}})")
    except OSError as e:
        raise CreateError.of(f"cannot lock container {ctid} with {folder / name}", e) from e
    try:
        yield
    finally:
        with contextlib.suppress(OSError, OpenError), private_folder.opened(folder) as fd:
            if _owner(fd, name) == os.getpid():
                os.unlink(name, dir_fd=fd)


def remove_dead(folder: Path) -> None:
    """Remove the locks whose owners are gone; others stay."""
    with (
        contextlib.suppress(FileNotFoundError),
        private_folder.opened(folder) as fd,
        private_folder.alone(fd),
    ):
        for name in os.listdir(fd):
            if name.endswith(".lck"):
                _remove_stale(fd, name)


def _make(folder: int, name: str, taken: str) -> None:
    # Under a name of its own first: a lock is never seen without its PID.
    temp = f".{name}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):  # of one that was killed just here
        os.unlink(temp, dir_fd=folder)
    fd = private_folder.create(folder, temp)
    try:
        os.write(fd, f"{os.getpid()}\n".encode())
        os.link(temp, name, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        owner = _owner(folder, name) or "?"
        raise BusyError(f"{taken.format(owner)}: wait for that process to end") from None
    finally:
        os.close(fd)
        os.unlink(temp, dir_fd=folder)


def _remove_stale(folder: int, name: str) -> None:
    owner = _owner(folder, name)
    if owner is None:
        return
    # An empty one is being written just now, or was left by a crash; only its
    # age can tell.
    if owner == 0 and time.time() - os.stat(name, dir_fd=folder).st_mtime < 60:
        return
    if owner and (owner == os.getpid() or _may_own(owner)):
        return
    os.unlink(name, dir_fd=folder)


def _may_own(pid: int) -> bool:
    """A process that could have made a lock here.  Another user's, which has got the
    number since, would keep the container locked for as long as he likes."""
    try:
        return os.stat(f"/proc/{pid}").st_uid in (0, os.geteuid())
    except OSError:
        return False


def _owner(folder: int, name: str) -> int | None:
    """The PID in the lock file; 0: it holds none; None: there is no file."""
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
    """Other processes that do the same with this folder wait."""
    with private_folder.opened(folder) as fd, private_folder.alone(fd):
        yield


@contextlib.contextmanager
def host_slot(folder: Path, slots: int, wait: float) -> Iterator[None]:
    """One of `slots` places for migrations of this host, kept by a lock of the
    kernel's, so that a killed owner frees it.  BusyError when none is free
    within `wait` seconds."""
    deadline = time.monotonic() + wait
    try:
        with private_folder.opened(folder, make=True) as places:
            while (fd := _free_slot(places, slots)) is None:
                if time.monotonic() >= deadline:
                    raise BusyError(
                        f"this host already has {slots} migrations under way ({folder}): wait for "
                        "one to end"
                    )
                time.sleep(POLL)
    except OSError as e:
        raise CreateError.of(f"cannot take a place among the migrations in {folder}", e) from e
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
