# SPDX-License-Identifier: Apache-2.0
"""Writes to the source's bytes that do not pass its request queue, so that no tracker sees
them: to the backing file of a loop device, and to other loop devices on that file.

fanotify reports which processes open and write the file, but not the loop driver's own
writes.  It does not report writes by io_submit or through a mapping either.  But for
these the process must open the file, so it counts as a writer until it has closed it.
Writes to another loop device show in the accounting of that device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from pyploop.system import kernel, mount_table
from pyploop.system.kernel import Access
from pyploop.system.sysblock import BlockDevice, contents, node, partitions
from pyploop.undo.ledger import UndoLedger
from pyploop.usage.io_accounting import Accounting
from pyploop.usage.related_devices import Dev, Member, RelatedDevices
from pyploop.usage.users import describe

STILL_TRIES = 20
"""How often the counters are read while writes to a neighbour change them."""
PF_KTHREAD = 0x00200000
"""Of linux/sched.h: in the flags of /proc/PID/stat."""


class UntrackedWrites:
    """Watches from its creation until `close`."""

    def __init__(self, fds: Sequence[int], files: Sequence[tuple[Dev, int]], name: str) -> None:
        """fds: the open backing file, once for each inode that it has.  It is empty when the
        file cannot be opened: it was deleted, or lies in another mount namespace.
        files: device number and inode of the same file.  name: its path."""
        self._owned = contextlib.ExitStack()
        self._name = name
        self._fds: list[int] = []
        self.why_not = ""
        """Why writes to the file cannot be seen; empty when they can."""
        self.openers: set[int] = set()
        """The processes that have opened the file since this was last emptied."""
        self._ledger: UndoLedger | None = None
        self._loops: dict[Dev, _Counters] = {}
        self._new: list[str] = []
        self._files = files
        for fd in fds:
            self._watch(fd)
        if not fds:
            for dev, _ in files:
                self._watch_file_system(dev)

    def _watch(self, fd: int, whole: bool = False) -> None:
        try:
            self._fds.append(kernel.watch_file(fd, self._name, whole=whole))
            self._owned.callback(os.close, self._fds[-1])
        except OSError as e:
            self.why_not = e.strerror or str(e)

    def _watch_file_system(self, dev: Dev) -> None:
        """Watch the whole file system of a file that cannot be opened here."""
        for point in mount_table.mount_points(f"{dev[0]}:{dev[1]}"):
            try:
                fd = os.open(point, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                self._watch(fd, whole=True)
            finally:
                os.close(fd)
            return
        self.why_not = "it cannot be opened here"

    def count(self, related: RelatedDevices, at_start: bool) -> None:
        """Count the writes to the other loop devices on the file from now on.  Earlier writes
        to a new one are not known, so its attaching is reported."""
        # Writes to a mapped device change the counters of its slaves, so these are left out.
        for member in related.members if related.loop is not None else []:
            new = not member.tracked and member.device.dev not in self._loops
            if new and not member.device.is_partition:
                with contextlib.suppress(OSError):  # detached meanwhile
                    counters = self._owned.enter_context(_Counters(member, related))
                    self._loops[member.device.dev] = counters
                    if self._ledger is not None:
                        counters.account(self._ledger)
                    self._new += [] if at_start else [f"{member.path} was attached"]

    def account(self, ledger: UndoLedger) -> None:
        """Keep the accounting of these loop devices on until `close`, or until the ledger is
        closed."""
        self._ledger = ledger
        for counters in self._loops.values():
            counters.account(ledger)

    def look(self) -> list[str]:
        """Writes past the queue since the last call, as texts."""
        found, self._new = self._new, []
        for access in [a for fd in self._fds for a in kernel.read_accesses(fd, self._name)]:
            if access.pid == os.getpid() or _is_by_loop_driver(access):
                continue
            if access.file is not None and access.file not in self._files:
                continue
            self.openers |= {access.pid} if access.opened else set()
            if access.wrote:
                who = describe(access.pid) if access.pid else "a process"
                found.append(f"{who} could write {self._name}, bypassing its loop device")
        found += [f"{c.path} was written" for c in self._loops.values() if c.moved()]
        return list(dict.fromkeys(found))

    def close(self) -> None:
        self._owned.close()


def _is_by_loop_driver(access: Access) -> bool:
    """Older kernels report the loop driver's writes, too.  The driver does not close the
    file.  A kernel thread may close it for a process that has closed it during io_submit."""
    if not access.wrote or access.closed:
        return False
    name = contents(f"/proc/{access.pid}/comm")
    return name.startswith((b"kworker", b"loop")) and _is_kernel_thread(access.pid)


def _is_kernel_thread(pid: int) -> bool:
    """By its flags.  An empty command line would also be that of an ended process."""
    fields = contents(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return len(fields) > 6 and bool(int(fields[6]) & PF_KTHREAD)


class _Counters:
    """Sectors written to one loop device that shares bytes with the source."""

    def __init__(self, member: Member, related: RelatedDevices) -> None:
        self.device, self.path = member.device, member.path
        ours = {m.device.dev for m in related.members}
        with contextlib.ExitStack() as undo:
            self._whole = self._open(self.device, undo)
            # Writes to partitions that share no byte with the source are subtracted.
            others = [p for p in partitions(self.device) if p.dev not in ours]
            self._others = [self._open(p, undo) for p in others]
            self._seen = self._count()
            self._accounting = Accounting(self.device.disk)
            undo.callback(self._accounting.stop)
            self._owned = undo.pop_all()

    def account(self, ledger: UndoLedger) -> None:
        self._accounting.start(ledger)

    @staticmethod
    def _open(device: BlockDevice, undo: contextlib.ExitStack) -> int:
        fd = os.open(node(device.dev) / "stat", os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, fd)
        return fd

    def __enter__(self) -> _Counters:
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def _count(self) -> int | None:
        """Sectors; None when writes to the neighbours kept changing the count."""
        rest = _sectors(self._others)
        for _ in range(STILL_TRIES):
            whole, before, rest = _sectors([self._whole]), rest, _sectors(self._others)
            if rest == before:
                return whole - rest
        return None

    def moved(self) -> bool:
        """True when something was written, or may have been while nothing was counted."""
        interrupted = self._accounting.interrupted()
        try:
            now = self._count()
        except OSError:
            now = None
        before, self._seen = self._seen, now
        return interrupted or now is None or now != before


def _sectors(fds: Sequence[int]) -> int:
    """Sectors written and discarded: fields 7 and 14 of `stat` (Documentation/block/stat)."""
    total = 0
    for fd in fds:
        fields = os.pread(fd, 512, 0).split()
        total += int(fields[6]) + (int(fields[13]) if len(fields) > 13 else 0)
    return total
