# SPDX-License-Identifier: Apache-2.0
"""The target file.

Invariants: its final name appears only when its contents are complete and
durable, and never replaces an existing file.  What is complete and durable is not
removed, whatever fails after that.

Until it is complete it has no name (O_TMPFILE), so nothing is left behind however
the process ends.  Where the file system cannot do that, it is a part in the same
folder (target_name.py).
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from pyploop._core import fdatasync
from pyploop.diskcopy import target_name
from pyploop.disks.backing import Thing
from pyploop.errors import (
    CreateError,
    Interrupted,
    OpenError,
    PyploopError,
    ReadError,
    SyncError,
    WriteError,
)
from pyploop.report.events import Reporter
from pyploop.system import kernel, shared_folder
from pyploop.undo.journal import Journal

MODE = 0o600
_KINDS = {
    stat.S_IFBLK: (
        "a block device",
        "to write onto the device itself, add --to-device (what it holds is lost)",
    ),
    stat.S_IFCHR: ("a character device", "name a file that does not exist yet"),
    stat.S_IFDIR: ("a folder", "name a file in it"),
    stat.S_IFIFO: ("a named pipe", "name a new file; without -d, the stream goes to -o"),
    stat.S_IFSOCK: ("a socket", "name a file that does not exist yet"),
    stat.S_IFLNK: ("a symbolic link", "name the file itself"),
}
"""What stands in the way of a target, and what to do instead."""


class Sink:
    """An open, unfinished target; a context manager that discards it unless
    `commit` was reached."""

    def __init__(
        self, path: str, report: Reporter | None = None, *, owner_undoes: bool = False
    ) -> None:
        """owner_undoes: after a failure the caller (a migration) decides about the file,
        even when it is complete."""
        self.path = path
        self._owner_undoes = owner_undoes
        if not path or path.endswith("/"):
            raise CreateError(f"cannot create {path!r}: not the name of a file")
        target = Path(path)
        self._name = target.name
        self._report = report or Reporter()
        self._part: str | None = None
        self._ways = target_name.WAYS
        self._journal: Journal | None = None
        self._complete = ""
        """The path of the complete file; empty until it is complete."""
        self.synced_ns = 0
        """time.monotonic_ns() of the last sync's end."""
        self.old_contents = False
        """It is full of what it had before: what is left out must become zeroes."""
        self.old_end = 0
        """The file may hold data below this position."""
        self.has_prior = False
        """It has older contents, and only what differs from them is to be sent."""
        self.copied_from = -1
        """The open file whose data are the older contents where `fd` has holes; -1: none."""
        self.unsynced = False
        """With older contents: their writer may have failed."""
        self._check_name()
        try:
            shared_folder.check_links(path)
            self._dir_fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise CreateError.of(
                f"cannot create {path} in the folder {target.parent}", e, path=path
            ) from e
        except OpenError as e:
            raise CreateError(str(e), path=path) from None
        try:
            self.fd = self._create()
        except BaseException as e:  # also that of a signal
            self._clean_up()
            if isinstance(e, OSError):
                raise CreateError.of(f"cannot create {path}", e, path=path) from e
            raise

    # ---- before the first byte

    def _check_name(self) -> None:
        """CreateError when the name exists."""
        check_free(self.path)

    def _create(self) -> int:
        # By its descriptor, the folder stays the same one if it is renamed.
        folder = f"/proc/self/fd/{self._dir_fd}"
        with contextlib.suppress(OSError):
            self._try_link(folder)
            return self._nameless(folder)
        return self._create_part()

    @staticmethod
    def _nameless(folder: str) -> int:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, MODE)

    def _try_link(self, folder: str) -> None:
        """OSError when a file without a name cannot get one here: some file systems
        cannot link it, and that would show only when all is copied."""
        fd = self._nameless(folder)
        try:
            part = target_name.part_of(self._dir_fd, self._name)
            self._link(fd, part, self._dir_fd)
            self._unlink(part)
        finally:
            os.close(fd)

    @staticmethod
    def _link(fd: int, name: str, dir_fd: int) -> None:
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=dir_fd, follow_symlinks=True)

    def _create_part(self) -> int:
        for part in target_name.left_behind(self._dir_fd, self._name):
            self._report.note(f"Removed {self._beside(part)}, left by a copy that was killed")
        self._ways = self._try_naming()
        self._part = target_name.part_of(self._dir_fd, self._name)
        self._note_part(self._part)
        fd = self._new_part(self._part)
        self._report.info(
            f"The target is {self._beside(self._part)} until it is complete (no O_TMPFILE here); "
            f"then it is {target_name.IN_WORDS[self._ways[0]]}"
        )
        return fd

    def _new_part(self, part: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(part, flags, MODE, dir_fd=self._dir_fd)
        try:
            target_name.lock_part(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _try_naming(self) -> tuple[target_name.Way, ...]:
        """Find out with an empty file how it will get its name."""
        old, new = (target_name.part_of(self._dir_fd, self._name) for _ in range(2))
        fd = self._new_part(old)
        try:
            return target_name.give_name(self._dir_fd, old, new)
        finally:
            os.close(fd)
            self._unlink(old)
            self._unlink(new)

    def _note_part(self, part: str) -> None:
        """For `pyploop thaw`, when this process is killed."""
        path = self._beside(part)
        try:
            self._journal = Journal.create(f"copy to {self.path}")
            self._journal.add({"kind": "part", "path": path, "what": f"remove {path}"})
        except (OpenError, PyploopError) as e:
            self._report.info(f"{e}; `pyploop thaw` will not find the unfinished target")

    def _forget_part(self) -> None:
        if self._journal is not None:
            self._journal.clear()
            self._journal = None

    def _beside(self, name: str) -> str:
        """The path of a name in the folder, even if that was renamed meanwhile."""
        return os.path.join(os.readlink(f"/proc/self/fd/{self._dir_fd}"), name)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._dir_fd)

    @property
    def left(self) -> str:
        """The end of a message about a failure before the end."""
        return f"; {self.path} was not created"

    @property
    def temporary(self) -> str | None:
        """The name of the unfinished file; None: it has none."""
        return self._part

    def wanted(self) -> bool:
        """Another copy to the same target waits for this one to end."""
        return False

    def older(self) -> set[Thing]:
        """The file that it will replace, as backing.Below names it."""
        return set()

    # ---- contents

    def set_size(self, size: int) -> None:
        """Make the file exactly `size` bytes long."""
        try:
            if os.fstat(self.fd).st_size != size:
                os.ftruncate(self.fd, size)
        except OSError as e:
            raise WriteError.of(
                f"cannot make {self.path} {size} bytes long", e, path=self.path
            ) from e

    def sync(self) -> None:
        """Make durable what was written so far."""
        try:
            make_durable(self.fd, self.path)
        except OSError as e:
            raise SyncError.of(f"cannot sync {self.path}", e, path=self.path) from e
        self.synced_ns = time.monotonic_ns()

    # ---- the end

    def commit(self, before_name: Callable[[], None] = lambda: None) -> None:
        """Make the contents durable, then name the file, then make the name durable.
        before_name: called right before the name; when it raises, there is no file.

        The sync of the folder also writes what fdatasync leaves out (the times), in
        the same journal commit.  With fsync there would be two.
        """
        self.sync()
        before_name()
        try:
            self._give_name()
        except OSError as e:
            if not self._is_at(self._name):  # a network file system may lose an answer
                self._keep_aside(e)
        self._complete = self._beside(self._name)
        self._sync_folder()
        self._look_where()

    def _give_name(self) -> None:
        if self._part is None:
            self._link(self.fd, self._name, self._dir_fd)
        else:
            self._check_part(self._part)
            target_name.give_name(self._dir_fd, self._part, self._name, self._ways)

    def _check_part(self, part: str) -> None:
        """OSError: the name of the unfinished file leads to another one, or nowhere."""
        if not self._is_at(part):
            raise OSError(f"{self._beside(part)} was removed, moved or replaced meanwhile")

    def _is_at(self, name: str) -> bool:
        """The name in the folder is that of the open file."""
        try:
            found = os.stat(name, dir_fd=self._dir_fd, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self.fd))

    def _sync_folder(self) -> None:
        try:
            os.fsync(self._dir_fd)
        except OSError as e:
            if e.errno not in target_name.UNSUPPORTED:
                raise SyncError.of(
                    f"cannot sync the folder of {self.path}, so a crash may take its name away",
                    e,
                    path=self.path,
                ) from e
            self._sync_file_system()

    def _sync_file_system(self) -> None:
        how = "so all of it was synced"
        try:
            kernel.syncfs(self._dir_fd, self.path)
        except OSError as e:
            if e.errno not in target_name.UNSUPPORTED:
                raise SyncError.of(f"cannot sync the file system of {self.path}", e) from e
            how = "so a crash may take the name away"
        self._report.note(f"The file system of {self.path} cannot sync a folder, {how}")

    def _look_where(self) -> None:
        """CreateError when no path leads to the file: its folder may have been moved,
        hidden or unmounted.  The folder is compared, since FUSE may show one file with
        two inode numbers."""
        if self._is_folder(os.path.dirname(self.path) or "."):
            return
        found = self._complete
        if self._is_folder(os.path.dirname(found)):
            self._report.note(f"The folder of {self.path} was moved: the target is {found}")
            return
        self._complete = ""
        raise CreateError(
            f"the copy is complete, but no path leads to it: the folder of {self.path} was hidden "
            "by a mount during the copy, or its file system was unmounted",
            path=self.path,
            hint="unmount what hides the folder, or mount its file system again: the file is there",
        )

    def _is_folder(self, path: str) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._dir_fd))
        except OSError:
            return False

    def _keep_aside(self, why: OSError) -> NoReturn:
        """The complete file cannot get its name: keep it under another one."""
        failed = f"the copy is complete and durable, but cannot be named {self.path}"
        if not self._owner_undoes:
            self._complete = self._other_name()
        if not (self._complete or self._owner_undoes):
            failed += "; it is lost, since no folder of its file system takes a name for it"
        raise CreateError.of(failed, why, path=self.path) from why

    def _other_name(self) -> str:
        """Name it otherwise in the same folder; a file without a name also in a folder
        above, since its own may be removed or read-only.  Returns its path."""
        name = target_name.complete_of(self._dir_fd, self._name)
        if self._part is not None and self._is_at(self._part):
            try:
                target_name.give_name(self._dir_fd, self._part, name, self._ways)
            except OSError:
                part, self._part = self._part, None
                with contextlib.suppress(OSError):
                    os.fchmod(self.fd, target_name.COMPLETE)
                return self._beside(part)
            return self._beside(name)
        for fd in _with_those_above(self._dir_fd):
            with contextlib.suppress(OSError):
                self._link(self.fd, name, fd)
                with contextlib.suppress(OSError):
                    os.fsync(fd)
                return os.path.join(os.readlink(f"/proc/self/fd/{fd}"), name)
        return ""

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with contextlib.suppress(OSError):  # its data were synced, or are not wanted
            os.close(self.fd)
        self._clean_up()
        if self._complete and error is not None and not self._owner_undoes:
            self._report_kept(error)

    def _clean_up(self) -> None:
        if self._part is not None:
            self._unlink(self._part)
        self._forget_part()
        os.close(self._dir_fd)

    def _report_kept(self, error: BaseException) -> None:
        words = f"{self._complete} is complete and was kept"
        if isinstance(error, PyploopError):
            error.add(words)
        elif isinstance(error, Interrupted):
            error.state = f"{words}; everything else was undone here"
        elif isinstance(error, OSError):
            raise ReadError(f"{error.filename or self.path}: {error.strerror}; {words}") from error


def _with_those_above(folder: int) -> Iterator[int]:
    """The open folder, and those above it: from each to the next, for by a path
    somebody may lead us elsewhere meanwhile.  A descriptor is valid until the next."""
    yield folder
    fd = folder
    try:
        while True:
            above = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            top = os.path.samestat(os.fstat(above), os.fstat(fd))
            if fd != folder:
                os.close(fd)
            fd = above
            if top:
                return
            yield fd
    except OSError:
        return
    finally:
        if fd != folder:
            os.close(fd)


def make_durable(fd: int, path: str) -> None:
    """Sync the data of an open file; where it cannot be synced, its file system."""
    try:
        fdatasync(fd)
    except OSError as e:
        if e.errno not in target_name.UNSUPPORTED:
            raise
        kernel.syncfs(fd, path)


def kind_of(mode: int) -> str:
    """What it is, in words."""
    return _KINDS.get(stat.S_IFMT(mode), ("a file", ""))[0]


def check_free(path: str) -> None:
    """CreateError when the name exists."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as e:
        raise CreateError.of(f"cannot create {path}", e, path=path) from e
    if (kind := _KINDS.get(stat.S_IFMT(mode))) is not None:
        what, hint = kind
        raise CreateError(
            f"cannot create {path}: File exists, and it is {what}", path=path, hint=hint
        )
    raise CreateError(
        f"cannot create {path}: File exists (it was not touched)",
        path=path,
        hint="name a file that does not exist yet, or remove this one",
    )
