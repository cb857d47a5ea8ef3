# SPDX-License-Identifier: Apache-2.0
"""A target file that has a name before it is finished, so that a later process can go on
with it (resumable_files.py), and the lease that shows whether others have written to it.

Other processes cannot open a file that has no name.  A file with a name gets a lease: the
kernel then says whether another process has opened it for writing, and makes that process
wait at first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal

from pyploop.diskcopy import target_name
from pyploop.diskcopy.target_file import Sink
from pyploop.errors import WriteError


def lease(fd: int) -> None:
    """Take a lease: from now on `check_untouched` sees whether another process has opened the
    file for writing.  It ends when `fd` is closed.  OSError: EAGAIN when another process
    has the file open."""
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # ignored by default; SIGIO would kill
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)


def check_untouched(fd: int, path: str) -> None:
    """WriteError when another process has opened the file for writing since `lease`."""
    if fcntl.fcntl(fd, fcntl.F_GETLEASE) not in (fcntl.F_WRLCK, fcntl.F_RDLCK):
        raise WriteError(
            f"{path} was opened for writing by another process during the copy, so its "
            "contents are not known; the next migration compares them again",
            path=path,
            hint="find the process that opens it (a backup, an indexer), and migrate again",
        )


class ResumableSink(Sink):
    """A target file that has a name from the beginning.  After a failure its owner decides
    what becomes of it."""

    def __init__(self, path: str, unfinished: str, fd: int, old_end: int, leased: bool) -> None:
        """unfinished: its name until it is finished, on the same file system.  fd: the open
        file; it is closed here.  old_end: bytes at its beginning that may contain data.
        leased: whether `lease` was called."""
        self._unfinished, self._given, self._leased = unfinished, fd, leased
        try:
            super().__init__(path, owner_undoes=True)
        except BaseException:
            os.close(fd)
            raise
        self.old_end = old_end

    def _create(self) -> int:
        return self._given

    def _give_name(self) -> None:
        if self._leased:
            check_untouched(self.fd, self._unfinished)
        target_name.give_name(self._dir_fd, self._unfinished, self._name)
        with contextlib.suppress(FileNotFoundError):  # renamed, not linked
            os.unlink(self._unfinished)
