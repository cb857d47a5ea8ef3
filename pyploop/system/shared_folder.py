# SPDX-License-Identifier: Apache-2.0
"""Files that the user names below a folder that all users can write to, such as /tmp.
Nothing that another user has put there first is followed or used.

The kernel does the same where `fs.protected_symlinks`, `protected_regular`,
`protected_fifos` and `protected_hardlinks` are on; on some hosts they are not.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TextIO

from pyploop.errors import OpenError

_LOG = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY


def check_links(path: str) -> None:
    """OpenError when a folder on the way is a link that another user has made in a shared
    folder."""
    folders = os.path.dirname(path)
    for end in [*(i for i, c in enumerate(folders) if c == "/" and i), len(folders)]:
        step = folders[:end]
        try:
            st = os.lstat(step)
        except OSError:
            return  # the open that follows reports it
        if stat.S_ISLNK(st.st_mode):
            _check_link(path, step, st)


def _check_link(path: str, link: str, st: os.stat_result) -> None:
    above = os.stat(os.path.dirname(link) or ".")
    if _is_shared(above) and st.st_uid not in (0, os.geteuid(), above.st_uid):
        raise OpenError(
            f"{path} is not used: user {st.st_uid} owns the link {link}, in a folder "
            "that all can write to"
        )


def _is_shared(folder: os.stat_result) -> bool:
    return bool(folder.st_mode & stat.S_ISVTX and folder.st_mode & 0o022)


def open_log(path: str) -> TextIO:
    """Open a file for writing, and empty it.  OpenError when another user decides where it
    leads; OSError."""
    check_links(path)
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        above = os.fstat(folder)
        if not _is_shared(above):
            return open(path, "w")
        name = os.path.basename(path)
        mine = (os.geteuid(), above.st_uid)
        try:
            # O_NONBLOCK: do not wait for the reader of a pipe before its owner is known.
            fd = os.open(name, _LOG | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666, dir_fd=folder)
        except OSError as e:
            st = os.lstat(name, dir_fd=folder)
            if st.st_uid not in mine:
                raise _not_ours(path, st) from None
            if e.errno in (errno.ELOOP, errno.ENXIO):
                return open(path, "w")  # no other user can replace it there
            raise
    finally:
        os.close(folder)
    try:
        st = os.fstat(fd)
        if st.st_uid not in mine:
            raise _not_ours(path, st)
        if stat.S_ISREG(st.st_mode):
            if st.st_nlink != 1:
                raise OpenError(f"{path} is not written: it has a second name (hard link)")
            os.ftruncate(fd, 0)
        os.set_blocking(fd, True)
        return os.fdopen(fd, "w")
    except BaseException:
        os.close(fd)
        raise


def _not_ours(path: str, st: os.stat_result) -> OpenError:
    return OpenError(
        f"{path} is not written: it belongs to user {st.st_uid}, in a folder that all can write to"
    )
