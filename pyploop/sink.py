# SPDX-License-Identifier: Apache-2.0
"""The target file.

Invariant: its final name appears only when its contents are complete and
durable, and never replaces a file that is there.  Until then it has no name at
all (O_TMPFILE), so nothing is left behind however the process ends; where the
file system has no O_TMPFILE it has a temporary name in the same folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

from pyploop import kernel
from pyploop._core import fdatasync
from pyploop.errors import CreateError, SyncError, WriteError

MODE = 0o600


class Sink:
    """An open, unfinished target; a context manager that discards it unless
    `commit` was reached."""

    def __init__(self, path: str) -> None:
        self.path = path
        if not path or path.endswith("/"):
            raise CreateError(f"cannot create {path!r}: not the name of a file")
        target = Path(path)
        self._name = target.name
        self._temp: str | None = None
        self._revocable = False
        self.synced_ns = 0
        """time.monotonic_ns() of the last sync's end."""
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        except OSError as e:
            raise CreateError.of(f"cannot create {path}", e) from e
        else:
            raise CreateError(f"cannot create {path}: File exists (it was not touched)")
        try:
            self._dir_fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise CreateError.of(f"cannot create {path}: folder {target.parent}", e) from e
        try:
            self.fd = self._create()
        except OSError as e:
            os.close(self._dir_fd)
            raise CreateError.of(f"cannot create {path}", e) from e
        self.held = 0
        """The file may hold data below this position."""

    def _create(self) -> int:
        # The folder by descriptor: it stays the same one if it is renamed.
        folder = f"/proc/self/fd/{self._dir_fd}"
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, MODE)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
        # At most 255 bytes, which may be fewer characters.
        stem = os.fsdecode(os.fsencode(self._name)[:200])
        self._temp = f".{stem}.{os.urandom(4).hex()}.part"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(self._temp, flags, MODE, dir_fd=self._dir_fd)

    @property
    def temporary(self) -> str | None:
        """The name of the unfinished file, None when it has none."""
        return self._temp

    def set_size(self, size: int) -> None:
        """Make the file exactly `size` bytes long."""
        try:
            if os.fstat(self.fd).st_size != size:
                os.ftruncate(self.fd, size)
        except OSError as e:
            raise WriteError.of(f"cannot set the size of {self.path} to {size}", e) from e

    def sync(self) -> None:
        """Make durable what was written so far."""
        try:
            fdatasync(self.fd)
        except OSError as e:
            raise SyncError.of(f"cannot sync {self.path}", e) from e
        self.synced_ns = time.monotonic_ns()

    def commit(self, before_name: Callable[[], None] = lambda: None) -> None:
        """Durable contents, then the name, then a durable name.  before_name:
        called right before the name; what it raises leaves none.

        The sync of the folder carries what fdatasync leaves out (the times),
        in the same journal commit: with fsync there would be two.
        """
        self.sync()
        before_name()
        try:
            self._give_name()
        except OSError as e:
            raise CreateError.of(
                f"the copy is complete, but cannot be named {self.path}; it was dropped", e
            ) from e
        self._temp = None
        self._revocable = True
        try:
            os.fsync(self._dir_fd)
        except OSError as e:
            raise SyncError.of(f"{self.path} is complete, but its folder is not synced", e) from e

    def _give_name(self) -> None:
        if self._temp is None:
            os.link(
                f"/proc/self/fd/{self.fd}",
                self._name,
                dst_dir_fd=self._dir_fd,
                follow_symlinks=True,
            )
        else:
            kernel.rename_noreplace(self._dir_fd, self._temp, self._name)

    def keep(self) -> None:
        """The finished file stays from now on, also when something fails yet:
        somebody may have been told that it is there."""
        self._revocable = False

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        # A signal in the middle of `commit` takes the name back.
        leftover = self._name if self._revocable and kind is not None else self._temp
        os.close(self.fd)
        if leftover is not None:
            with contextlib.suppress(OSError):
                os.unlink(leftover, dir_fd=self._dir_fd)
        os.close(self._dir_fd)
