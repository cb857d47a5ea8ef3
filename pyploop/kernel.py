# SPDX-License-Identifier: Apache-2.0
"""Named system calls and ioctls, over the cffi module that the compiler filled.

Each raises OSError(errno, text, path); nothing here decides anything.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from pyploop import _kernel

_ffi, _lib = _kernel.ffi, _kernel.lib

FITHAW: int = _lib.FITHAW


def _check(ret: int, path: str | None = None) -> int:
    if ret < 0:
        raise OSError(-ret, os.strerror(-ret), path)
    return ret


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


def write_back(fd: int, path: str) -> None:
    """Write back all that is dirty in the page cache of the block device `fd`,
    and wait until it has landed; no flush of the disk's own cache."""
    _check(_lib.pk_write_back(fd), path)


def device_size(fd: int, path: str) -> int:
    """Bytes of a block device."""
    value = _ffi.new("uint64_t *")
    _check(_lib.pk_ioctl_u64(fd, _lib.BLKGETSIZE64, value), path)
    return int(value[0])


def logical_block_size(fd: int, path: str) -> int:
    """Alignment of O_DIRECT on a block device, in bytes."""
    value = _ffi.new("int *")
    _check(_lib.pk_ioctl_int(fd, _lib.BLKSSZGET, value), path)
    return int(value[0])


class LoopStatus(NamedTuple):
    """What LOOP_GET_STATUS64 tells: the backing file's device (major, minor)
    and inode, and the part of it that the loop device shows, in bytes."""

    device: tuple[int, int]
    inode: int
    offset: int
    sizelimit: int
    direct_io: bool


def loop_status(fd: int, path: str) -> LoopStatus:
    """ENXIO: nothing is attached.  ENOTTY: not a loop device."""
    info = _ffi.new("struct loop_info64 *")
    _check(_lib.pk_loop_status(fd, info), path)
    # huge_encode_dev() of the kernel: major in bits 8..19, minor in 0..7 and 20..
    dev = int(info.lo_device)
    major, minor = (dev >> 8) & 0xFFF, (dev & 0xFF) | ((dev >> 12) & 0xFFFFF00)
    return LoopStatus(
        (major, minor),
        int(info.lo_inode),
        int(info.lo_offset),
        int(info.lo_sizelimit),
        bool(info.lo_flags & _lib.LO_FLAGS_DIRECT_IO),
    )


def set_pipe_size(fd: int, size: int) -> int:
    """Enlarge a pipe's buffer; returns what it is now, in bytes."""
    return _check(_lib.pk_set_pipe_size(fd, size))


def rename_noreplace(dir_fd: int, old: str, new: str) -> None:
    """Rename within a folder; EEXIST when `new` is there."""
    _check(_lib.pk_rename_noreplace(dir_fd, os.fsencode(old), os.fsencode(new)), new)
