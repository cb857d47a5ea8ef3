# SPDX-License-Identifier: Apache-2.0
"""ext4's multiple mount protection (MMP): the kernel that has the file system mounted writes a
number into it every few seconds, and the one that mounts it looks whether the number changes.
A copy of a mounted one has a number that does not change, so its mount waits for that, unless
the number says that nobody has it mounted (`clear`).  The layouts are those of fs/ext4/ext4.h.
"""

from __future__ import annotations

import os
import struct

_SUPERBLOCK = 1024
_LOG_BLOCK_SIZE, _MAGIC, _INCOMPAT, _RO_COMPAT, _UUID = 0x18, 0x38, 0x60, 0x64, 0x68
_INTERVAL, _BLOCK, _SEED = 0x166, 0x168, 0x270
"""Offsets in struct ext4_super_block: s_log_block_size, s_magic, s_feature_incompat,
s_feature_ro_compat, s_uuid; s_mmp_update_interval, s_mmp_block, s_checksum_seed."""
_EXT, _MMP, _HAS_SEED = 0xEF53, 0x0100, 0x2000  # EXT4_FEATURE_INCOMPAT_MMP, …_CSUM_SEED
_METADATA_CSUM = 0x0400  # EXT4_FEATURE_RO_COMPAT_METADATA_CSUM
_MMP_MAGIC, _CLEAN = 0x004D4D50, 0xFF4D4D50  # EXT4_MMP_MAGIC, EXT4_MMP_SEQ_CLEAN
_CHECKSUM = 1020
"""struct mmp_struct: mmp_magic and mmp_seq come first, mmp_checksum last."""
_LARGEST_BLOCK = 64 << 10
_LEAST, _MOST = 5, 300  # EXT4_MMP_MIN_CHECK_INTERVAL, EXT4_MMP_MAX_CHECK_INTERVAL
_TIMES = 2  # EXT4_MMP_CHECK_MULT


def _super_block(fd: int) -> bytes:
    """Of an ext4 with MMP; empty: it is something else."""
    block = os.pread(fd, 1024, _SUPERBLOCK)
    if len(block) < 1024 or struct.unpack_from("<H", block, _MAGIC)[0] != _EXT:
        return b""
    return block if struct.unpack_from("<I", block, _INCOMPAT)[0] & _MMP else b""


def seconds(path: str) -> int:
    """How long the kernel waits before it mounts a copy of this file system; 0: it has no
    MMP, or is no ext4.  path: the device or the image.  OSError."""
    with open(path, "rb") as f:
        block = _super_block(f.fileno())
    if not block:
        return 0
    interval = int(struct.unpack_from("<H", block, _INTERVAL)[0])
    # fs/ext4/mmp.c: it waits twice, each time min(2 * interval + 1, interval + 60), where the
    # interval is that of the writer's last check, twice the one between two writes.
    check = min(max(interval * _TIMES, _LEAST), _MOST)
    return 2 * min(2 * check + 1, check + 60)


def clear(fd: int) -> None:
    """Note in the image that nobody has the file system mounted, as a kernel does that unmounts
    it.  Nothing happens unless it is an ext4 with MMP.  It must be a copy, which nobody but the
    caller knows: this is what MMP protects from.  fd: open for reading and writing.  OSError.

    `tune2fs -f -E clear_mmp` does the same.  But it reads much more of an image that may be
    hostile, and refuses features that are newer than itself, while the container is suspended.
    """
    block = _super_block(fd)
    if not block:
        return
    size = 1024 << min(struct.unpack_from("<I", block, _LOG_BLOCK_SIZE)[0], 32)
    (number,) = struct.unpack_from("<Q", block, _BLOCK)
    at = number * size
    if size > _LARGEST_BLOCK or not _SUPERBLOCK < at < 1 << 62:
        return  # the mount says what is wrong
    found = bytearray(os.pread(fd, 1024, at))
    if len(found) < 1024 or struct.unpack_from("<I", found)[0] != _MMP_MAGIC:
        return
    struct.pack_into("<I", found, 4, _CLEAN)
    if struct.unpack_from("<I", block, _RO_COMPAT)[0] & _METADATA_CSUM:
        if struct.unpack_from("<I", block, _INCOMPAT)[0] & _HAS_SEED:
            (seed,) = struct.unpack_from("<I", block, _SEED)
        else:
            seed = _crc32c(0xFFFFFFFF, block[_UUID : _UUID + 16])
        struct.pack_into("<I", found, _CHECKSUM, _crc32c(seed, found[:_CHECKSUM]))
    os.pwrite(fd, found, at)


def _crc32c(crc: int, data: bytes | bytearray) -> int:
    """As ext4 computes it: neither the first nor the last value is inverted."""
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc
