# SPDX-License-Identifier: Apache-2.0
"""What is mounted where: the only reader of /proc/PID/mountinfo (proc_pid_mountinfo(5)).

Two files are on the same mount when the mount's number (mnt_id) is the same.  Device
numbers do not show that: a btrfs subvolume has another one than the folder above it, and
a bind mount may have the same.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyploop.system import sysblock
from pyploop.system.sysblock import BlockDevice

OWN = Path("/proc/self/mountinfo")


def unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash in octal."""
    if "\\" not in text:
        return text
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)


@dataclass(frozen=True)
class Entry:
    """One line of a mountinfo."""

    number: int
    dev: tuple[int, int]
    """Of the file system; anonymous ones have major 0."""
    root: str
    """What of the file system is mounted: a path within it."""
    point: str
    fstype: str
    source: str
    escaped_options: str
    """Of the file system, not of this mount; special characters are in octal."""
    own_options: tuple[str, ...] = ()
    """Of this mount."""

    @property
    def options(self) -> str:
        return unescape(self.escaped_options)

    @property
    def option_list(self) -> list[str]:
        """Split at the commas that separate options; one in a value is in octal."""
        return [unescape(option) for option in self.escaped_options.split(",")]

    @property
    def read_only(self) -> bool:
        """The file system, not only this mount of it."""
        return "ro" in self.option_list

    def option(self, name: str) -> str | None:
        """The value of an option; None when the file system does not have it."""
        values = [o.partition("=")[2] for o in self.option_list if o.startswith(f"{name}=")]
        return values[-1] if values else None

    def device(self) -> tuple[int, int] | None:
        """The block device that is mounted; None when there is none, as on tmpfs."""
        if self.dev[0]:
            return self.dev
        try:
            st = os.stat(self.source)
        except (OSError, ValueError):
            return None
        if not self.source.startswith("/") or not stat.S_ISBLK(st.st_mode):
            return None
        return sysblock.dev_numbers(st.st_rdev)

    def devices(self) -> set[tuple[int, int]]:
        """The block devices that the file system writes.  A btrfs can have several, and
        its own number is of none of them.  An XFS can have a log device."""
        if self.fstype == "btrfs":
            dev = sysblock.device_number(self.source)
            return set() if dev is None else sysblock.btrfs_devices(dev)
        found = {self.dev}
        if self.fstype == "xfs":
            for name in ("logdev", "rtdev"):
                if (path := self.option(name)) and (dev := sysblock.device_number(path)):
                    found.add(dev)
        return found

    def upper_folder(self) -> str | None:
        """The folder to which an overlay writes; None: it has none."""
        path = self.option("upperdir") if self.fstype == "overlay" else None
        if path is None or os.path.exists(path):
            return path
        # Older kernels show the name as the mount command had it, with `\,` for a comma.
        return re.sub(r"\\(.)", r"\1", path)


def read(path: Path = OWN) -> list[Entry]:
    """All of it, in the order of mounting.  OSError."""
    found = []
    # A name may hold any byte that the kernel does not escape.  Some of these are spaces or
    # ends of lines for str.split() and str.splitlines().
    for line in sysblock.text_of(path).split("\n"):
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(rest) < 2:
            continue
        found.append(
            Entry(
                int(fields[0]),
                sysblock.parse_dev(fields[2]),
                unescape(fields[3]),
                unescape(fields[4]),
                rest[0],
                unescape(rest[1]),
                rest[2] if len(rest) > 2 else "",
                tuple(fields[5].split(",")),
            )
        )
    return found


# ---- by path


def number_of_file(fd: int) -> int | None:
    """The number of the mount on which an open file lies; None: this kernel does not
    show it."""
    with open(f"/proc/self/fdinfo/{fd}") as f:
        return next((int(x.split()[1]) for x in f if x.startswith("mnt_id:")), None)


def number_of(path: str) -> int | None:
    """The same for the file that a path leads to.  OSError."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return number_of_file(fd)
    finally:
        os.close(fd)


def holding(path: str) -> Entry | None:
    """The mount on which a file lies; None when there is no such file."""
    try:
        number = number_of(path)
    except FileNotFoundError:
        return None
    return next((e for e in read() if e.number == number), None)


def holding_by_name(path: str) -> Entry | None:
    """The mount whose point is the longest start of this path.  The file is not opened,
    and may be on a server that does not answer."""
    found: Entry | None = None
    for entry in read():
        longest = found is None or len(entry.point) >= len(found.point)
        if longest and within(path, entry.point):
            found = entry
    return found


def at(path: str) -> Entry | None:
    """The mount that is seen at this very path.  None when nothing is mounted there, or
    when a mount further up hides it."""
    real = os.path.realpath(path)
    try:
        number = number_of(real)
    except FileNotFoundError:
        return None
    except OSError:  # mounted from a server that no longer answers
        return next((e for e in reversed(read()) if e.point == real), None)
    found = next((e for e in read() if e.number == number), None)
    return found if found is not None and found.point == real else None


def below(path: str) -> list[Entry]:
    """The mounts below this folder that can be seen."""
    real = os.path.realpath(path)
    return [e for e in read() if within(e.point, real, itself=False) and _is_seen(e)]


def _is_seen(entry: Entry) -> bool:
    try:
        return number_of(entry.point) == entry.number
    except FileNotFoundError:
        return False
    except OSError:
        return True


def mount_points_below(folder: str) -> list[str]:
    """All mount points below this folder, hidden ones too; the innermost first."""
    return [e.point for e in reversed(read()) if within(e.point, folder, itself=False)]


def within(path: str, folder: str, itself: bool = True) -> bool:
    """The path is below the folder by its name, or is the folder (unless not `itself`)."""
    if path == folder:
        return itself
    return path.startswith(folder.rstrip("/") + "/")


def path_in(entry: Entry, path: str) -> str:
    """Where a file of the mount lies within its file system."""
    rest = path[len(entry.point.rstrip("/")) :].lstrip("/")
    return f"{entry.root.rstrip('/')}/{rest}".rstrip("/") or "/"


# ---- by device


@dataclass(frozen=True)
class Mount:
    """One mounted file system: its mount point and what it is mounted from."""

    point: str
    fstype: str
    source: str
    dev: tuple[int, int] | None = None
    """`st_dev` of files on it; None: not known (each btrfs subvolume has its own)."""

    def device(self) -> tuple[int, int] | None:
        """The block device that is mounted."""
        if self.dev is not None:
            return self.dev
        try:
            return sysblock.dev_numbers(os.stat(self.source).st_rdev)
        except OSError:
            return None

    def is_at(self, st: os.stat_result) -> bool:
        """This folder or file lies on the file system, not on another that hides it."""
        known = stat.S_ISDIR(st.st_mode) or stat.S_ISREG(st.st_mode)
        return known and self.dev in (None, sysblock.dev_numbers(st.st_dev))

    def rank(self) -> int:
        """How well this mount point can be opened.  2: a folder.  1: a file that is
        mounted by itself.  0: hidden, or a socket, a pipe, a device node."""
        try:
            st = os.stat(self.point)
        except OSError:
            return 0
        return 0 if not self.is_at(st) else 2 if stat.S_ISDIR(st.st_mode) else 1


def of_device(dev: tuple[int, int]) -> Entry | None:
    """The first mount of the file system with this number; None: it is not mounted here."""
    return next((e for e in read() if e.dev == dev), None)


def mount_points(dev: str) -> list[str]:
    """Where the file system with this device number ('8:1') is mounted here."""
    return [e.point for e in read() if dev == f"{e.dev[0]}:{e.dev[1]}"]


def mounts_of(devices: Sequence[BlockDevice], mountinfo: Path = OWN) -> list[Mount]:
    """Mounted file systems of these devices, one mount point for each."""
    wanted = {d.dev for d in devices}
    result: dict[tuple[int, int], Mount] = {}
    for entry in read(mountinfo):
        if entry.dev not in wanted and entry.fstype not in ("btrfs", "xfs"):
            continue
        written = entry.devices()
        if not written & wanted:
            continue
        # A btrfs shows an anonymous number, and each subvolume has its own.
        of_btrfs = entry.fstype == "btrfs"
        dev = min(written) if of_btrfs else entry.dev
        # A file system that is mounted twice is frozen once.  A later mount may hide an
        # earlier one, so the point that can be opened best is kept.
        mount = Mount(entry.point, entry.fstype, entry.source, None if of_btrfs else dev)
        if dev not in result or mount.rank() > result[dev].rank():
            result[dev] = mount
    return list(result.values())


def mounted_elsewhere(devices: Sequence[BlockDevice]) -> tuple[int, Mount] | None:
    """A process that has one of the devices mounted in a mount namespace of its own, and
    that mount; None when there is no such process."""
    seen = {os.readlink("/proc/self/ns/mnt")}
    for pid in sysblock.processes():
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            mounts = mounts_of(devices, Path(f"/proc/{pid}/mountinfo"))
        except OSError:
            continue
        if mounts:
            return pid, mounts[0]
    return None


def cgroup_mounts() -> list[tuple[str, list[str] | None]]:
    """Mounted cgroup hierarchies: (folder, controllers), None for v2."""
    kinds = {"cgroup", "cgroup2"}
    return [
        (e.point, e.option_list if e.fstype == "cgroup" else None)
        for e in read()
        if e.fstype in kinds
    ]
