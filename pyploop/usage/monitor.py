# SPDX-License-Identifier: Apache-2.0
"""Who uses a source, from before the first block until the last.

At the start everything is looked for, and a copy that cannot be right does not
begin.  Between rounds only what can have changed is looked at: mounts, swap space,
loop devices, partitions.  Inside the freeze nothing is searched unless one of
these has changed.
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
from pyploop.undo.ledger import UndoLedger
from pyploop.usage import users
from pyploop.usage.related_devices import Dev, Member, RelatedDevices, find_related
from pyploop.usage.untracked_writes import UntrackedWrites
from pyploop.usage.users import Found, User

FLAG = "--unsafe-in-use"


_LOOP_FILES = ("loop/backing_file", "loop/offset", "size")
"""What tells which part of which file a loop device shows."""


@dataclass(frozen=True)
class _Sight:
    """What tells at a glance that there may be other users."""

    mounts: bytes = b""
    swaps: bytes = b""
    devices: tuple[str, ...] = ()
    loops: tuple[bytes, ...] = ()

    @classmethod
    def now(cls) -> _Sight:
        names = sysblock.loop_names()
        return cls(
            _read("/proc/self/mountinfo"),
            _read("/proc/swaps"),
            (*sysblock.names("/sys/class/block"), *names),
            # What shared no byte with the source may, once it is moved or grows.
            tuple(_read(f"/sys/block/{n}/{f}") for n in names for f in _LOOP_FILES),
        )


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as f:
            return f.readall()
    except OSError:
        return b""


@dataclass(frozen=True)
class Subject:
    """What is copied."""

    path: str
    related: RelatedDevices | None
    """None: a plain file."""
    files: Sequence[tuple[Dev, int]] = ()
    """Device and inode of the file in which its bytes are, if they are in one; two
    of them when it is written through an overlay."""
    name: str = ""
    """That file's."""
    fds: Sequence[int] = ()
    """The same, open, when it can be had."""


class Monitor:
    """The users of one open source."""

    def __init__(self, subject: Subject, given: Sequence[Mount] = (), unsafe: bool = False) -> None:
        """given: what the user says is to be frozen.  unsafe: he says that the
        copy is to be made whatever is found."""
        self._subject, self._given, self._unsafe = subject, given, unsafe
        self._related = subject.related
        self._caches: dict[Dev, tuple[Member, int]] = {}
        self._owned = contextlib.ExitStack()
        self._untracked: UntrackedWrites | None = None
        self._claimed: list[Dev] = []
        self._mounted: list[Mount] = []
        self._moved = select.poll()
        """Ready once after a change of what is mounted, or of the swap space."""
        self._sight = _Sight()
        self.found = Found()

    def close(self) -> None:
        self._owned.close()

    def look(self) -> Found:
        """Search; changes nothing and keeps nothing open."""
        self._sight = _Sight.now()
        self.found = self._find()
        return self.found

    def begin(self) -> None:
        """Search, and watch from now on.  OpenError when somebody uses the source
        in a way that no copy can be right with."""
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
            # What is dirty there now is no write of the time of the copy.
            self._write_back([c for c in self._caches.values() if not c[0].tracked])
            self._untracked.count(s.related, at_start=True)
        # After the watch has begun, so that nobody comes in between.
        self.look()
        if self.found.unknown and not self._unsafe:
            raise OpenError(
                f"{users.refusal(self.found.unknown)} (or copy all the same, by {FLAG}); "
                "no target was made",
                path=s.path,
                hint="end what uses it, or copy all the same with CopyOptions(unsafe_in_use=True)",
            )

    def account(self, ledger: UndoLedger) -> None:
        """Have on, while the ledger is there, what tells of writes past the queue."""
        if self._untracked is not None:
            self._untracked.account(ledger)

    # ---- page caches

    def _open_caches(self) -> None:
        assert self._related is not None
        for member in self._related.members:
            # What a mapped device lies on is its driver's alone, and may not even answer.
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
                    f"{what}, to see who uses it: {e.strerror} (copy all the same, by {FLAG})"
                ) from e
            self._owned.callback(os.close, fd)
            self._caches[member.device.dev] = member, fd

    def _path_of(self, member: Member) -> str:
        assert self._related is not None
        return self._subject.path if member is self._related.members[0] else member.path

    def write_back(self) -> None:
        """Write back what was written through the page cache of any device that
        shares bytes with the source, the uppermost first; until then neither a
        tracker nor a read of ours knows of it."""
        self._write_back(sorted(self._caches.values(), key=lambda c: -c[0].height))

    @property
    def _may_be_mapped(self) -> bool:
        """It is a plain file, and somebody has it open for writing, or mapped."""
        return self._related is None and any(u.state == "compared" for u in self.found.users)

    @property
    def may_be_written_unseen(self) -> bool:
        """A mapped file on tmpfs is never written back, so it gets no new time."""
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

    # ---- who is there

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
        """Loop devices on a plain file: what is mounted there is not frozen."""
        return [
            User(loop.path, f"shows {self._subject.name}", "unknown", f"copy {loop.path} instead")
            for loop in sysblock.loops()
            if loop.file in self._subject.files
        ]

    def _swaps(self) -> list[User]:
        """The file itself; the kernel writes it below any file system."""
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
            found.append(User(users.describe(pid), what, state, "end it", passing=True))
        return found

    # ---- later

    def changed(self, last: bool = False) -> list[User]:
        """Who has come since the last look and can be lived with: a file system that
        is to be frozen with the others, a process that may end in time.  LoopError
        when somebody cannot.  last: the freeze comes next."""
        self._moved.poll(0)
        sight = _Sight.now()
        openers = self._untracked.openers if self._untracked is not None else set()
        quiet = sight == self._sight and not openers
        if quiet and last:
            waiting = any(u.passing for u in self.found.unknown)
            quiet = not waiting and self._claims() == self._claimed
        if quiet:
            return []
        known = self.found
        try:
            self._renew()
        except SysfsError as e:  # a device has vanished: seen in full next time
            if not last:
                return []
            raise LoopError(f"{e}: the users of {self._subject.path} cannot be known") from e
        openers.clear()
        self._sight = sight
        if not self._unsafe:
            bad = [u for u in self.found.unknown if last or not u.passing]
            if bad:
                raise LoopError(
                    f"{users.refusal(bad)}; this began during the copy of {self._subject.path}; "
                    "no target was made"
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
        """What was written past the queue since the last look, in words: blocks
        that can be anywhere.  Inside the freeze a user whom the copy is to
        disregard would go on for ever."""
        if self._untracked is None or (frozen and self._unsafe):
            return []
        return self._untracked.look()

    def check_end(self) -> None:
        """Inside the freeze: LoopError unless the users are those that were known, and
        nothing was written past the queue since the last `untracked_writes`.  Nothing is
        searched unless something has happened, and then only there."""
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
            else:  # it may have left the file to another, or to a loop device
                self.changed(last=True)
                found += self.untracked_writes()
        if found:
            raise LoopError(
                f"{'; '.join(found)}: this came while the last blocks of {self._subject.path} "
                "were sent; no target was made"
            )

    def _mounted_since(self) -> list[str]:
        """What was mounted since the last look, in words; LoopError for swap space."""
        if self._related is None or _read("/proc/swaps") != self._sight.swaps:
            self.changed(last=True)
        known = {m.device() for m in self._mounted}
        new = [m for m in self._mounts() if m.device() not in known]
        return [f"{m.source} is mounted at {m.point} ({m.fstype})" for m in new]

    # ---- for the log

    def warnings(self) -> list[str]:
        """What must be said, a line each."""
        said = [f"Not frozen: {u}" for u in self.found.users if u.state == "unfrozen"]
        said += [
            f"{u}: what it writes is found by comparing; stop it with -F"
            for u in self.found.users
            if u.state == "compared"
        ]
        if self._untracked is not None and self._untracked.why_not:
            name, why = self._subject.name, self._untracked.why_not
            said.append(f"Writes to {name} beside its loop device cannot be seen: {why}")
        sees_all = sysblock.has_capability(sysblock.CAP_SYS_PTRACE)
        if self._untracked is not None and self._subject.files and not sees_all:
            said.append(
                f"Not all processes that had {self._subject.name} open for writing before the copy "
                "can be seen: that takes the capability CAP_SYS_PTRACE"
            )
        return said

    @property
    def unsafe(self) -> list[str]:
        """Whom the user wants to be disregarded."""
        return [str(u) for u in self.found.unknown] if self._unsafe else []
