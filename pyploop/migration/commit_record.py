# SPDX-License-Identifier: Apache-2.0
"""On which host a container runs: the record at the target that decides it.

Invariant: exactly one host runs the container.  The source lets it run again
only after the target has said `aborted`, or was never asked to restore; the
target lets it run only after `committed` is durable here, and never gives it
back once it `ran`.  A process that asks later waits until the one that might still
decide has ended: that one, and each command that it starts, has a lock on the record.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from pyploop._core import fdatasync
from pyploop.errors import BusyError, CreateError, ProtocolError, SyncError
from pyploop.system import private_folder

PENDING, COMMITTED, RAN, ABORTED = "pending", "committed", "ran", "aborted"
"""RAN: it was seen to run here after the commit, so what its peers have heard since
is true whatever became of it; `committed` alone may still have come to nothing."""
_SIZE = 16
_NAME = re.compile(r"[0-9a-f]{16}")
POLL = 0.05


def make_folder(folder: Path) -> Path:
    """The folder of journals and records.  CreateError when it cannot be made,
    OpenError when it is not this user's alone."""
    try:
        with private_folder.opened(folder, make=True):
            pass
    except OSError as e:
        raise CreateError.of(f"cannot make {folder}", e) from e
    return folder


def new_id() -> str:
    """Of a migration; unguessable, so that no other one is asked about."""
    return os.urandom(8).hex()


def check_id(text: object) -> str:
    """ProtocolError unless it is one of ours: it becomes a file's name."""
    if isinstance(text, str) and _NAME.fullmatch(text):
        return text
    raise ProtocolError(f"{str(text)[:40]!r} is not a migration's ID")


class CommitRecord:
    """The open, locked record of one migration."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd

    @classmethod
    def create(cls, folder: Path, migration: str, side: str = "target") -> CommitRecord:
        """A new one, `pending`; CreateError when it cannot be made.  The
        source has one too, for its lock only: a dump must have ended before
        anything is undone."""
        path = folder / f"{migration}.{side}"
        try:
            with private_folder.opened(folder) as where:
                record = cls(path, private_folder.create(where, path.name))
                try:
                    fcntl.flock(record.fd, fcntl.LOCK_EX)
                    # Its block is allocated now: the one write that counts is short.
                    record.write(PENDING)
                    os.fsync(where)
                except BaseException:
                    record.close(remove=True)
                    raise
        except OSError as e:
            raise CreateError.of(f"cannot make {path}", e) from e
        return record

    def write(self, word: str) -> None:
        """Durable when this returns; SyncError when that is not sure."""
        try:
            os.pwrite(self.fd, word.ljust(_SIZE - 1).encode() + b"\n", 0)
            fdatasync(self.fd)
        except OSError as e:
            raise SyncError.of(f"cannot write {self.path}", e) from e

    def read(self) -> str:
        return os.pread(self.fd, _SIZE, 0).decode(errors="replace").strip()

    def close(self, remove: bool = False) -> None:
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self.fd)


@contextlib.contextmanager
def locked(
    folder: Path, migration: str, wait: float, side: str = "target"
) -> Iterator[CommitRecord | None]:
    """The record as its owner left it; None when there is none.  BusyError when
    the owner, or one of its commands, has not ended within `wait` seconds."""
    path = folder / f"{migration}.{side}"
    try:
        with private_folder.opened(folder) as where:
            fd = private_folder.open_file(where, path.name, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    record = CommitRecord(path, fd)
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BusyError(f"{path} is in use: that migration is still at work") from None
                time.sleep(POLL)
        yield record
    finally:
        record.close()


def forget(folder: Path, migration: str, side: str = "target") -> None:
    """Remove a record that was acted upon.  ProtocolError for one that is
    not decided yet."""
    path = folder / f"{migration}.{side}"
    try:
        word = private_folder.read_path(path)[:_SIZE].decode(errors="replace").strip()
    except FileNotFoundError:
        return
    if word == PENDING:
        raise ProtocolError(f"migration {migration} is not decided yet, and not forgotten")
    path.unlink(missing_ok=True)
