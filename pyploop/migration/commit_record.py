# SPDX-License-Identifier: Apache-2.0
"""The commit record: a file at the target that decides which host runs the container.

Invariant: exactly one host runs the container.  The source lets it run again only after
the target has answered `aborted`, or if the target was never asked to restore.  The
target lets it run only after `committed` is durable here, and never gives it back once it
`ran`.  The process that decides, and each command that it starts, has a lock on the
record.  A process that asks later waits for that lock.
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
"""RAN: the container was seen running here after the commit.  Its network peers may rely on
what it has sent since, so it stays here whatever happens.  COMMITTED alone does not say
that it ever ran."""
_SIZE = 16
_NAME = re.compile(r"[0-9a-f]{16}")
POLL = 0.05


def make_folder(folder: Path) -> Path:
    """Make the folder of journals and commit records.  CreateError when it cannot be made,
    OpenError when other users can write to it."""
    try:
        with private_folder.opened(folder, make=True):
            pass
    except OSError as e:
        raise CreateError.of(f"cannot make the state folder {folder}", e, path=str(folder)) from e
    return folder


def new_id() -> str:
    """An ID for a migration.  It cannot be guessed, so nobody can ask about another's."""
    return os.urandom(8).hex()


def check_id(text: object) -> str:
    """ProtocolError unless it has the form of an ID: it becomes a part of a file name."""
    if isinstance(text, str) and _NAME.fullmatch(text):
        return text
    raise ProtocolError(f"agent protocol: {str(text)[:40]!r} is not the ID of a migration")


class CommitRecord:
    """The open, locked record of one migration."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd

    @classmethod
    def create(cls, folder: Path, migration: str, side: str = "target") -> CommitRecord:
        """Make a new record, `pending`.  CreateError when it cannot be made.  The source has
        a record too, but only for its lock: a dump must have ended before anything is
        undone."""
        path = folder / f"{migration}.{side}"
        try:
            with private_folder.opened(folder) as where:
                record = cls(path, private_folder.create(where, path.name))
                try:
                    fcntl.flock(record.fd, fcntl.LOCK_EX)
                    # Allocate its block now, so that the write of the decision is short and
                    # needs no room.
                    record.write(PENDING)
                    os.fsync(where)
                except BaseException:
                    record.close(remove=True)
                    raise
        except OSError as e:
            raise CreateError.of(f"cannot make the commit record {path}", e, path=str(path)) from e
        return record

    def write(self, word: str) -> None:
        """The word is durable when this returns.  SyncError when that is not certain."""
        try:
            os.pwrite(self.fd, word.ljust(_SIZE - 1).encode() + b"\n", 0)
            fdatasync(self.fd)
        except OSError as e:
            raise SyncError.of(
                f"cannot write {word!r} to the commit record {self.path}", e, path=str(self.path)
            ) from e

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
    """The record as its owner left it, locked.  None: there is no record.  BusyError when
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
                    raise BusyError(
                        f"the migration with the commit record {path} is still at work after "
                        f"{wait:g} s",
                        path=str(path),
                        hint="try again when its processes have ended",
                    ) from None
                time.sleep(POLL)
        yield record
    finally:
        record.close()


def forget(folder: Path, migration: str, side: str = "target") -> None:
    """Remove a record that is not needed any more.  ProtocolError when it is not decided
    yet."""
    path = folder / f"{migration}.{side}"
    try:
        word = private_folder.read_path(path)[:_SIZE].decode(errors="replace").strip()
    except FileNotFoundError:
        return
    if word == PENDING:
        raise ProtocolError(
            f"migration {migration} is not decided yet, so its commit record stays",
            path=str(path),
        )
    path.unlink(missing_ok=True)
