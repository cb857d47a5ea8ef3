# SPDX-License-Identifier: Apache-2.0
"""How a complete file gets its name, and the names of unfinished files.

A file system may not support files without a name (O_TMPFILE).  Then the unfinished
file is a *part*, `.NAME.BOOT-RANDOM.part`, which its writer keeps locked.  A part
that can be locked has no writer any more.  The next copy to the same name removes
it, or `pyploop thaw` does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable

from pyploop.system import kernel
from pyploop.undo.journal import Entry, register

UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""The errors of a file system that does not support an operation."""
OLD = 86400.0
"""Seconds after its last write until an unlocked part of another boot is removed.  It
may belong to another machine, whose locks are not seen here."""
COMPLETE = 0o400
"""Mode of a complete file that had to stay a part: it is never removed."""
_PART = re.compile(r"\.(?P<stem>.+)\.(?P<boot>[0-9a-f]{8})-[0-9a-f]{8}\.part", re.DOTALL)
_EXTRA = len("..01234567-01234567.part")


# ---- the final name

Way = Callable[[int, str, str], None]


def by_rename_noreplace(dir_fd: int, old: str, new: str) -> None:
    kernel.rename_noreplace(dir_fd, old, new)


def by_link(dir_fd: int, old: str, new: str) -> None:
    os.link(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)


def by_rename(dir_fd: int, old: str, new: str) -> None:
    """In two steps: a file that is created between them would be replaced."""
    try:
        os.stat(new, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    else:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)


WAYS: tuple[Way, ...] = (by_rename_noreplace, by_link, by_rename)
"""Ways from a name to a free one.  The first one that the file system supports is used."""
IN_WORDS: dict[Way, str] = {
    by_rename_noreplace: "renamed without replacing anything",
    by_link: "linked to its name",
    by_rename: "renamed once its name is seen to be free (there is no safer way)",
}


def give_name(dir_fd: int, old: str, new: str, ways: tuple[Way, ...] = WAYS) -> tuple[Way, ...]:
    """Rename within a folder, without replacing anything; OSError EEXIST when
    `new` is there.  Returns the ways that are left, the one that worked first.

    The old name may still be there.  The caller removes it once the file is closed,
    since FUSE and NFS would only rename an open one.
    """
    while True:
        try:
            ways[0](dir_fd, old, new)
        except OSError as e:
            # EPERM, EMLINK: no hard links there.
            if len(ways) == 1 or e.errno not in (*UNSUPPORTED, errno.EPERM, errno.EMLINK):
                raise
            ways = ways[1:]
        else:
            return ways


# ---- parts


def part_of(dir_fd: int, name: str) -> str:
    """A new name for the unfinished `name`, short enough for the file system."""
    return f".{_stem(dir_fd, name)}.{kernel.boot_id()[:8]}-{os.urandom(4).hex()}.part"


def complete_of(dir_fd: int, name: str) -> str:
    """A new name for a complete file that cannot be named `name`."""
    return f"{_stem(dir_fd, name)}.complete-{os.urandom(4).hex()}"


def _stem(dir_fd: int, name: str) -> str:
    """The beginning of the name that leaves room for the rest, in bytes."""
    limit = os.fpathconf(dir_fd, "PC_NAME_MAX")
    return os.fsdecode(os.fsencode(name)[: (limit if limit > 2 * _EXTRA else 255) - _EXTRA])


def lock_part(fd: int) -> None:
    """Lock the part as long as `fd` is open.  OSError ESTALE: another process found it
    unlocked, and removes it.  Where there are no locks, it is never removed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = os.fstat(fd).st_nlink == 0
    except BlockingIOError:
        taken = True
    except OSError:
        taken = False
    if taken:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def left_behind(dir_fd: int, name: str) -> list[str]:
    """Remove the parts of `name` in this folder that have no writer; returns them."""
    stem = _stem(dir_fd, name)
    with os.scandir(dir_fd) as entries:
        found = [e.name for e in entries if (m := _PART.fullmatch(e.name)) and m["stem"] == stem]
    return [part for part in found if remove_part(dir_fd, part)]


def remove_part(dir_fd: int, part: str) -> bool:
    """Remove it, if it is an unfinished part of this user without a writer."""
    match = _PART.fullmatch(part)
    if match is None:
        return False
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(part, flags, dir_fd=dir_fd)
    except OSError:
        return False
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) or st.st_uid != os.geteuid() or not st.st_mode & 0o200:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if match["boot"] != kernel.boot_id()[:8] and time.time() - st.st_mtime < OLD:
            return False
        os.unlink(part, dir_fd=dir_fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def undo_part(entry: Entry) -> None:
    """Kind `part` of the journal: remove the part at `path`, if it is still there."""
    folder, part = os.path.split(entry["path"])
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_part(fd, part)
        finally:
            os.close(fd)


register("part", undo_part, outlives_boot=True)
