# SPDX-License-Identifier: Apache-2.0
"""The file systems of the source: syncfs, FIFREEZE, FITHAW."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from pyploop import kernel
from pyploop.errors import (
    BusyError,
    DeviceControlError,
    LoopError,
    OpenError,
    ParameterError,
)
from pyploop.events import Reporter
from pyploop.plan import Held, Plan
from pyploop.sysblock import Mount

LOCK_DEADLINE = 120.0
"""Seconds to wait for another copy's freeze of the same file system."""
RCU_EXPEDITED = "/sys/kernel/rcu_expedited"


class _Open:
    """One mounted file system, and what holds it frozen."""

    def __init__(self, mount: Mount, fd: int) -> None:
        self.mount, self.fd = mount, fd
        self.dev = os.fstat(fd).st_dev
        self.foreseen: Held | None = None
        """Its entry, once it is in the journal."""
        self.held: Held | None = None
        """The same entry, while it is frozen by us."""

    @property
    def entry(self) -> dict[str, str | int]:
        point = os.path.abspath(self.mount.point)
        return {
            "kind": "thaw",
            "mount": point,
            "dev": f"{os.major(self.dev)}:{os.minor(self.dev)}",
            "fsid": os.fstatvfs(self.fd).f_fsid,
            "what": f"thaw {point}",
            "by_hand": f"fsfreeze -u {point}",
        }


class FileSystems:
    """The mounted file systems of the source, open, in freezing order."""

    def __init__(self, mounts: list[Mount], report: Reporter, plan: Plan | None = None) -> None:
        """plan: what else must be undone is in it; None: nothing else."""
        self._report = report
        self._stack = contextlib.ExitStack()
        self._open: list[_Open] = []
        self._plan = plan or Plan("frozen file systems", report)
        if plan is None:
            self._stack.callback(self._plan.close)
        self._by_others: list[_Open] = []
        self._expedited: Held | None = None
        self._locked = False
        try:
            for mount in mounts:
                self._add(mount)
        except BaseException:
            self._stack.close()
            raise

    def _add(self, mount: Mount) -> _Open:
        try:
            fd = os.open(mount.point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise OpenError.of(f"cannot open the mount point {mount.point}", e) from e
        self._stack.callback(os.close, fd)
        if not mount.is_at(os.fstat(fd)):
            raise OpenError(
                f"{mount.point} is hidden under another mount, so {mount.source} cannot be "
                "frozen there; use --mount with a folder where it is visible"
            )
        self._open.append(_Open(mount, fd))
        return self._open[-1]

    def adopt(self, mount: Mount) -> None:
        """A file system of the source that was mounted since."""
        self._add(mount)
        self._locked = False  # it is not, yet

    def __len__(self) -> int:
        return len(self._open)

    def include(self, folder: str) -> Mount:
        """The file system that this folder is on, taken in when it was not one
        of ours.  ParameterError: it is no mount point of a disk."""
        try:
            st = os.stat(folder)
        except OSError as e:
            raise OpenError.of(f"cannot open the mount point {folder}", e) from e
        for o in self._open:
            if o.dev == st.st_dev:
                return o.mount
        if not os.path.ismount(folder):
            raise ParameterError(f"{folder} is no mount point, nor on a file system of the source")
        dev = os.major(st.st_dev), os.minor(st.st_dev)
        return self._add(Mount(folder, "?", folder, dev)).mount

    def holding(self, st_dev: int) -> str | None:
        """The mount point of the file system with this st_dev, or None."""
        for o in self._open:
            if o.dev == st_dev:
                return o.mount.point
        return None

    def close(self) -> None:
        """Thaw what is frozen, close the mount points."""
        try:
            self.thaw()
        finally:
            self._stack.close()

    def sync(self) -> None:
        """Write back what is dirty, while running or after the stop command."""
        for o in self._open:
            try:
                kernel.syncfs(o.fd, o.mount.point)
            except OSError as e:
                raise DeviceControlError.of(f"cannot sync {o.mount.point}", e) from e

    def guard(self) -> None:
        """Lock the file systems against the freeze of another copy, and have
        the watchdog and the journal ready; before the stop command, so that
        neither costs frozen time."""
        if not self._open:
            return
        self._lock()
        self._plan.start()
        for o in self._open:
            if o.foreseen is None:
                o.foreseen = self._plan.foresee(o.entry, o.fd)

    def _lock(self) -> None:
        """Two copies of one file system must not rely on each other's freeze."""
        if self._locked:
            return
        deadline = time.monotonic() + LOCK_DEADLINE
        for o in self._open:
            while True:
                try:
                    fcntl.flock(o.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise BusyError(
                            f"another copy keeps {o.mount.point} frozen, or is about to"
                        ) from None
                    time.sleep(0.02)
        self._locked = True

    def check_frozen(self) -> None:
        """What somebody else froze must still be frozen: LoopError if not."""
        for o in self._by_others:
            point = o.mount.point
            try:
                kernel.fifreeze(o.fd, point)
            except OSError as e:
                if e.errno == errno.EBUSY:
                    continue
                raise DeviceControlError.of(f"cannot freeze {point}", e) from e
            kernel.fithaw(o.fd, point)
            raise LoopError(f"{point}, frozen by somebody else, was thawed during the last blocks")

    def freeze(self, only: Mount | None = None) -> None:
        """Freeze each that is not yet (or this one); one that somebody else
        has frozen (the stop command) is left as it is, also at the end."""
        if not self._open:
            return
        self.guard()
        if self._expedited is not None:
            # Another copy may have ended meanwhile, and put back what it found.
            with contextlib.suppress(OSError):
                Path(RCU_EXPEDITED).write_text("1")
        for o in self._open:
            if o.held is None and o not in self._by_others and only in (None, o.mount):
                self._freeze(o)
        # The watchdog may have thawed while the kernel was still freezing.
        self._plan.watch()

    def _freeze(self, o: _Open) -> None:
        assert o.foreseen is not None
        # Held first: a signal right after the freeze must find it.
        o.held = self._plan.add(o.foreseen)
        try:
            kernel.fifreeze(o.fd, o.mount.point)
        except OSError as e:
            self._plan.release(o.held)
            o.held = None
            if e.errno != errno.EBUSY:
                raise DeviceControlError.of(f"cannot freeze {o.mount.point}", e) from e
            self._by_others.append(o)
            self._report.info(f"{o.mount.point} is frozen already, and will be left so")

    def warm_up(self) -> float:
        """Freeze and thaw twice, while running.  What a freeze costs is waiting
        for RCU grace periods (20 to 50 ms); they are short while the kernel is
        told to expedite them, and for some milliseconds after a freeze.  The
        page cache is flushed by it, too.

        Returns the seconds of a freeze that is warm.
        """
        seconds = 0.0
        self.guard()  # the watchdog may have died since
        self._expedite()
        with self._report.held():
            for _ in range(2):
                start = time.monotonic()
                self.freeze()
                seconds = time.monotonic() - start
                self._thaw_ours()
                self._by_others.clear()  # freeze() looks again
        return seconds

    def _expedite(self) -> None:
        """Until the thaw.  A kernel without the file, or one that is not ours
        to write, has the freeze itself to warm up."""
        if self._open and self._expedited is None:
            with contextlib.suppress(OSError):
                what = "let RCU grace periods take their time again"
                self._expedited = self._plan.set_file(RCU_EXPEDITED, "1", what)

    def cool_down(self) -> None:
        """The opposite of `warm_up`; `thaw` does it, too."""
        held, self._expedited = self._expedited, None
        if held is not None:
            self._plan.undo(held)

    def thaw(self, only: Mount | None = None) -> None:
        """Thaw what `freeze` froze (or this one), in reverse order, and let
        others freeze."""
        try:
            self._thaw_ours(only)
        finally:
            if only is None:
                self.cool_down()
                self._by_others.clear()  # freeze() looks again
            for o in self._open:
                if only not in (None, o.mount):
                    continue
                fcntl.flock(o.fd, fcntl.LOCK_UN)
                if o.foreseen is not None:
                    self._plan.done(o.foreseen)
                    o.foreseen = None
            self._locked = False

    def _thaw_ours(self, only: Mount | None = None) -> None:
        failed: list[str] = []
        for o in reversed(self._open):
            if o.held is None or only not in (None, o.mount):
                continue
            try:
                self._plan.undo(o.held, keep_note=True)
            except DeviceControlError as e:
                failed.append(str(e))
                o.foreseen = None  # stays in the journal
            o.held = None
        if failed:
            raise DeviceControlError("; ".join(failed))
