# SPDX-License-Identifier: Apache-2.0
"""Block devices as sysfs shows them: disks, partitions, what is stacked on what, loop
devices.  What is mounted from them is in `mount_table`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    def path(self) -> str:
        """Its usual device node."""
        return "/dev/" + self.name.replace("!", "/")

    @property
    def stat_path(self) -> Path:
        """Accounting of the whole disk."""
        return Path("/sys/block") / self.disk / "stat"


def text_of(path: Path) -> str:
    """The contents of a file in /proc or /sys.  Names in it may be any bytes, not only UTF-8."""
    return os.fsdecode(path.read_bytes())


def contents(path: str) -> bytes:
    """The contents of a file in /proc or /sys; empty when it cannot be read, as that of a
    process that has ended."""
    try:
        with open(path, "rb", buffering=0) as f:
            return f.readall()
    except OSError:
        return b""


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
        raise SysfsError(f"{path} contains {text[:40]!r}, not a number") from None


def parse_dev(text: str) -> tuple[int, int]:
    """The numbers in `8:1`."""
    major, _, minor = text.partition(":")
    return int(major), int(minor)


def dev_numbers(dev: int) -> tuple[int, int]:
    """Major and minor of what stat(2) has as st_dev or st_rdev."""
    return os.major(dev), os.minor(dev)


def file_id(st: os.stat_result) -> tuple[tuple[int, int], int]:
    """Device number and inode of a file."""
    return dev_numbers(st.st_dev), st.st_ino


def find(dev: tuple[int, int]) -> BlockDevice:
    """The device with this number."""
    try:
        folder = node(dev).resolve(strict=True)
    except OSError as e:
        raise SysfsError.of(f"cannot find block device {dev[0]}:{dev[1]} in sysfs", e) from e
    size = number(folder / "size") * SECTOR
    if not (folder / "partition").exists():
        return BlockDevice(folder.name, dev, folder.name, dev, 0, size)
    disk = folder.parent
    start = number(folder / "start") * SECTOR
    return BlockDevice(folder.name, dev, disk.name, parse_dev(attribute(disk / "dev")), start, size)


def is_bio_based(disk: str) -> bool:
    """No blk-mq: requests never exist, only bios (zram, brd, dm, md)."""
    return not (Path("/sys/block") / disk / "mq").is_dir()


def node(dev: tuple[int, int]) -> Path:
    """The folder of this device in sysfs; a link, and missing when there is no such device."""
    return Path(f"/sys/dev/block/{dev[0]}:{dev[1]}")


def partitions(disk: BlockDevice) -> Iterator[BlockDevice]:
    """The partitions of a whole disk."""
    for part in sorted((Path("/sys/block") / disk.name).glob("*/partition")):
        yield find(parse_dev(attribute(part.parent / "dev")))


def related(device: BlockDevice, kind: Literal["holders", "slaves"]) -> Iterator[BlockDevice]:
    """The devices that dm or md have put on this one, or that this one lies on."""
    folder = node(device.dev) / kind
    if folder.is_dir():
        for other in sorted(folder.iterdir()):
            yield find(parse_dev(attribute(other / "dev")))


def stacked_on(dev: BlockDevice) -> list[BlockDevice]:
    """The device itself, its partitions, and all that dm or md stack on them."""
    found: dict[tuple[int, int], BlockDevice] = {}

    def visit(d: BlockDevice) -> None:
        if d.dev in found:
            return
        found[d.dev] = d
        if not d.is_partition:
            for part in partitions(d):
                visit(part)
        for holder in related(d, "holders"):
            visit(holder)

    visit(dev)
    return list(found.values())


def device_number(path: str) -> tuple[int, int] | None:
    """The device number of this block device; None when there is no such device here."""
    try:
        st = os.stat(path)
    except OSError:
        return None
    return dev_numbers(st.st_rdev) if stat.S_ISBLK(st.st_mode) else None


def open_device(path: str, dev: tuple[int, int], flags: int = 0) -> int:
    """Open the block device with this number, read-only; `path` is its usual name.  In a
    chroot or container that name may be missing or belong to another device.  Then a node
    is made, and removed at once."""
    flags |= os.O_RDONLY | os.O_CLOEXEC
    if device_number(path) == dev:
        return os.open(path, flags)
    for folder in ("/dev", "/tmp"):
        made = f"{folder}/.pyploop-{os.getpid()}-{threading.get_ident()}"
        try:
            os.mknod(made, stat.S_IFBLK | 0o600, os.makedev(*dev))
        except OSError:
            continue
        try:
            return os.open(made, flags)
        except PermissionError:  # mounted nodev
            continue
        finally:
            os.unlink(made)
    raise OSError(errno.ENOENT, "there is no device node for it, and none can be made", path)


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


def has_capability(number: int) -> bool:
    """This process has the capability; true also when that cannot be found out."""
    try:
        status = text_of(Path("/proc/self/status"))
    except OSError:
        return True
    found = re.search(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)
    return found is None or bool(int(found[1], 16) >> number & 1)


def names(folder: str) -> list[str]:
    """The names in a folder of /proc or /sys; none when it is missing or cannot be read."""
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
    """The path of the backing file when it was attached; ends in ` (deleted)` if it was."""

    @property
    def path(self) -> str:
        return self.device.path


def loop_names() -> list[str]:
    """The loop devices that something is attached to."""
    return [
        name
        for name in names("/sys/block")
        if name.startswith("loop") and os.access(f"/sys/block/{name}/loop", os.F_OK)
    ]


def loops() -> list[Loop]:
    """All attached loop devices.  The inode of the file comes from the kernel: its name may
    belong to another file by now, or to another mount namespace."""
    found = []
    for name in loop_names():
        try:
            found.append(_loop(name))
        except (OSError, SysfsError):  # detached meanwhile
            continue
    return found


def backing_file(disk: str) -> str:
    """The path of a loop device's backing file; SysfsError when nothing is attached."""
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
    except OSError:  # this user may not open it, or has no node for it: use the name
        st = os.stat(backing)
        return Loop(device, file_id(st), device_number(backing), offset, backing)


def loops_on(st: os.stat_result) -> list[Loop]:
    """The loop devices that this regular file is attached to."""
    return [loop for loop in loops() if loop.file == file_id(st)]


def loop_device_of(path: str) -> list[str]:
    """Loop devices (/dev/loopN) that this image file is attached to."""
    return [loop.path for loop in loops_on(os.stat(path))]
