# SPDX-License-Identifier: Apache-2.0
"""The file systems of the source: syncfs, FIFREEZE, FITHAW."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from pyploop.errors import (
    BusyError,
    DeviceControlError,
    LoopError,
    OpenError,
    ParameterError,
)
from pyploop.freeze.mounted import FREEZABLE, Mounted
from pyploop.report.events import Reporter
from pyploop.system import kernel, sysblock
from pyploop.system.claims import node
from pyploop.system.mount_table import Mount
from pyploop.system.sysblock import CAP_SYS_ADMIN
from pyploop.undo.ledger import UndoLedger, UndoStep

LOCK_DEADLINE = 120.0
"""Seconds to wait for another copy's freeze of the same file system."""
RCU_EXPEDITED = "/sys/kernel/rcu_expedited"


class FileSystems:
    """The mounted file systems of the source, open, in the order of the freeze."""

    def __init__(
        self, mounts: list[Mount], report: Reporter, plan: UndoLedger | None = None
    ) -> None:
        """plan: the undo steps of the copy; None: the file systems get their own."""
        self._report = report
        self._stack = contextlib.ExitStack()
        self._all: list[Mounted] = []
        self._plan = plan or UndoLedger("frozen file systems", report)
        if plan is None:
            self._stack.callback(self._plan.close)
        self._expedited: UndoStep | None = None
        self._locks: list[int] = []
        try:
            for mount in mounts:
                self._add(mount)
        except BaseException:
            self._stack.close()
            raise

    def _add(self, mount: Mount) -> Mount:
        """Add one, unless it is already there by another mount point."""
        made = Mounted(mount)
        self._stack.callback(made.close)
        for m in self._all:
            if m.dev == made.dev:
                return m.mount
        self._all.append(made)
        return mount

    def adopt(self, mount: Mount) -> None:
        """Add a file system of the source that was mounted during the copy."""
        self._add(mount)
        self._unlock()  # so that `guard` locks this one, too
        self.try_out()

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def __len__(self) -> int:
        return len(self._all)

    def include(self, folder: str) -> Mount:
        """The file system that this folder is on; added when it was not known yet.
        ParameterError: then the folder must be its mount point."""
        try:
            st = os.stat(folder)
        except OSError as e:
            raise OpenError.of(f"cannot open the mount point {folder}", e) from e
        dev = os.major(st.st_dev), os.minor(st.st_dev)
        for m in self._all:
            if m.dev == dev:
                return m.mount
        if not os.path.ismount(folder):
            raise ParameterError(
                f"{folder} is neither a mount point nor on a file system of the source", path=folder
            )
        return self._add(Mount(folder, "?", folder, dev))

    @property
    def points(self) -> list[str]:
        """The mount points."""
        return [m.point for m in self._all]

    def holding(self, st_dev: int) -> str | None:
        """The mount point of the file system with this st_dev; None: it is not here."""
        for m in self._all:
            if m.dev == (os.major(st_dev), os.minor(st_dev)):
                return m.point
        return None

    def close(self) -> None:
        """Thaw what is frozen, close the mount points."""
        try:
            self.thaw()
        finally:
            self._stack.close()

    def let_go(self) -> None:
        """Close those that are not frozen, so that they can be unmounted.  They are
        opened again when needed, wherever they are mounted then."""
        for m in self._all:
            if m.thaw_step is None and not m.by_others:
                m.close()

    def _there(self, only: Mount | None = None) -> list[Mounted]:
        """Those that are mounted (or only this one), open.  An unmounted one needs no
        freeze: nothing writes to it."""
        chosen = [m for m in self._all if only in (None, m.mount)]
        for m in chosen:
            if m.fd < 0 and not m.gone:
                m.find_again()
                if m.gone:
                    self._report.info(f"{m.point} was unmounted, so there is nothing to freeze")
        return [m for m in chosen if not m.gone]

    def sync(self, only: Mount | None = None) -> None:
        """Write back the dirty pages of all (or of this one); also while running."""
        for m in self._there(only):
            try:
                kernel.syncfs(m.fd, m.point)
            except OSError as e:
                raise DeviceControlError.of(f"cannot sync {m.point}", e, path=m.point) from e

    # ---- before the freeze

    def try_out(self) -> None:
        """Before the first byte: find those that cannot be frozen, such as that of an
        EFI partition.  They are only synced, and a write to one during the last
        blocks fails the copy."""
        for m in self._all:
            if m.fstype not in FREEZABLE:
                self._try(m)
            if m.can_freeze and not sysblock.has_capability(CAP_SYS_ADMIN):
                raise DeviceControlError(
                    f"cannot freeze {m.point}: that needs the capability CAP_SYS_ADMIN (run as "
                    "root); nothing was copied"
                )

    def _try(self, m: Mounted) -> None:
        step = self._plan.add(m.entry, m.fd)
        try:
            kernel.fifreeze(m.fd, m.point)
        except OSError as e:
            self._plan.done(step)
            if e.errno == errno.EOPNOTSUPP:
                self._cannot_freeze(m)
            elif e.errno != errno.EBUSY:
                raise DeviceControlError.of(f"cannot freeze {m.point}", e) from e
        else:
            self._plan.undo(step)

    def _cannot_freeze(self, m: Mounted) -> None:
        m.can_freeze = False
        if not m.read_only():
            self._report.note(
                f"{m.point} ({m.fstype or 'its file system'}) cannot be frozen: it is synced "
                "instead, and the copy fails if it is written to during the last blocks"
            )

    @property
    def unfreezable(self) -> list[str]:
        """The mount points of those that cannot be frozen."""
        return [m.point for m in self._all if not m.can_freeze]

    def guard(self) -> None:
        """Lock the file systems against the freeze of another copy, and start the
        watchdog and the journal.  Before the stop command: so it costs no frozen
        time."""
        if not self._all:
            return
        self._lock()
        self._plan.start()
        for m in self._all:
            if m.prepared is None:
                m.prepared = self._plan.prepare(m.entry, m.fd)

    def _lock(self) -> None:
        """Two copies of one file system must not rely on each other's freeze.  The lock
        is on the device's node: an open mount point could not be unmounted, and every
        user can lock the device's file in sysfs."""
        if self._locks:
            return
        deadline = time.monotonic() + LOCK_DEADLINE
        for m in self._all:
            if (device := m.device) is None:
                continue
            while True:
                try:
                    self._locks.append(_lock_device(device))
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise BusyError(
                            f"another copy has frozen {m.point}, or is about to freeze it; nothing "
                            "was frozen here",
                            path=m.point,
                            hint="try again when that copy has ended",
                        ) from None
                    time.sleep(0.02)
                except OSError:
                    break  # of no device here; `check_frozen` sees what ends too early

    # ---- the freeze

    def freeze(self, only: Mount | None = None) -> None:
        """Freeze all that are not frozen yet (or only this one).  One that another
        process has frozen (the stop command) stays frozen at the end."""
        before = [m for m in self._all if m.by_others]
        self._freeze_all(only)
        for m in self._all:
            if m.by_others and m not in before:
                self._report.info(f"{m.point} is already frozen, and stays frozen after the copy")

    def _freeze_all(self, only: Mount | None = None) -> None:
        if not self._all:
            return
        self.guard()
        if self._expedited is not None:
            # Another copy may have ended meanwhile, and restored the old value.
            with contextlib.suppress(OSError):
                Path(RCU_EXPEDITED).write_text("1")
        for m in self._there(only):
            if m.thaw_step is None and not m.by_others and m.can_freeze:
                self._freeze(m)
        # The watchdog may have thawed while the kernel was still freezing.
        self._plan.watch()

    def _freeze(self, m: Mounted) -> None:
        # The undo step first: a signal right after the freeze must find it.
        m.thaw_step = self._plan.add(self._entry_of(m))
        try:
            kernel.fifreeze(m.fd, m.point)
        except OSError as e:
            self._plan.release(m.thaw_step)
            m.thaw_step = None
            if e.errno == errno.EOPNOTSUPP:
                self._cannot_freeze(m)
            elif e.errno == errno.EBUSY:
                m.by_others = True
            else:
                raise DeviceControlError.of(f"cannot freeze {m.point}", e) from e

    def _entry_of(self, m: Mounted) -> UndoStep:
        """Its undo step in the journal, with its present descriptor."""
        assert m.prepared is not None
        if any(m.prepared.entry[k] != m.entry[k] for k in ("dev", "fsid")):
            # The stop command has mounted it again with another number, or another one.
            self._plan.done(m.prepared)
            m.prepared = self._plan.prepare(m.entry, m.fd)
        m.prepared = m.prepared.by(m.fd)
        return m.prepared

    def check_frozen(self) -> None:
        """LoopError when one is not frozen any more.  A frozen file system answers
        FIFREEZE with EBUSY, in microseconds."""
        for m in self._all:
            if m.gone:
                m.check_gone()
            elif m.thaw_step is not None:
                if not self._is_frozen(m):
                    raise LoopError(
                        f"{m.point} was thawed by another process during the last blocks",
                        path=m.point,
                    )
            elif m.by_others:
                # FIFREEZE may freeze it, and this process may die right after that.
                step = self._plan.add(self._entry_of(m))
                frozen = self._is_frozen(m)
                if not frozen:
                    self._plan.undo(step, keep_prepared=True)
                    raise LoopError(
                        f"{m.point}, frozen by another process, was thawed during the last blocks",
                        path=m.point,
                    )
                self._plan.release(step)

    @staticmethod
    def _is_frozen(m: Mounted) -> bool:
        """False: it was not frozen, and is now."""
        try:
            kernel.fifreeze(m.fd, m.point)
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise DeviceControlError.of(f"cannot freeze {m.point}", e) from e
            return True
        return False

    # ---- short freezes

    def warm_up(self) -> float:
        """Freeze and thaw twice, while running.  Most of a freeze is waiting for RCU
        grace periods (20 to 50 ms).  They are short while the kernel expedites them,
        and for some milliseconds after a freeze.  It also flushes the page cache.

        Returns the seconds of the second freeze.
        """
        seconds = 0.0
        self.guard()  # the watchdog may have died meanwhile
        self._expedite()
        with self._report.deferred():
            for _ in range(2):
                start = time.monotonic()
                self._freeze_all()
                seconds = time.monotonic() - start
                self._thaw_ours()
        return seconds

    def _expedite(self) -> None:
        """Have RCU grace periods expedited until the thaw.  Where the file cannot be
        written, only the freezes of `warm_up` shorten them."""
        if self._all and self._expedited is None:
            with contextlib.suppress(OSError):
                what = "stop expediting RCU grace periods"
                self._expedited = self._plan.set_file(RCU_EXPEDITED, "1", what)

    def cool_down(self) -> None:
        """Stop expediting RCU grace periods; `thaw` does so, too."""
        step, self._expedited = self._expedited, None
        if step is not None:
            self._plan.undo(step)

    # ---- the thaw

    def thaw(self, only: Mount | None = None, *, warm: bool = False) -> None:
        """Thaw what `freeze` froze (or this one), in reverse order, and unlock it.
        warm: RCU stays expedited until `cool_down`."""
        try:
            self._thaw_ours(only)
        finally:
            if only is None:
                if not warm:
                    self.cool_down()
                self._unlock()
            for m in self._all:
                if only in (None, m.mount) and m.prepared is not None:
                    self._plan.done(m.prepared)
                    m.prepared = None

    def _thaw_ours(self, only: Mount | None = None) -> None:
        failed: list[str] = []
        for m in reversed(self._all):
            if only not in (None, m.mount):
                continue
            m.by_others = m.gone = False  # `freeze` looks again
            if m.thaw_step is None:
                continue
            try:
                self._plan.undo(m.thaw_step, keep_prepared=True)
            except DeviceControlError as e:
                failed.append(str(e))
                m.prepared = None  # it stays in the journal
            m.thaw_step = None
        if failed:
            raise DeviceControlError("; ".join(failed))


def _lock_device(device: tuple[int, int]) -> int:
    """The locked descriptor.  BlockingIOError: another copy has the lock."""
    fd = sysblock.open_device(node(device), device)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd
