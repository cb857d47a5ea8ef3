# SPDX-License-Identifier: Apache-2.0
"""Named system calls and ioctls, over the cffi module that the compiler filled.

Each raises OSError(errno, text, path); nothing here decides anything.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from pyploop import _kernel

_ffi, _lib = _kernel.ffi, _kernel.lib

FITHAW: int = _lib.FITHAW


def _check(ret: int, path: str | None = None) -> int:
    if ret < 0:
        raise OSError(-ret, os.strerror(-ret), path)
    return ret


def boot_id() -> str:
    """A UUID: different on each machine and after each boot."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        return f.read().strip()


def fifreeze(fd: int, path: str) -> None:
    """Freeze the file system that `fd` (its mount point `path`) is on; returns
    once no write is in flight.  EBUSY: it is frozen already."""
    _check(_lib.pk_ioctl0(fd, _lib.FIFREEZE), path)


def fithaw(fd: int, path: str) -> None:
    """Thaw; EINVAL: it is not frozen."""
    _check(_lib.pk_ioctl0(fd, _lib.FITHAW), path)


def syncfs(fd: int, path: str) -> None:
    """Write back all that is dirty in the file system of `fd`."""
    _check(_lib.pk_syncfs(fd), path)


def is_tmpfs(fd: int, path: str) -> bool:
    """Whether the file `fd` is on tmpfs."""
    return bool(_check(_lib.pk_is_tmpfs(fd), path))


def direct_alignment(fd: int, path: str) -> tuple[int, int] | None:
    """What O_DIRECT wants of positions and lengths, and of memory, in bytes; (0, 0): this
    file cannot be written so.  None: not known (Linux before 6.1, and some file systems)."""
    block, memory = _ffi.new("uint32_t *"), _ffi.new("uint32_t *")
    known = _check(_lib.pk_direct_alignment(fd, block, memory), path)
    return (int(block[0]), int(memory[0])) if known else None


def write_back(fd: int, path: str) -> None:
    """Write back all that is dirty in the page cache of the block device `fd`,
    and wait until it has landed; no flush of the disk's own cache."""
    _check(_lib.pk_write_back(fd), path)


def device_size(fd: int, path: str) -> int:
    """Bytes of a block device."""
    value = _ffi.new("uint64_t *")
    _check(_lib.pk_ioctl_u64(fd, _lib.BLKGETSIZE64, value), path)
    return int(value[0])


def generation(fd: int, path: str) -> int:
    """The generation of an inode, which changes when its number is used again.  0 on a file
    system that has no generations (tmpfs, overlay), or never uses a number again."""
    value = _ffi.new("int *")
    try:
        _check(_lib.pk_ioctl_int(fd, _lib.FS_IOC_GETVERSION, value), path)
    except OSError as e:
        if e.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return int(value[0])


def logical_block_size(fd: int, path: str) -> int:
    """Alignment of O_DIRECT on a block device, in bytes."""
    value = _ffi.new("int *")
    _check(_lib.pk_ioctl_int(fd, _lib.BLKSSZGET, value), path)
    return int(value[0])


def is_read_only(fd: int, path: str) -> bool:
    """Whether writes to this block device are refused: an open for writing may succeed."""
    value = _ffi.new("int *")
    _check(_lib.pk_ioctl_int(fd, _lib.BLKROGET, value), path)
    return bool(value[0])


class LoopStatus(NamedTuple):
    """The result of LOOP_GET_STATUS64: device (major, minor) and inode of the backing file,
    and the part of it that the loop device shows, in bytes."""

    device: tuple[int, int]
    inode: int
    offset: int
    sizelimit: int
    direct_io: bool
    rdevice: tuple[int, int] | None = None
    """The device number of the backing file when that is a block device."""


def loop_status(fd: int, path: str) -> LoopStatus:
    """ENXIO: nothing is attached.  ENOTTY: not a loop device."""
    info = _ffi.new("struct loop_info64 *")
    _check(_lib.pk_loop_status(fd, info), path)
    return LoopStatus(
        _decode_dev(int(info.lo_device)),
        int(info.lo_inode),
        int(info.lo_offset),
        int(info.lo_sizelimit),
        bool(info.lo_flags & _lib.LO_FLAGS_DIRECT_IO),
        _decode_dev(int(info.lo_rdevice)) if info.lo_rdevice else None,
    )


def _decode_dev(dev: int) -> tuple[int, int]:
    """huge_encode_dev() of the kernel: major in bits 8..19, minor in 0..7 and 20.."""
    return (dev >> 8) & 0xFFF, (dev & 0xFF) | ((dev >> 12) & 0xFFFFF00)


def watch_writes(path: str) -> int:
    """A descriptor (inotify, non-blocking) that has events after each write to the file."""
    return _check(_lib.pk_watch_writes(os.fsencode(path)), path)


def set_pipe_size(fd: int, size: int) -> int:
    """Enlarge a pipe's buffer; returns what it is now, in bytes."""
    return _check(_lib.pk_set_pipe_size(fd, size))


def rename_noreplace(dir_fd: int, old: str, new: str) -> None:
    """Rename within a folder; EEXIST when `new` is there."""
    _check(_lib.pk_rename_noreplace(dir_fd, os.fsencode(old), os.fsencode(new)), new)


def clone(fd: int, source: int, path: str) -> None:
    """The file `fd` becomes one with the contents of the file `source`, and shares its blocks.
    Most file systems cannot do that (EOPNOTSUPP, EXDEV, EINVAL)."""
    _check(_lib.pk_ioctl_value(fd, _lib.FICLONE, source), path)


MOUNT_FLAGS: dict[str, int] = {
    "ro": _lib.MS_RDONLY,
    "nosuid": _lib.MS_NOSUID,
    "nodev": _lib.MS_NODEV,
    "noexec": _lib.MS_NOEXEC,
    "sync": _lib.MS_SYNCHRONOUS,
    "dirsync": _lib.MS_DIRSYNC,
    "noatime": _lib.MS_NOATIME,
    "nodiratime": _lib.MS_NODIRATIME,
    "relatime": _lib.MS_RELATIME,
    "strictatime": _lib.MS_STRICTATIME,
    "lazytime": _lib.MS_LAZYTIME,
    "mand": _lib.MS_MANDLOCK,
    "iversion": _lib.MS_I_VERSION,
    "silent": _lib.MS_SILENT,
    "nosymfollow": _lib.MS_NOSYMFOLLOW,
}
"""Options of mount(8) that mount(2) takes as flags (mount_options.py)."""


def mount(source: str, point: str, fstype: str, flags: int, data: str) -> None:
    """mount(2)."""
    words = [os.fsencode(w) for w in (source, point, fstype)]
    _check(_lib.pk_mount(*words, flags, os.fsencode(data)), point)


def remount(point: str, flags: int) -> None:
    """Change the flags of this mount (nosuid, nodev, ro and so on), and nothing of its file
    system; takes microseconds."""
    flags |= _lib.MS_REMOUNT | _lib.MS_BIND
    _check(_lib.pk_mount(_ffi.NULL, os.fsencode(point), _ffi.NULL, flags, _ffi.NULL), point)


def open_beneath(dir_fd: int, path: str, flags: int) -> int:
    """openat2(2): a relative path that leads neither above the folder nor through
    any symbolic link.  ELOOP: there is one.  EXDEV: it leads above.  ENOSYS: Linux
    before 5.6."""
    resolve = _lib.RESOLVE_BENEATH | _lib.RESOLVE_NO_SYMLINKS | _lib.RESOLVE_NO_MAGICLINKS
    found = _lib.pk_openat2(dir_fd, os.fsencode(path), flags | os.O_CLOEXEC, 0, resolve)
    return _check(found, path)


def umount(point: str, *, lazy: bool = False) -> None:
    """EINVAL: nothing is mounted there.  EBUSY: it is in use."""
    _check(_lib.pk_umount(os.fsencode(point), _lib.MNT_DETACH if lazy else 0), point)


def clone_mount(path: str) -> int:
    """open_tree(2): the path on a mount of its own, which nothing is mounted on, and which goes
    with the descriptor.  ENOSYS: Linux before 5.2."""
    return _check(_lib.pk_clone_mount(os.fsencode(path)), path)


def attach_loop(file_fd: int, name: str) -> tuple[str, int]:
    """A loop device on the open file: its path and an open descriptor.  It
    detaches by itself when it is neither open nor mounted any more."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            path = f"/dev/loop{_check(_lib.pk_loop_free(control), '/dev/loop-control')}"
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            ret = _lib.pk_loop_attach(fd, file_fd, os.fsencode(name))
            if ret == 0:
                return path, fd
            os.close(fd)
            if ret != -errno.EBUSY:  # else another process was faster
                _check(ret, path)
    finally:
        os.close(control)


def detach_loop(fd: int, path: str) -> None:
    """ENXIO: nothing is attached."""
    _check(_lib.pk_loop_detach(fd), path)


def take_descriptor(pidfd: int, fd: int) -> int:
    """A duplicate, here, of another process's descriptor."""
    return _check(_lib.pk_pidfd_getfd(pidfd, fd))


def tcp_repair(fd: int) -> None:
    """Close this connection without a packet from now on (TCP_REPAIR).  EPERM: the socket
    listens; ENOPROTOOPT, EOPNOTSUPP: it is not a TCP socket."""
    _check(_lib.pk_tcp_repair(fd, 1))


def enter_network(fd: int, path: str) -> None:
    """The network namespace `fd` becomes that of the calling thread, and of no other.
    EPERM: this needs CAP_SYS_ADMIN; EINVAL: it is no network namespace."""
    _check(_lib.pk_enter_network(fd), path)


class Access(NamedTuple):
    """Another process's use of a watched file."""

    opened: bool
    wrote: bool
    """It was written, or a descriptor that could write was closed."""
    closed: bool
    """A descriptor that could write was closed."""
    pid: int
    file: tuple[tuple[int, int], int] | None
    """Its device number and inode; None: not known."""


def watch_file(fd: int, path: str, *, whole: bool = False) -> int:
    """A descriptor (fanotify) with an event for each process that opens or writes the file
    `fd`; whole: any file of its file system.
    There are no events for writes of the loop driver (from Linux 6.x on), by io_submit or
    through a mapping.  Their files are closed after writing, which is an event.
    EPERM: this needs CAP_SYS_ADMIN."""
    mask = _lib.FAN_OPEN | _lib.FAN_MODIFY | _lib.FAN_CLOSE_WRITE
    return _check(_lib.pk_watch(fd, _lib.FAN_MARK_FILESYSTEM if whole else 0, mask), path)


def read_accesses(fd: int, path: str) -> list[Access]:
    """The events since the last call; never waits.  When the kernel lost events, one of PID 0
    stands for all of them: it may be anything."""
    found: list[Access] = []
    event = _ffi.new("struct pk_access *")
    while (n := _lib.pk_read_access(fd, event)) != -errno.EAGAIN:
        if n < 0:  # the kernel could not open the event's file: the event is lost
            found.append(Access(True, True, True, 0, None))
            return found
        lost = bool(event.mask & _lib.FAN_Q_OVERFLOW)
        closed = bool(event.mask & _lib.FAN_CLOSE_WRITE) or lost
        wrote = bool(event.mask & _lib.FAN_MODIFY) or closed
        opened = bool(event.mask & _lib.FAN_OPEN) or lost
        dev = os.major(event.dev), os.minor(event.dev)
        file = (dev, int(event.inode)) if event.inode else None
        found.append(Access(opened, wrote, closed, int(event.pid), file))
    return found


def share_files(one: int, other: int) -> bool:
    """Two threads share their table of descriptors.  True also when that is not known, as
    threads hardly ever have tables of their own."""
    return int(_lib.pk_kcmp_files(one, other)) <= 0


def is_immutable(dir_fd: int, name: str) -> bool:
    """Whether a file cannot be removed: it is immutable or append-only (chattr)."""
    return bool(_check(_lib.pk_attributes(dir_fd, os.fsencode(name)), name) & _FIXED)


_FIXED = 0x10 | 0x20  # STATX_ATTR_IMMUTABLE, STATX_ATTR_APPEND of linux/stat.h


def io_priority(tid: int) -> int:
    """The I/O priority of a thread, as ioprio_get(2) has it; 0: it never set one."""
    return _check(_lib.pk_io_priority(tid))
