# SPDX-License-Identifier: Apache-2.0
"""Who may touch a container, and how many migrations a host takes at once.

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

from pyploop.errors import BusyError, CreateError

POLL = 0.1
"""Seconds between looks at the slots of a host that is full."""
MAX_LOCK = 64
"""Bytes read of a lock file: it holds a number."""


@contextlib.contextmanager
def container_lock(folder: Path, ctid: str) -> Iterator[None]:
    """Hold FOLDER/CTID.lck.  BusyError while its owner lives; a lock whose
    owner is gone is taken over."""
    path = folder / f"{ctid}.lck"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Two who find the same stale lock must not both take it over.
        with exclusive(folder):
            _remove_stale(path)
            _make(path, ctid)
    except OSError as e:
        raise CreateError.of(f"cannot lock container {ctid} with {path}", e) from e
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _owner(path) == os.getpid():
                path.unlink()


def remove_dead(folder: Path) -> None:
    """Remove the locks whose owners are gone; others stay."""
    with contextlib.suppress(FileNotFoundError), exclusive(folder):
        for path in folder.glob("*.lck"):
            _remove_stale(path)


def _make(path: Path, ctid: str) -> None:
    # Under a name of its own first: a lock is never seen without its PID.
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    temp.write_text(f"{os.getpid()}\n")
    try:
        os.link(temp, path)
    except FileExistsError:
        raise BusyError(
            f"container {ctid} is locked ({path}, process {_owner(path) or '?'}): wait for that "
            "process to end"
        ) from None
    finally:
        temp.unlink()


def _remove_stale(path: Path) -> None:
    owner = _owner(path)
    if owner is None:
        return
    # An empty one is being written just now, or was left by a crash; only its
    # age can tell.
    if owner == 0 and time.time() - path.stat().st_mtime < 60:
        return
    if owner and (owner == os.getpid() or Path(f"/proc/{owner}").exists()):
        return
    path.unlink()


def _owner(path: Path) -> int | None:
    """The PID in the lock file; 0: it holds none; None: there is no file."""
    try:
        with path.open("rb") as f:
            text = f.read(MAX_LOCK)
    except FileNotFoundError:
        return None
    try:
        return max(int(text.split()[0]), 0)
    except (ValueError, IndexError):
        return 0


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep others who do the same with this folder out; they wait."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def host_slot(folder: Path, slots: int, wait: float) -> Iterator[None]:
    """One of `slots` places for migrations of this host, kept by a lock of the
    kernel's, so that a killed owner frees it.  BusyError when none is free
    within `wait` seconds."""
    deadline = time.monotonic() + wait
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        while (fd := _free_slot(folder, slots)) is None:
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"this host has {slots} migrations under way already ({folder}): wait for one "
                    "to end"
                )
            time.sleep(POLL)
    except OSError as e:
        raise CreateError.of(f"cannot take a place among the migrations in {folder}", e) from e
    try:
        yield
    finally:
        os.close(fd)


def _free_slot(folder: Path, slots: int) -> int | None:
    for number in range(slots):
        path = folder / f"migration.{number}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        return fd
    return None
