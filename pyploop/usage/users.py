# SPDX-License-Identifier: Apache-2.0
"""The users of a source: file systems, swap space, drivers, processes.

A file system whose writes pass the source's request queue is frozen with it.  For any
other user no copy begins, and the message names it: its writes would be missing from the
copy, or would be there in part.  A user of a block device claims it in the kernel.  So a
claim that no known user explains is reported as an unknown user.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pyploop.system import kernel, mount_table, sysblock
from pyploop.system.claims import is_claimed
from pyploop.system.mount_table import Mount
from pyploop.system.sysblock import BlockDevice, contents, partitions
from pyploop.usage.related_devices import Dev, Member, RelatedDevices

CLAIM_TRIES = 6
CLAIM_PAUSE = 0.02
"""Seconds before an unexplained claim is looked at again: mkfs, blkid and the search of
another copy claim a device for an instant."""


State = Literal["frozen", "unfrozen", "compared", "unknown"]


@dataclass(frozen=True)
class User:
    """A user of the source."""

    device: str
    what: str
    """A predicate: `is mounted at /m (ext4)`."""
    state: State
    """frozen: it is frozen with the source.  unfrozen: it is not, as `--mount` names another.
    compared: its writes are found by comparing all blocks.  unknown: no copy is right while
    it is there."""
    advice: str = ""
    """What to do about an unknown one."""
    passing: bool = False
    """It may end before the copy does: a process, a short claim."""

    def __str__(self) -> str:
        return f"{self.device} {self.what}"


@dataclass(frozen=True)
class Found:
    """The result of `find`."""

    mounts: list[Mount] = field(default_factory=list)
    """To be frozen."""
    users: list[User] = field(default_factory=list)

    @property
    def unknown(self) -> list[User]:
        return [u for u in self.users if u.state == "unknown"]


def refusal(users: Iterable[User]) -> str:
    """The users and what to do about each, in one sentence."""
    return "; ".join(f"{u}: {u.advice}" for u in users)


def find(path: str, find_related: RelatedDevices, given: Sequence[Mount] = ()) -> Found:
    """All users of the source `path`.  given: the mounts that the person wants frozen,
    instead of those that are found."""
    for _ in range(CLAIM_TRIES):
        finder = _Finder(path, find_related, given)
        found = finder.all()
        if not finder.unexplained:
            break
        time.sleep(CLAIM_PAUSE)  # it may be a new mount: look again
    return found


class _Finder:
    def __init__(self, path: str, find_related: RelatedDevices, given: Sequence[Mount]) -> None:
        self._path, self._related, self._given = path, find_related, given
        self._users: list[User] = []
        self._explained: set[Dev] = set()
        """Devices whose claim belongs to a known user."""
        self.unexplained = False
        """There is another claim."""

    def all(self) -> Found:
        for mount in self._given:
            self._explained |= _covered(mount)
        mounts = self._mounted_here()
        self._swaps()
        self._mounted_elsewhere()
        self._claims()
        self._inside(mounts)
        return Found(mounts, self._users)

    def _add(self, device: str, what: str, advice: str, passing: bool = False) -> None:
        self._users.append(User(device, what, "unknown", advice, passing))

    def _mounted_here(self) -> list[Mount]:
        found = mount_table.mounts_of(self._related.tracked)
        given = {dev for mount in self._given for dev in _covered(mount)}
        for mount in found:
            self._explained |= _covered(mount)
            covered = not self._given or bool(_covered(mount) & given)
            what = f"is mounted at {mount.point} ({mount.fstype})"
            if not covered:
                what += ", and is not frozen: --mount names another"
            self._users.append(User(mount.source, what, "frozen" if covered else "unfrozen"))
        for device in self._related.untracked:
            for entry in mount_table.read():
                if device.dev in entry.devices() - self._explained:
                    self._explained.add(device.dev)
                    if not entry.read_only:  # else it is only read
                        self._untracked(device, f"is mounted at {entry.point} ({entry.fstype})")
        return list(self._given) or found

    def _inside(self, mounts: Sequence[Mount]) -> None:
        """File systems on files inside those that will be frozen.  Data that they have not
        written back to their file is not in the copy."""
        covered = {dev for mount in mounts for dev in _covered(mount)}
        for loop in sysblock.loops() if covered else []:
            if loop.below is not None or loop.file[0] not in covered:
                continue
            devices = {d.dev for d in (loop.device, *partitions(loop.device))} - self._explained
            for entry in mount_table.read():
                if entry.dev in devices and not entry.read_only:
                    devices.remove(entry.dev)
                    self._users.append(
                        User(
                            entry.source,
                            f"is mounted at {entry.point} ({entry.fstype}), from {loop.name} on "
                            f"{self._path}: in the copy that is as after a power failure",
                            "unfrozen",
                        )
                    )

    def _untracked(self, device: BlockDevice, what: str) -> None:
        name = f"/dev/{device.name}"
        why = f"{what}, and its writes to the bytes of {self._path} do not pass that device"
        self._add(name, why, f"copy {name} instead, or unmount it")

    def _mounted_elsewhere(self) -> None:
        members = {m.device.dev: m for m in self._related.members}
        while rest := [m.device for m in members.values() if m.device.dev not in self._explained]:
            elsewhere = mount_table.mounted_elsewhere(rest)
            if elsewhere is None:
                return
            pid, there = elsewhere
            member = members.get(there.device() or (0, 0))
            if member is None or member.device not in rest:  # one of its other devices
                member = members[rest[0].dev]
                self._explained |= {d.dev for d in rest}
            self._explained.add(member.device.dev)
            what = f"is mounted in another mount namespace (process {pid}, {there.point})"
            if not member.tracked:
                self._untracked(member.device, what)
            elif self._given:
                what += ", and is not frozen: --mount names another"
                self._users.append(User(there.source, what, "unfrozen"))
            else:
                what += ", so it cannot be frozen from here"
                self._add(there.source, what, f"use --mount /proc/{pid}/root{there.point}")

    def _swaps(self) -> None:
        members = {m.device.dev for m in self._related.members}
        for name in swaps():
            try:
                st = os.stat(name)
            except OSError:
                continue
            if stat.S_ISBLK(st.st_mode):
                dev = sysblock.dev_numbers(st.st_rdev)
                if dev in members:
                    self._explained.add(dev)
                    self._add(
                        name, "is swap space in use, which no freeze stops", f"swapoff {name}"
                    )
            elif sysblock.dev_numbers(st.st_dev) in members or self._on_btrfs(name):
                what = f"is swap space in use on {self._path}, which no freeze stops"
                self._add(name, what, f"swapoff {name}")

    def _on_btrfs(self, name: str) -> bool:
        """The file lies on a btrfs of the source, which has a device number of its own."""
        members = {m.device.dev for m in self._related.members}
        entry = mount_table.holding_by_name(name)
        return entry is not None and entry.fstype == "btrfs" and bool(entry.devices() & members)

    # ---- claims

    def _claims(self) -> None:
        for member in self._related.members:
            if self._is_unexplained(member):
                self.unexplained = True
                self._name_claim(member)

    def _is_unexplained(self, member: Member) -> bool:
        device = member.device
        if (
            device.dev in self._explained
            or device.disk_dev in self._explained
            or _has_holders(device)
        ):
            return False
        path = self._path if member is self._related.members[0] else member.path
        if not is_claimed(device.dev, path, unknown=False):
            return False
        if device.is_partition:
            return not _has_holders(sysblock.find(device.disk_dev))
        # A claim of a partition shows on its disk.  Partitions that are members are checked
        # themselves; the others share no byte with the source.
        return not any(
            is_claimed(part.dev, f"/dev/{part.name}", unknown=False) for part in partitions(device)
        )

    def _name_claim(self, member: Member) -> None:
        name = member.device.name
        fstype = _live_file_system(name)
        if fstype:
            where = descriptor_on(member.device.dev)
            what = f"has a live {fstype} file system whose mount point cannot be found (umount -l?)"
            advice = "end the process that uses it"
            if where:
                pid = where.split("/")[2]
                advice += f" (process {pid}), or freeze it with --mount {where}"
        elif os.path.isdir(f"/proc/fs/jbd2/{name}"):
            what = "is the external journal of a mounted ext4 file system"
            advice = "unmount that file system"
        else:
            what = "is claimed by a user that /proc and /sys do not show"
            advice = "find that user and end it"
        self._add(member.path, what, advice, passing=True)


def _covered(mount: Mount) -> set[Dev]:
    """The devices that a freeze of this mount covers."""
    found = set()
    with contextlib.suppress(OSError):
        found.add(sysblock.dev_numbers(os.stat(mount.point).st_dev))
    dev = mount.device()
    if dev is not None:
        found |= sysblock.btrfs_devices(dev)
    for entry in mount_table.read():
        if entry.dev in found:
            found |= entry.devices()
    return found


def _has_holders(device: BlockDevice) -> bool:
    """A driver that sysfs shows has claimed it.  The devices of that driver are members, too."""
    return bool(sysblock.names(str(sysblock.node(device.dev) / "holders")))


def _live_file_system(name: str) -> str:
    """The type of the file system that sysfs shows for this device; empty when none."""
    for folder in Path("/sys/fs").glob(f"*/{name}"):
        return folder.parent.name
    for folder in Path("/sys/fs/btrfs").glob(f"*/devices/{name}"):
        return folder.parents[2].name
    return ""


def descriptor_on(dev: Dev) -> str:
    """A path below /proc to a folder or open file on this file system, which may have no
    mount point.  Empty when no process has one."""
    for pid in sysblock.processes():
        for path in (f"/proc/{pid}/cwd", f"/proc/{pid}/root", *_descriptors(pid)):
            try:
                st = os.stat(path)
            except OSError:
                continue
            on_it = sysblock.dev_numbers(st.st_dev) == dev
            if on_it and (stat.S_ISDIR(st.st_mode) or stat.S_ISREG(st.st_mode)):
                return path
    return ""


def swaps() -> list[str]:
    """The files and devices that are used as swap space."""
    try:
        lines = sysblock.text_of(Path("/proc/swaps")).split("\n")[1:]
    except OSError:
        return []
    return [mount_table.unescape(line.split(" ")[0].split("\t")[0]) for line in lines if line]


# ---- processes


def _descriptors(pid: int) -> Iterator[str]:
    """Its open files, as paths below /proc.  Threads that do not share a descriptor table
    with the first one (unshare(2), or the first has ended) have files of their own."""
    folders = [f"/proc/{pid}/fd"]
    folders += [f"{t}/fd" for t in _threads(pid) if not kernel.share_files(pid, _number(t))]
    for folder in folders:
        for name in sysblock.names(folder):  # none when it has ended, or we may not look
            yield f"{folder}/{name}"


def _threads(pid: int) -> list[str]:
    """The folders of its threads, without the first."""
    folder = f"/proc/{pid}/task"
    return [f"{folder}/{tid}" for tid in sysblock.names(folder) if tid != str(pid)]


def _number(thread: str) -> int:
    return int(os.path.basename(thread))


def writers(
    files: Sequence[tuple[Dev, int]], pids: Iterable[int] | None = None
) -> list[tuple[int, str]]:
    """(PID, "open" or "mapped") of the other processes that can write one of the files
    (device number, inode).  pids: look only at these."""
    inodes = {inode for _, inode in files}
    found = []
    for pid in sysblock.processes() if pids is None else pids:
        if pid == os.getpid():
            continue
        if any(_is_open_for_writing(fd, files) for fd in _descriptors(pid)):
            found.append((pid, "open"))
        elif _maps_for_writing(pid, inodes):
            found.append((pid, "mapped"))
    return found


def device_writers(devices: Collection[Dev]) -> list[int]:
    """The other processes that have one of these block devices open for writing."""
    return [
        pid
        for pid in sysblock.processes()
        if pid != os.getpid() and any(_writes_device(fd, devices) for fd in _descriptors(pid))
    ]


def _writes_device(fd: str, devices: Collection[Dev]) -> bool:
    try:
        st = os.stat(fd)
        if not stat.S_ISBLK(st.st_mode) or sysblock.dev_numbers(st.st_rdev) not in devices:
            return False
        return bool(os.lstat(fd).st_mode & stat.S_IWUSR)
    except OSError:
        return False


def _is_open_for_writing(fd: str, files: Sequence[tuple[Dev, int]]) -> bool:
    try:
        st = os.stat(fd)
        if sysblock.file_id(st) not in files:
            return False
        return bool(os.lstat(fd).st_mode & stat.S_IWUSR)  # the descriptor's own mode
    except OSError:
        return False


def _maps_for_writing(pid: int, inodes: Collection[int]) -> bool:
    """Compares inode numbers only: on btrfs and overlays `maps` has other device numbers."""
    text = contents(f"/proc/{pid}/maps")
    if not text:  # threads share their memory, but one that has ended shows none
        text = next(filter(None, (contents(f"{t}/maps") for t in _threads(pid))), b"")
    for inode in inodes:
        for line in text.split(b"\n") if b" %d " % inode in text else []:
            fields = line.split(None, 5)
            if len(fields) > 4 and fields[4] == b"%d" % inode and fields[1][1:4:2] == b"ws":
                return True
    return False


def describe(pid: int) -> str:
    """`process 4711 (dd)`."""
    try:
        name = sysblock.text_of(Path(f"/proc/{pid}/comm")).removesuffix("\n")
    except OSError:
        return f"process {pid} (it has ended)"
    return f"process {pid} ({name})"
