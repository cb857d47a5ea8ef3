# SPDX-License-Identifier: Apache-2.0
"""Targets that have something already: an older copy that is brought up to date (--update),
and what a copy that failed has left (NAME.pyploop-partial, --keep-partial).

Invariants: without --inplace the older copy is not touched until the new one is complete and
durable; then the new one takes its name.  What is left of a failed copy never has the final
name, and has one writer at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable

from pyploop.diskcopy import target_name
from pyploop.diskcopy.target_file import MODE, Sink, check_free, kind_of
from pyploop.disks.backing import Thing
from pyploop.errors import CreateError, Interrupted, PyploopError
from pyploop.report.events import Reporter
from pyploop.system import kernel, sysblock
from pyploop.system.jobs import TICK
from pyploop.units import SECTOR, format_size

PARTIAL = ".pyploop-partial"
"""What the name of a target gets, as long as it is not complete."""
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""What an open says of a symbolic link, a folder, and a socket."""
TAKING_OVER = 3.0
"""Seconds for a copy that has lost its connection to give way to another one."""
_FIRST_BYTE = struct.Struct("hh4xqqi4x")
"""struct flock, with 64 bits."""
_AT_0 = (os.SEEK_SET, 0, 1, 0)
_ANY = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OPEN = os.O_NOFOLLOW | _ANY


class UpdateSink(Sink):
    """A new file that begins with what is there already."""

    def __init__(
        self, path: str, report: Reporter | None = None, *, replace: bool, partial: bool
    ) -> None:
        """replace: the name exists, and the new file takes it over.  partial: until then the
        new file is NAME.pyploop-partial, and a failed copy leaves it for the next one."""
        self._replace, self._partial = replace, partial
        self.replaced = -1
        """The open older copy; -1: there is none."""
        try:
            super().__init__(path, report)
        except BaseException:
            self._close_old()
            raise

    def _check_name(self) -> None:
        if not self._replace:
            check_free(self.path)
            return
        self.replaced = open_old(self.path, os.O_RDONLY)
        try:
            os.close(os.open(f"/proc/self/fd/{self.replaced}", os.O_WRONLY | _ANY))
        except OSError as e:
            if e.errno == errno.EPERM:  # it could not be replaced in the end
                raise CreateError.of(
                    f"cannot update {self.path}: it may not be changed (lsattr shows why)",
                    e,
                    path=self.path,
                ) from e

    def _create(self) -> int:
        fd = self._open_partial() if self._partial else -1
        if fd < 0:
            fd = super()._create()
        try:
            self._begin(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _begin(self, fd: int) -> None:
        """What the file begins with."""
        st = os.fstat(fd)
        self.old_end = st.st_size
        # Some file systems count no blocks, or only later.
        self.has_prior = self.unsynced = st.st_size > 0
        if self.has_prior:
            self._report.note(
                f"Going on from {self._beside(self._part or self._name)}, which has "
                f"{format_size(st.st_blocks * SECTOR)} of an earlier copy"
            )
        if self.replaced < 0:
            return
        size = os.fstat(self.replaced).st_size
        self.old_end = max(self.old_end, size)
        how = "its blocks are shared until they are written (reflink)"
        try:
            if self.has_prior:
                raise OSError(errno.EEXIST, "it has contents")
            kernel.clone(fd, self.replaced, self.path)
        except OSError:
            self.copied_from = self.replaced
            how = "what is the same is copied from it"
        self.has_prior = True
        self._report.info(f"{self.path} stays as it is until the new copy is complete: {how}")

    def _open_partial(self) -> int:
        """Open and lock it; -1: there can be none of this name."""
        name = self._name + PARTIAL
        while True:
            try:
                fd = os.open(name, os.O_RDWR | os.O_CREAT | _OPEN, MODE, dir_fd=self._dir_fd)
            except OSError as e:
                if e.errno in _NO_FILE:
                    raise self._not_ours(name) from None
                if e.errno != errno.ENAMETOOLONG:
                    raise
                self._report.info(f"{self.path} is too long a name for a partial file beside it")
                return -1
            try:
                if self._locked(fd, name):
                    break
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        self._part, self._ways = name, target_name.WAYS
        return fd

    def _locked(self, fd: int, name: str) -> bool:
        """False: it was removed or got its name meanwhile.  CreateError: it is not ours."""
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) or st.st_uid != os.geteuid() or st.st_nlink > 1:
            raise self._not_ours(name)
        if not _lock(fd):
            raise CreateError(
                f"cannot create {self.path}: another copy writes {self._beside(name)} just now",
                path=self.path,
                hint="wait until that copy has ended",
            )
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(name, dir_fd=self._dir_fd), os.fstat(fd))
        return False

    def _not_ours(self, name: str) -> CreateError:
        return CreateError(
            f"cannot create {self.path}: {self._beside(name)} is no unfinished copy of this user "
            "(it was not touched)",
            path=self.path,
            hint="remove it, or copy with --no-keep-partial",
        )

    @property
    def left(self) -> str:
        return f"; {self.path} is as it was" if self._replace else super().left

    def wanted(self) -> bool:
        return _wanted(self.fd)

    def older(self) -> set[Thing]:
        if self.replaced < 0:
            return set()
        st = os.fstat(self.replaced)
        return {(*sysblock.dev_numbers(st.st_dev), st.st_ino)}

    def _give_name(self) -> None:
        if not self._replace:
            super()._give_name()
            return
        old = os.fstat(self.replaced)
        now = os.stat(self._name, dir_fd=self._dir_fd, follow_symlinks=False)
        if not os.path.samestat(old, now):
            raise OSError("it was replaced meanwhile")
        with contextlib.suppress(OSError):
            os.fchown(self.fd, old.st_uid, old.st_gid)
        with contextlib.suppress(OSError):
            os.fchmod(self.fd, stat.S_IMODE(old.st_mode))
        if self._part is None:
            part = target_name.part_of(self._dir_fd, self._name)
            self._link(self.fd, part, self._dir_fd)
            self._part = part
        self._check_part(self._part)
        os.rename(self._part, self._name, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
        self._part = None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._part is not None and self._part == self._name + PARTIAL:
            self._leave_partial(self._part, error)
        super().__exit__(kind, error, trace)
        self._close_old()

    def _leave_partial(self, part: str, error: BaseException | None) -> None:
        """While it is locked: remove it, unless the next copy can go on from it."""
        self._part = None
        if not self._is_at(part):
            return  # it was renamed, and another one may be there by now
        st = os.fstat(self.fd)
        if self._complete or not st.st_size:
            self._unlink(part)
            return
        kept = format_size(st.st_blocks * SECTOR)
        words = f"{self._beside(part)} keeps {kept}, and the same command goes on from it"
        if isinstance(error, PyploopError):
            error.add(words)
        elif isinstance(error, Interrupted):
            error.state += f"; {words}"

    def _close_old(self) -> None:
        old, self.replaced = self.replaced, -1
        if old >= 0:
            os.close(old)


class InPlaceSink(Sink):
    """The older copy itself: what differs is written over it."""

    def _check_name(self) -> None:
        os.close(open_old(self.path, os.O_RDONLY))

    def _create(self) -> int:
        fd = open_old(self.path, os.O_RDWR)
        try:
            st = os.fstat(fd)
            if loops := sysblock.loops_on(st):
                names = ", ".join(loop.path for loop in loops)
                raise CreateError(
                    f"cannot update {self.path} in place: {names} shows it (it was not touched)",
                    path=self.path,
                    hint=f"detach that (losetup -d {loops[0].path}), or update without --inplace",
                )
            if not _lock(fd):
                raise CreateError(
                    f"cannot update {self.path} in place: another process has locked it",
                    path=self.path,
                    hint="wait until that has ended",
                )
        except BaseException:
            os.close(fd)
            raise
        self.old_end, self.has_prior, self.unsynced = st.st_size, True, True
        return fd

    @property
    def left(self) -> str:
        return ""

    def wanted(self) -> bool:
        return _wanted(self.fd)

    def commit(self, before_name: Callable[[], None] = lambda: None) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.fd)
        self.sync()
        before_name()
        if not self._is_at(self._name):
            raise CreateError(
                f"{self.path} was moved or replaced while it was updated in place: the update is "
                "in the file that had this name before",
                path=self.path,
            )
        self._complete = self.path

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._complete and isinstance(error, PyploopError):
            error.add(
                f"{self.path} may have parts of both the older and the newer state (--inplace); "
                "the same command goes on from there"
            )
        super().__exit__(kind, error, trace)


def _lock(fd: int) -> bool:
    """Lock it as long as it is open.  False: another process has, and does not let it go."""
    until = time.monotonic() + TAKING_OVER
    asked = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            if not asked:
                asked = True
                with contextlib.suppress(OSError):
                    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FIRST_BYTE.pack(fcntl.F_WRLCK, *_AT_0))
            time.sleep(TICK)
        except OSError:  # no locks there
            return True
        else:
            if asked:
                with contextlib.suppress(OSError):
                    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FIRST_BYTE.pack(fcntl.F_UNLCK, *_AT_0))
            return True


def _wanted(fd: int) -> bool:
    """Another process waits in `_lock`: it has locked the first byte."""
    asked = _FIRST_BYTE.pack(fcntl.F_WRLCK, *_AT_0)
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    except OSError:
        return False
    return bool(_FIRST_BYTE.unpack(found)[0] != fcntl.F_UNLCK)


def open_old(path: str, flags: int) -> int:
    """Open the older copy.  CreateError: it is no file, or cannot be opened."""
    try:
        fd = os.open(path, flags | _OPEN)
    except OSError as e:
        if e.errno == errno.ELOOP and os.path.islink(path):
            raise _no_file(path, stat.S_IFLNK) from None
        raise CreateError.of(f"cannot update {path}", e, path=path) from e
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    mode = os.fstat(fd).st_mode
    os.close(fd)
    raise _no_file(path, mode)


def _no_file(path: str, mode: int) -> CreateError:
    return CreateError(
        f"cannot update {path}: it is {kind_of(mode)}",
        path=path,
        hint="name a file, or a block device with --to-device",
    )
