# SPDX-License-Identifier: Apache-2.0
"""What lies below a file or a device: file systems, loop devices, mapped devices (dm, md)
and disks.

A target on its own source would grow for ever, or block when the source is frozen.  A
target on a file system that the source is stored on takes room that the source needs to
grow.  Both are found by going down from the source and from the target.
(`usage.related_devices` also goes up, to the devices on top of the source.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pyploop.disks.source import Source
from pyploop.errors import SysfsError
from pyploop.system import kernel, mount_table, sysblock
from pyploop.system.mount_table import Entry
from pyploop.system.sysblock import BlockDevice, dev_numbers
from pyploop.units import SECTOR

Number = tuple[int, int]
"""Major and minor of a device, or of a file system without one."""
Thing = tuple[int, int, int]
"""Major, minor and inode of a file; inode 0: the device or file system itself."""

NAMES_ITS_STORE = re.compile(r"fuse(\..*)?|ecryptfs")
"""Types of file systems whose source can be the folder or image that they store in."""
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
LOOKS = 10
"""How often the sizes of two file systems are compared while they change."""


@dataclass(frozen=True)
class FileSystem:
    """A file system that is written when the file above is."""

    number: Number
    fstype: str
    name: str
    """Its mount point, for messages."""
    path: str
    """A path on it, for statvfs."""
    growth: int | None
    """How many bytes the file above can grow here at most; None: no limit."""


@dataclass
class Below:
    """All that lies below a file or device."""

    things: set[Thing] = field(default_factory=set)
    file_systems: list[FileSystem] = field(default_factory=list)
    """From the top down."""
    unknown: list[str] = field(default_factory=list)
    """Where the way down could not be followed, as texts."""


def of_file(fd: int) -> Below:
    """All below an open file, folder or block device, and that itself."""
    walk = _Walk()
    st = os.fstat(fd)
    if stat.S_ISBLK(st.st_mode):
        walk.device(dev_numbers(st.st_rdev), None)
    else:
        walk.file(fd, f"/proc/self/fd/{fd}", None)
    return walk.found


def of_source(source: Source) -> Below:
    """All below a source."""
    return _below_source(source, _Walk())


def _below_source(source: Source, walk: _Walk) -> Below:
    if source.block is not None:
        walk.device(source.block.dev, None)
    for fd in {source.fd, source.fd if source.sparse_fd is None else source.sparse_fd}:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            walk.file(fd, f"/proc/self/fd/{fd}", None)
    return walk.found


def apart_from(source: Source, points: Iterable[str]) -> set[Thing]:
    """What must not lie below a target: the source, the devices stacked on it, the files
    that it is stored in, and the file systems that will be frozen.  points: their mount
    points."""
    found = _below_source(source, _Walk(to_files=True))
    things = {thing for thing in found.things if thing[2]}
    if source.block is not None:
        things |= {(*device.dev, 0) for device in sysblock.stacked_on(source.block)}
    for point in points:
        with contextlib.suppress(OSError), _opened(point) as fd:
            things.add((*_Walk().number_of(fd), 0))
    return things


def is_below(source: Source, fd: int) -> bool:
    """The source is stored in this open file, at any depth, or both show the same file."""
    things = of_source(source).things
    for own in {source.fd, source.fd if source.sparse_fd is None else source.sparse_fd}:
        things |= _shown(own)
    return bool(things & _shown(fd))


def _shown(fd: int) -> set[Thing]:
    """An open file, and the file that it shows: in an overlay the one in the upper folder, in
    a bindfs the one in its source folder."""
    st, walk = os.fstat(fd), _Walk()
    if stat.S_ISBLK(st.st_mode):
        return {(*dev_numbers(st.st_rdev), 0)}
    found = {(*dev_numbers(st.st_dev), st.st_ino)}
    if stat.S_ISREG(st.st_mode) and (mount := walk.mount_of(fd)) is not None:
        within = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), mount.point)
        for store in _stores(mount):
            with contextlib.suppress(OSError), _opened(os.path.join(store, within)) as other:
                found |= _shown(other)
    return found


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


class _Walk:
    """One walk down.  Each thing is visited once."""

    def __init__(self, *, to_files: bool = False) -> None:
        """to_files: stop at the first files, and do not follow their file systems."""
        self.found = Below()
        self._further = not to_files
        self._mounts = {entry.number: entry for entry in mount_table.read()}
        self._devices: set[Number] = set()

    def mount_of(self, fd: int) -> Entry | None:
        """The mount of an open file, by its number: on btrfs st_dev is the subvolume's."""
        number = mount_table.number_of_file(fd)
        return None if number is None else self._mounts.get(number)

    def number_of(self, fd: int) -> Number:
        """The number of the file system that the file is on."""
        mount = self.mount_of(fd)
        return dev_numbers(os.fstat(fd).st_dev) if mount is None else mount.dev

    def file(self, fd: int, path: str, growth: int | None) -> None:
        """An open file (or folder) at this path."""
        st = os.fstat(fd)
        mount = self.mount_of(fd)
        number = dev_numbers(st.st_dev)
        self.found.things |= {(*number, 0), (*number, st.st_ino)}
        if self._further:
            self._file_system(mount, number, path, growth)

    def _file_system(
        self, mount: Entry | None, number: Number, path: str, growth: int | None
    ) -> None:
        """number: used when the mount is not visible here."""
        if mount is None:
            fs = FileSystem(number, "", path, path, growth)
        else:
            fs = FileSystem(mount.dev, mount.fstype, mount.point, path, growth)
        if fs.number in (known.number for known in self.found.file_systems):
            return
        self.found.things.add((*fs.number, 0))
        self.found.file_systems.append(fs)
        if mount is None:
            self.device(fs.number, fs.growth)
        elif mount.fstype == "btrfs":
            for member in sorted(mount.devices()):
                self.device(member, fs.growth)
        elif _exists(fs.number):
            self.device(fs.number, fs.growth)
        elif mount.fstype not in IN_MEMORY:
            followed = [self._folder(store, fs.growth) for store in _stores(mount)]
            if not any(followed):
                self._by_figures(fs, mount)

    def _folder(self, path: str, growth: int | None) -> bool:
        """Follow the folder, image or device that a file system stores in; false when it
        cannot be opened."""
        with contextlib.suppress(OSError), _opened(path) as fd:
            st = os.fstat(fd)
            if stat.S_ISBLK(st.st_mode):
                self.device(dev_numbers(st.st_rdev), growth)
            else:
                self.file(fd, path, growth)
            return True
        return False

    def _by_figures(self, fs: FileSystem, mount: Entry) -> None:
        """Find the file system that this one shows (an overlay, FUSE, or a network mount of
        this machine): size and free space of both are the same to the byte."""
        for other in self._mounts.values():
            if _exists(other.dev) or other.fstype == "btrfs":
                with contextlib.suppress(OSError):
                    if _same_figures(fs.path, other.point):
                        self._file_system(other, other.dev, other.point, fs.growth)
                        return
        self.found.unknown.append(f"{mount.point} ({mount.fstype} of {mount.source})")

    def device(self, number: Number, growth: int | None) -> None:
        """A block device; does nothing when there is none with this number."""
        if number in self._devices or not _exists(number):
            return
        self._devices.add(number)
        self.found.things.add((*number, 0))
        try:
            device = sysblock.find(number)
            lower = [slave.dev for slave in sysblock.related(device, "slaves")]
            if device.is_partition:
                lower.insert(0, device.disk_dev)
            file = sysblock.node(number) / "loop/backing_file"
            is_loop = file.exists()
            name = sysblock.text_of(file).removesuffix("\n") if is_loop else ""
        except SysfsError as e:  # removed meanwhile
            raise OSError(errno.ENODEV, str(e)) from e
        for dev in lower:
            self.device(dev, growth)
        if is_loop:
            self._loop(device, name, growth)

    def _loop(self, device: BlockDevice, name: str, growth: int | None) -> None:
        """A loop device, and the name of its backing file."""
        try:
            fd = os.open(device.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                status = kernel.loop_status(fd, device.path)
            finally:
                os.close(fd)
            number, inode = status.device, status.inode
        except OSError:  # detached, or this user may not open it
            number, inode = None, 0
        with contextlib.suppress(OSError), _opened(name) as fd:
            st = os.fstat(fd)
            if number in (None, dev_numbers(st.st_dev)) and inode in (0, st.st_ino):
                if stat.S_ISBLK(st.st_mode):
                    self.device(dev_numbers(st.st_rdev), growth)
                else:
                    hole = max(st.st_size - st.st_blocks * SECTOR, 0)
                    self.file(fd, name, hole if growth is None else min(hole, growth))
                return
        if number is None:
            self.found.unknown.append(f"{device.path} (of {name})")
            return
        # The file is deleted, hidden, or in another mount namespace.
        self.found.things |= {(*number, 0), (*number, inode)}
        if not self._further:
            return
        for mount in self._mounts.values():
            if mount.dev == number:
                self._file_system(mount, number, mount.point, growth)
                return
        self.device(number, growth)


def _stores(mount: Entry) -> list[str]:
    if mount.fstype == "overlay":
        return [mount.upper_folder() or ""]
    if not NAMES_ITS_STORE.fullmatch(mount.fstype):
        return []
    parts = [mount.source] if os.path.exists(mount.source) else mount.source.split(":")
    return parts if all(os.path.isabs(part) for part in parts) else []  # HOST:/FOLDER


def _same_figures(path: str, other: str) -> bool:
    def figures(path: str) -> tuple[int, ...]:
        st = os.statvfs(path)
        return st.f_blocks * st.f_frsize, st.f_bfree * st.f_frsize, st.f_files, st.f_ffree

    for _ in range(LOOKS):
        before, there, after = figures(path), figures(other), figures(path)
        if before == after or before[0] != there[0]:
            return before == there and there[0] > 0
    return False


def _exists(number: Number) -> bool:
    return sysblock.node(number).exists()


def boot() -> bytes:
    """The kernel's boot_id, 16 bytes; zeroes when it is not known."""
    try:
        return bytes.fromhex(kernel.boot_id().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def in_words(things: Iterable[Thing]) -> str:
    """A name for messages: a mount point, else a device, else "a file"."""
    numbers = sorted({(major, minor) for major, minor, inode in things if not inode})
    for mount in mount_table.read():
        if mount.dev in numbers:
            return mount.point
    if not numbers:
        return "a file"
    name = os.path.basename(os.path.realpath(sysblock.node(numbers[0])))
    return "/dev/" + name.replace("!", "/")
