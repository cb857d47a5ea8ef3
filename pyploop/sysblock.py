# SPDX-License-Identifier: Apache-2.0
"""What sysfs and mountinfo tell about a block device.

Paths below are relative to a root that tests can replace; `/` otherwise.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from pyploop.errors import SysfsError
from pyploop.units import SECTOR


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
        """This folder lies on the file system, not on another that hides it."""
        here = os.major(st.st_dev), os.minor(st.st_dev)
        return stat.S_ISDIR(st.st_mode) and self.dev in (None, here)

    def is_visible(self) -> bool:
        try:
            return self.is_at(os.stat(self.point))
        except OSError:
            return False


def attribute(path: Path) -> str:
    """The text of a sysfs attribute; SysfsError when it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError as e:
        raise SysfsError.of(f"cannot read {path}", e) from e


def number(path: Path) -> int:
    """A sysfs attribute that is one number; SysfsError when it is not."""
    text = attribute(path)
    try:
        return int(text)
    except ValueError:
        raise SysfsError(f"{path} holds {text[:40]!r}, not a number") from None


def _parse_dev(text: str) -> tuple[int, int]:
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
    return BlockDevice(node.name, dev, disk.name, _parse_dev(attribute(disk / "dev")), start, size)


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
                visit(find(_parse_dev(attribute(part.parent / "dev"))))
        holders = node / "holders"
        if holders.is_dir():
            for holder in sorted(holders.iterdir()):
                visit(find(_parse_dev(attribute(holder / "dev"))))

    visit(dev)
    return list(found.values())


def unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash in octal."""
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)


def mounts_of(devices: list[BlockDevice], mountinfo: Path) -> list[Mount]:
    """Mounted file systems of these devices, one mount point for each."""
    wanted = {d.dev for d in devices}
    result: dict[tuple[int, int], Mount] = {}
    # Bytes: a name may hold anything but what the kernel escapes, also what
    # str.split and str.splitlines take for a space or the end of a line.
    for line in os.fsdecode(mountinfo.read_bytes()).split("\n"):
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(rest) < 2:
            continue
        dev = _parse_dev(fields[2])
        source = unescape(rest[1])
        if dev not in wanted:
            # btrfs shows an anonymous number of its own: go by the source.
            if rest[0] != "btrfs":
                continue
            try:
                rdev = os.stat(source).st_rdev
            except OSError:
                continue
            dev = os.major(rdev), os.minor(rdev)
            if dev not in wanted:
                continue
        point = unescape(fields[4])
        # A file system mounted twice is frozen once; a later mount may hide
        # an earlier point, so the first that can still be opened as it is.
        mount = Mount(point, rest[0], source, None if rest[0] == "btrfs" else dev)
        if dev not in result or (mount.is_visible() and not result[dev].is_visible()):
            result[dev] = mount
    return list(result.values())


def mount_points(dev: str) -> list[str]:
    """Where the file system with this device number ('8:1') is mounted here."""
    found = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n"):
        fields = line.split(" ")
        if len(fields) > 4 and fields[2] == dev:
            found.append(unescape(fields[4]))
    return found


def mount_points_below(folder: str) -> list[str]:
    """Everything that is mounted below this folder, the innermost first."""
    found = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n"):
        fields = line.split(" ")
        if len(fields) > 4 and unescape(fields[4]).startswith(folder.rstrip("/") + "/"):
            found.append(unescape(fields[4]))
    return found[::-1]


def cgroup_mounts() -> list[tuple[str, list[str] | None]]:
    """Mounted cgroup hierarchies: (folder, controllers), None for v2."""
    found: list[tuple[str, list[str] | None]] = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n"):
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if rest[0] == "cgroup2":
            found.append((unescape(fields[4]), None))
        elif rest[0] == "cgroup" and len(rest) > 2:
            found.append((unescape(fields[4]), rest[2].split(",")))
    return found


def mounted_elsewhere(devices: list[BlockDevice]) -> tuple[int, Mount] | None:
    """A process that sees one of the devices mounted in its own mount
    namespace, and that mount; None when no process does."""
    seen = {str(Path("/proc/self/ns/mnt").readlink())}
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            namespace = str((proc / "ns/mnt").readlink())
            if namespace in seen:
                continue
            seen.add(namespace)
            mounts = mounts_of(devices, proc / "mountinfo")
        except OSError:
            continue
        if mounts:
            return int(proc.name), mounts[0]
    return None


def loop_device_of(path: str) -> list[str]:
    """Loop devices (/dev/loopN) that this image file is attached to."""
    st = os.stat(path)
    found = []
    for attr in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        try:
            backing = os.stat(attr.read_text().rstrip("\n"))
        except OSError:
            continue
        if (backing.st_dev, backing.st_ino) == (st.st_dev, st.st_ino):
            found.append(f"/dev/{attr.parent.parent.name}")
    return found
