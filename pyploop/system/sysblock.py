# SPDX-License-Identifier: Apache-2.0
"""What sysfs and mountinfo tell about a block device.

Paths below are relative to a root that tests can replace; `/` otherwise.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyploop.errors import SysfsError
from pyploop.system import kernel
from pyploop.units import SECTOR

CAP_SYS_PTRACE, CAP_SYS_ADMIN = 19, 21
"""Of linux/capability.h."""


@dataclass(frozen=True)
class BlockDevice:
    """A whole disk or a partition of one.  `start` and `size` are bytes of the
    whole disk; `disk` and `disk_dev` name that disk ('loop0', (7, 0))."""

    name: str
    dev: tuple[int, int]
    disk: str
    disk_dev: tuple[int, int]
    start: int
    size: int

    @property
    def is_partition(self) -> bool:
        return self.name != self.disk

    @property
    def stat_path(self) -> Path:
        """Accounting of the whole disk."""
        return Path("/sys/block") / self.disk / "stat"


@dataclass(frozen=True)
class Mount:
    """One mounted file system: its mount point and what it is mounted from."""

    point: str
    fstype: str
    source: str
    dev: tuple[int, int] | None = None
    """`st_dev` of files on it; None: cannot be told (btrfs has its own)."""

    def device(self) -> tuple[int, int] | None:
        """The block device that is mounted."""
        if self.dev is not None:
            return self.dev
        try:
            rdev = os.stat(self.source).st_rdev
        except OSError:
            return None
        return os.major(rdev), os.minor(rdev)

    def is_at(self, st: os.stat_result) -> bool:
        """This folder or file lies on the file system, not on another that hides it."""
        here = os.major(st.st_dev), os.minor(st.st_dev)
        known = stat.S_ISDIR(st.st_mode) or stat.S_ISREG(st.st_mode)
        return known and self.dev in (None, here)

    def rank(self) -> int:
        """How good this mount point is to open: 2: a folder, 1: a file that is
        mounted by itself, 0: hidden, or a socket, a pipe, a device node."""
        try:
            st = os.stat(self.point)
        except OSError:
            return 0
        return 0 if not self.is_at(st) else 2 if stat.S_ISDIR(st.st_mode) else 1


def text_of(path: Path) -> str:
    """A file of /proc or /sys.  Names in it are bytes, of any encoding or none."""
    return os.fsdecode(path.read_bytes())


def attribute(path: Path) -> str:
    """The text of a sysfs attribute; SysfsError when it cannot be read."""
    try:
        return text_of(path).strip()
    except OSError as e:
        raise SysfsError.of(f"cannot read {path}", e) from e


def number(path: Path) -> int:
    """A sysfs attribute that is one number; SysfsError when it is not."""
    text = attribute(path)
    try:
        return int(text)
    except ValueError:
        raise SysfsError(f"{path} holds {text[:40]!r}, not a number") from None


def parse_dev(text: str) -> tuple[int, int]:
    """Of `8:1`."""
    major, _, minor = text.partition(":")
    return int(major), int(minor)


def find(dev: tuple[int, int]) -> BlockDevice:
    """The device with this number."""
    link = Path(f"/sys/dev/block/{dev[0]}:{dev[1]}")
    try:
        node = link.resolve(strict=True)
    except OSError as e:
        raise SysfsError.of(f"cannot find block device {dev[0]}:{dev[1]} in sysfs", e) from e
    size = number(node / "size") * SECTOR
    if not (node / "partition").exists():
        return BlockDevice(node.name, dev, node.name, dev, 0, size)
    disk = node.parent
    start = number(node / "start") * SECTOR
    return BlockDevice(node.name, dev, disk.name, parse_dev(attribute(disk / "dev")), start, size)


def is_bio_based(disk: str) -> bool:
    """No blk-mq: requests never exist, only bios (zram, brd, dm, md)."""
    return not (Path("/sys/block") / disk / "mq").is_dir()


def stacked_on(dev: BlockDevice) -> list[BlockDevice]:
    """The device itself, its partitions, and all that dm or md stack on them."""
    found: dict[tuple[int, int], BlockDevice] = {}

    def visit(d: BlockDevice) -> None:
        if d.dev in found:
            return
        found[d.dev] = d
        node = Path(f"/sys/dev/block/{d.dev[0]}:{d.dev[1]}").resolve()
        if not d.is_partition:
            for part in sorted(node.glob(f"{d.name}*/partition")):
                visit(find(parse_dev(attribute(part.parent / "dev"))))
        holders = node / "holders"
        if holders.is_dir():
            for holder in sorted(holders.iterdir()):
                visit(find(parse_dev(attribute(holder / "dev"))))

    visit(dev)
    return list(found.values())


def unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash in octal."""
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)


@dataclass(frozen=True)
class Entry:
    """A line of mountinfo."""

    dev: tuple[int, int]
    point: str
    fstype: str
    source: str
    options: list[str]
    """Of the file system, not of the mount: `ro` is one that is not written."""


def entries(mountinfo: Path) -> list[Entry]:
    """What is mounted, as this file of /proc tells."""
    found = []
    # Bytes: a name may hold anything but what the kernel escapes, also what
    # str.split and str.splitlines take for a space or the end of a line.
    for line in text_of(mountinfo).split("\n"):
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(rest) < 2:
            continue
        options = rest[2].split(",") if len(rest) > 2 else []
        point, source = unescape(fields[4]), unescape(rest[1])
        found.append(Entry(parse_dev(fields[2]), point, rest[0], source, options))
    return found


def device_number(path: str) -> tuple[int, int] | None:
    """Of the block device with this name; None when there is none here."""
    try:
        st = os.stat(path)
    except OSError:
        return None
    return (os.major(st.st_rdev), os.minor(st.st_rdev)) if stat.S_ISBLK(st.st_mode) else None


def open_device(path: str, dev: tuple[int, int], flags: int = 0) -> int:
    """Open the block device with this number, read-only; `path` is its usual name.
    A /dev of one's own (chroot, container) may not have it, or call another device
    so: then a node is made, and removed at once."""
    flags |= os.O_RDONLY | os.O_CLOEXEC
    if device_number(path) == dev:
        return os.open(path, flags)
    for folder in ("/dev", "/tmp"):
        node = f"{folder}/.pyploop-{os.getpid()}-{threading.get_ident()}"
        try:
            os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(*dev))
        except OSError:
            continue
        try:
            return os.open(node, flags)
        except PermissionError:  # mounted nodev
            continue
        finally:
            os.unlink(node)
    raise OSError(errno.ENOENT, "there is no device node of it, and none can be made", path)


def devices_of(entry: Entry) -> set[tuple[int, int]]:
    """The block devices that the mounted file system writes: several of a btrfs,
    whose own number is none of theirs, and of an XFS with a log device."""
    if entry.fstype == "btrfs":
        dev = device_number(entry.source)
        return set() if dev is None else btrfs_devices(dev)
    found = {entry.dev}
    if entry.fstype == "xfs":
        for option in entry.options:
            name, _, value = option.partition("=")
            if name in ("logdev", "rtdev") and (dev := device_number(unescape(value))):
                found.add(dev)
    return found


def btrfs_devices(dev: tuple[int, int]) -> set[tuple[int, int]]:
    """All devices of the mounted btrfs that this one belongs to, itself included."""
    for folder in Path("/sys/fs/btrfs").glob("*/devices"):
        found = set()
        for device in folder.iterdir():
            try:
                found.add(parse_dev(attribute(device / "dev")))
            except SysfsError:  # missing from the file system
                continue
        if dev in found:
            return found
    return {dev}


def mounts_of(devices: Sequence[BlockDevice], mountinfo: Path) -> list[Mount]:
    """Mounted file systems of these devices, one mount point for each."""
    wanted = {d.dev for d in devices}
    result: dict[tuple[int, int], Mount] = {}
    for entry in entries(mountinfo):
        if entry.dev not in wanted and entry.fstype not in ("btrfs", "xfs"):
            continue
        if not devices_of(entry) & wanted:
            continue
        # A btrfs shows an anonymous number, and each subvolume has its own.
        of_btrfs = entry.fstype == "btrfs"
        dev = min(devices_of(entry)) if of_btrfs else entry.dev
        # A file system mounted twice is frozen once; a later mount may hide
        # an earlier point, so the best that can still be opened as it is.
        mount = Mount(entry.point, entry.fstype, entry.source, None if of_btrfs else dev)
        if dev not in result or mount.rank() > result[dev].rank():
            result[dev] = mount
    return list(result.values())


def mount_points(dev: str) -> list[str]:
    """Where the file system with this device number ('8:1') is mounted here."""
    found = []
    for line in text_of(Path("/proc/self/mountinfo")).split("\n"):
        fields = line.split(" ")
        if len(fields) > 4 and fields[2] == dev:
            found.append(unescape(fields[4]))
    return found


def mounted_as(dev: tuple[int, int]) -> tuple[str, list[str]] | None:
    """The type, and the options that the file system itself has, of what has this
    number; None when it is not mounted here."""
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n"):
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) > 4 and len(rest) > 2 and fields[2] == f"{dev[0]}:{dev[1]}":
            return rest[0], rest[2].split(",")
    return None


def mount_points_below(folder: str) -> list[str]:
    """Everything that is mounted below this folder, the innermost first."""
    found = []
    for line in text_of(Path("/proc/self/mountinfo")).split("\n"):
        fields = line.split(" ")
        if len(fields) > 4 and unescape(fields[4]).startswith(folder.rstrip("/") + "/"):
            found.append(unescape(fields[4]))
    return found[::-1]


def cgroup_mounts() -> list[tuple[str, list[str] | None]]:
    """Mounted cgroup hierarchies: (folder, controllers), None for v2."""
    found: list[tuple[str, list[str] | None]] = []
    for line in text_of(Path("/proc/self/mountinfo")).split("\n"):
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if rest[0] == "cgroup2":
            found.append((unescape(fields[4]), None))
        elif rest[0] == "cgroup" and len(rest) > 2:
            found.append((unescape(fields[4]), rest[2].split(",")))
    return found


def mounted_elsewhere(devices: Sequence[BlockDevice]) -> tuple[int, Mount] | None:
    """A process that sees one of the devices mounted in its own mount
    namespace, and that mount; None when no process does."""
    seen = {os.readlink("/proc/self/ns/mnt")}
    for pid in processes():
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


def has_capability(number: int) -> bool:
    """This process has it; true also when that cannot be known."""
    try:
        status = text_of(Path("/proc/self/status"))
    except OSError:
        return True
    found = re.search(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)
    return found is None or bool(int(found[1], 16) >> number & 1)


def names(folder: str) -> list[str]:
    """What is in a folder of /proc or /sys; nothing where that is not mounted, or
    not to be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def processes() -> list[int]:
    """The PIDs that /proc shows."""
    return [int(name) for name in names("/proc") if name.isdecimal()]


@dataclass(frozen=True)
class Loop:
    """An attached loop device, and the part of its backing file that it shows."""

    device: BlockDevice
    file: tuple[tuple[int, int], int]
    """The backing file: device number and inode."""
    below: tuple[int, int] | None
    """The block device that the backing file is; None: a regular file."""
    offset: int
    name: str
    """Of the backing file, as its opener saw it; ` (deleted)` after it."""

    @property
    def path(self) -> str:
        return f"/dev/{self.device.name}"


def loop_names() -> list[str]:
    """The loop devices that something is attached to."""
    return [
        name
        for name in names("/sys/block")
        if name.startswith("loop") and os.access(f"/sys/block/{name}/loop", os.F_OK)
    ]


def loops() -> list[Loop]:
    """All attached loop devices.  The kernel is asked for the file's inode: a name
    may be another file's by now, or of another mount namespace."""
    found = []
    for name in loop_names():
        try:
            found.append(_loop(name))
        except (OSError, SysfsError):  # detached meanwhile
            continue
    return found


def backing_file(disk: str) -> str:
    """Of a loop device; SysfsError when nothing is attached."""
    path = Path("/sys/block") / disk / "loop/backing_file"
    try:
        return text_of(path).removesuffix("\n")
    except OSError as e:
        raise SysfsError.of(f"cannot read {path}", e) from e


def _loop(name: str) -> Loop:
    folder = Path("/sys/block") / name
    device = find(parse_dev(attribute(folder / "dev")))
    backing = backing_file(name)
    offset = number(folder / "loop/offset")
    try:
        fd = open_device(f"/dev/{name}", device.dev)
        try:
            status = kernel.loop_status(fd, name)
        finally:
            os.close(fd)
        return Loop(device, (status.device, status.inode), status.rdevice, offset, backing)
    except OSError:  # not for this user, or no such node here: go by the name
        st = os.stat(backing)
        dev = os.major(st.st_dev), os.minor(st.st_dev)
        return Loop(device, (dev, st.st_ino), device_number(backing), offset, backing)


def loops_on(st: os.stat_result) -> list[Loop]:
    """The loop devices that this regular file is attached to."""
    file = (os.major(st.st_dev), os.minor(st.st_dev)), st.st_ino
    return [loop for loop in loops() if loop.file == file]


def loop_device_of(path: str) -> list[str]:
    """Loop devices (/dev/loopN) that this image file is attached to."""
    return [loop.path for loop in loops_on(os.stat(path))]
