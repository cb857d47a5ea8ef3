# SPDX-License-Identifier: Apache-2.0
"""Watches the users of a source during a copy.

At the start everything is searched, and a copy that cannot be right does not begin.
Between rounds only what can have changed is looked at: mounts, swap space, loop devices,
partitions.  Inside the freeze nothing is searched unless one of these has changed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections.abc import Sequence
from dataclasses import dataclass

from pyploop.errors import DeviceControlError, DeviceError, LoopError, OpenError, SysfsError
from pyploop.system import kernel, mount_table, sysblock
from pyploop.system.claims import is_claimed
from pyploop.system.mount_table import Mount
from pyploop.system.sysblock import contents
from pyploop.undo.ledger import UndoLedger
from pyploop.usage import users
from pyploop.usage.related_devices import Dev, Member, RelatedDevices, find_related
from pyploop.usage.untracked_writes import UntrackedWrites
from pyploop.usage.users import Found, User

FLAG = "--unsafe-in-use"


_LOOP_FILES = ("loop/backing_file", "loop/offset", "size")
"""Attributes that show which part of which file a loop device has."""


@dataclass(frozen=True)
class _Snapshot:
    """Cheap to read, and different when there may be new users."""

    mounts: bytes = b""
    swaps: bytes = b""
    devices: tuple[str, ...] = ()
    loops: tuple[bytes, ...] = ()

    @classmethod
    def now(cls) -> _Snapshot:
        names = sysblock.loop_names()
        return cls(
            contents("/proc/self/mountinfo"),
            contents("/proc/swaps"),
            (*sysblock.names("/sys/class/block"), *names),
            # A loop device that shares no byte with the source can do so after it was moved
            # or has grown.
            tuple(contents(f"/sys/block/{n}/{f}") for n in names for f in _LOOP_FILES),
        )


@dataclass(frozen=True)
class Subject:
    """What is copied."""

    path: str
    related: RelatedDevices | None
    """None: a plain file."""
    files: Sequence[tuple[Dev, int]] = ()
    """Device number and inode of the file that has its bytes, if a file does.  An overlay's
    file has two of each."""
    name: str = ""
    """The name of that file."""
    fds: Sequence[int] = ()
    """The same file, open, when it can be opened."""


class Monitor:
    """The users of one open source."""

    def __init__(self, subject: Subject, given: Sequence[Mount] = (), unsafe: bool = False) -> None:
        """given: the mounts that the user wants frozen.  unsafe: the user wants the copy made
        whatever is found."""
        self._subject, self._given, self._unsafe = subject, given, unsafe
        self._related = subject.related
        self._caches: dict[Dev, tuple[Member, int]] = {}
        self._owned = contextlib.ExitStack()
        self._untracked: UntrackedWrites | None = None
        self._claimed: list[Dev] = []
        self._mounted: list[Mount] = []
        self._moved = select.poll()
        """Ready once after each change of the mounts or the swap space."""
        self._snapshot = _Snapshot()
        self.found = Found()

    def close(self) -> None:
        self._owned.close()

    def look(self) -> Found:
        """Search; changes nothing and keeps nothing open."""
        self._snapshot = _Snapshot.now()
        self.found = self._find()
        return self.found

    def begin(self) -> None:
        """Search, and watch from now on.  OpenError when a user of the source makes a right
        copy impossible."""
        s = self._subject
        for path in ("/proc/self/mountinfo", "/proc/swaps"):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._owned.callback(os.close, fd)
                self._moved.register(fd, select.POLLPRI)
        if s.related is not None:
            self._untracked = UntrackedWrites(s.fds, s.files, s.name)
            self._owned.callback(self._untracked.close)
            self._open_caches()
            # Writes from before the copy must not count as writes during it.
            self._write_back([c for c in self._caches.values() if not c[0].tracked])
            self._untracked.count(s.related, at_start=True)
        # The watch has begun before, so that no user is missed in between.
        self.look()
        if self.found.unknown and not self._unsafe:
            raise OpenError(
                f"{users.refusal(self.found.unknown)}; no target was made",
                path=s.path,
                hint=f"to copy all the same: {FLAG} (unsafe_in_use=True); the copy may be stale",
            )

    def account(self, ledger: UndoLedger) -> None:
        """Switch on the accounting that shows writes past the queue, until the ledger is
        closed."""
        if self._untracked is not None:
            self._untracked.account(ledger)

    # ---- page caches

    def _open_caches(self) -> None:
        assert self._related is not None
        for member in self._related.members:
            # The devices below a mapped one are used by its driver only, and may not answer.
            mapped = not member.tracked and self._related.loop is None
            if mapped or member.device.dev in self._caches:
                continue
            path = self._path_of(member)
            try:
                fd = sysblock.open_device(path, member.device.dev)
            except OSError as e:
                if e.errno in (errno.ENXIO, errno.ENOMEDIUM):
                    continue
                what = f"cannot open {path}, which shares bytes with {self._subject.path}"
                if e.errno != errno.ENOENT:
                    raise DeviceError.of(what, e) from e
                if self._unsafe:
                    continue
                raise OpenError(
                    f"{what}, to see who uses it: {e.strerror}; no target was made",
                    path=path,
                    hint=f"to copy all the same: {FLAG} (unsafe_in_use=True); the copy may be "
                    "stale",
                ) from e
            self._owned.callback(os.close, fd)
            self._caches[member.device.dev] = member, fd

    def _path_of(self, member: Member) -> str:
        assert self._related is not None
        return self._subject.path if member is self._related.members[0] else member.path

    def write_back(self) -> None:
        """Write back the page caches of all devices that share bytes with the source, the
        uppermost first.  Neither a tracker nor our own reads see a write before that."""
        self._write_back(sorted(self._caches.values(), key=lambda c: -c[0].height))

    @property
    def _may_be_mapped(self) -> bool:
        """It is a plain file that a process has open for writing, or mapped."""
        return self._related is None and any(u.state == "compared" for u in self.found.users)

    @property
    def may_be_written_unseen(self) -> bool:
        """True for a mapped file on tmpfs: it is never written back, so its times do not
        change."""
        s = self._subject
        return self._may_be_mapped and any(kernel.is_tmpfs(fd, s.name) for fd in s.fds)

    @staticmethod
    def _write_back(caches: Sequence[tuple[Member, int]]) -> None:
        for member, fd in caches:
            try:
                kernel.write_back(fd, member.path)
            except OSError as e:
                what = f"cannot write back the page cache of {member.path}"
                raise DeviceControlError.of(what, e) from e

    # ---- search

    def _find(self) -> Found:
        if self._related is None:
            return Found([], [*self._attached(), *self._swaps(), *self._writers("compared")])
        self._mounted = self._mounts()
        self._claimed = self._claims()
        found = users.find(self._subject.path, self._related, self._given)
        return Found(found.mounts, [*found.users, *self._swaps(), *self._writers("unknown")])

    def _mounts(self) -> list[Mount]:
        members = [] if self._related is None else [m.device for m in self._related.members]
        return mount_table.mounts_of(members)

    def _claims(self) -> list[Dev]:
        members = [] if self._related is None else self._related.members
        return [
            m.device.dev
            for m in members
            if is_claimed(m.device.dev, self._path_of(m), unknown=False)
        ]

    def _attached(self) -> list[User]:
        """Loop devices on a plain file.  What is mounted from them is not frozen."""
        return [
            User(loop.path, f"shows {self._subject.name}", "unknown", f"copy {loop.path} instead")
            for loop in sysblock.loops()
            if loop.file in self._subject.files
        ]

    def _swaps(self) -> list[User]:
        """The source file used as swap space: the kernel writes to it below the file
        system."""
        found = []
        for name in users.swaps():
            with contextlib.suppress(OSError):
                st = os.stat(name)
                if sysblock.file_id(st) in self._subject.files:
                    what = "is swap space in use, which nothing stops"
                    found.append(User(name, what, "unknown", f"swapoff {name}"))
        return found

    def _writers(self, state: users.State) -> list[User]:
        s = self._subject
        found = []
        for pid, how in users.writers(s.files) if s.files else []:
            shown = "" if state == "compared" else f", which {s.path} shows,"
            what = f"has {s.name}{shown} {how} for writing"
            found.append(User(users.describe(pid), what, state, "end that process", passing=True))
        return found

    # ---- during the copy

    def changed(self, last: bool = False) -> list[User]:
        """The new users since the last call with which a copy can go on: a file system that
        can be frozen with the others, a process that may end in time.  LoopError for any
        other.  last: the freeze comes next."""
        self._moved.poll(0)
        snapshot = _Snapshot.now()
        openers = self._untracked.openers if self._untracked is not None else set()
        quiet = snapshot == self._snapshot and not openers
        if quiet and last:
            waiting = any(u.passing for u in self.found.unknown)
            quiet = not waiting and self._claims() == self._claimed
        if quiet:
            return []
        known = self.found
        try:
            self._renew()
        except SysfsError as e:  # a device was removed: the next call sees all of it
            if not last:
                return []
            raise LoopError(
                f"cannot find out who uses {self._subject.path}: {e}; no target was made",
                path=self._subject.path,
            ) from e
        openers.clear()
        self._snapshot = snapshot
        if not self._unsafe:
            bad = [u for u in self.found.unknown if last or not u.passing]
            if bad:
                raise LoopError(
                    f"{users.refusal(bad)}; this began during the copy of {self._subject.path}; "
                    "no target was made",
                    path=self._subject.path,
                )
        return [u for u in self.found.users if u not in known.users]

    def _renew(self) -> None:
        if self._related is not None:
            self._related = find_related(self._related.members[0].device)
            if self._untracked is not None:
                self._open_caches()
                self._untracked.count(self._related, at_start=False)
        self.found = self._find()

    def untracked_writes(self, frozen: bool = False) -> list[str]:
        """Writes past the queue since the last call, as texts; the blocks are not known.
        Inside the freeze there are none when `unsafe` is set: the copy would never end."""
        if self._untracked is None or (frozen and self._unsafe):
            return []
        return self._untracked.look()

    def check_end(self) -> None:
        """Inside the freeze: LoopError when there is a new user, or a write past the queue
        since the last `untracked_writes`.  It searches only where something has changed."""
        if self._unsafe:
            return
        found = self.untracked_writes()
        if self._moved.poll(0):
            found += self._mounted_since()
        if set(self._claims()) - set(self._claimed):  # or in another mount namespace
            self.changed(last=True)
        if self._untracked is not None and (openers := self._untracked.openers):
            if all(os.path.exists(f"/proc/{pid}") for pid in openers):
                for pid, how in users.writers(self._subject.files, openers):
                    found.append(f"{users.describe(pid)} has {self._subject.name} {how}")
            else:  # it may have passed the file on, or attached it
                self.changed(last=True)
                found += self.untracked_writes()
        if found:
            raise LoopError(
                f"{'; '.join(found)}: this happened while the last blocks of "
                f"{self._subject.path} were sent; no target was made",
                path=self._subject.path,
                hint="end that use, then copy again",
            )

    def _mounted_since(self) -> list[str]:
        """New mounts since the last search, as texts; LoopError for swap space."""
        if self._related is None or contents("/proc/swaps") != self._snapshot.swaps:
            self.changed(last=True)
        known = {m.device() for m in self._mounted}
        new = [m for m in self._mounts() if m.device() not in known]
        return [f"{m.source} is mounted at {m.point} ({m.fstype})" for m in new]

    # ---- for the log

    def warnings(self) -> list[str]:
        """Warnings for the user, one line each."""
        lines = [f"Not frozen: {u}" for u in self.found.users if u.state == "unfrozen"]
        lines += [
            f"{u}: its writes are found by comparing all blocks; stop it with -F"
            for u in self.found.users
            if u.state == "compared"
        ]
        if self._untracked is not None and self._untracked.why_not:
            name, why = self._subject.name, self._untracked.why_not
            lines.append(f"Writes to {name} that bypass its loop device cannot be seen: {why}")
        sees_all = sysblock.has_capability(sysblock.CAP_SYS_PTRACE)
        if self._untracked is not None and self._subject.files and not sees_all:
            lines.append(
                f"Some processes that have {self._subject.name} open for writing may not be seen: "
                "that needs the capability CAP_SYS_PTRACE"
            )
        return lines

    @property
    def unsafe(self) -> list[str]:
        """The users that are ignored because of `--unsafe-in-use`, as texts."""
        return [str(u) for u in self.found.unknown] if self._unsafe else []
