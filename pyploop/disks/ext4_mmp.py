# SPDX-License-Identifier: Apache-2.0
"""ext4's multiple mount protection (MMP): the kernel that has the file system mounted writes a
number into it every few seconds, and the one that mounts it looks whether the number changes.
A copy of a mounted one has a number that does not change, so its mount waits for that.
"""

from __future__ import annotations

import os
import struct

_SUPERBLOCK = 1024
_MAGIC, _INCOMPAT, _INTERVAL = 0x38, 0x60, 0x166
"""Offsets in struct ext4_super_block: s_magic, s_feature_incompat, s_mmp_update_interval."""
_EXT, _MMP = 0xEF53, 0x0100  # EXT4_FEATURE_INCOMPAT_MMP
_LEAST, _MOST = 5, 300  # EXT4_MMP_MIN_CHECK_INTERVAL, EXT4_MMP_MAX_CHECK_INTERVAL
_TIMES = 2  # EXT4_MMP_CHECK_MULT


def seconds(path: str) -> int:
    """How long the kernel waits before it mounts a copy of this file system; 0: it has no
    MMP, or is no ext4.  path: the device or the image.  OSError."""
    with open(path, "rb") as f:
        block = os.pread(f.fileno(), 1024, _SUPERBLOCK)
    if len(block) < 1024 or struct.unpack_from("<H", block, _MAGIC)[0] != _EXT:
        return 0
    if not struct.unpack_from("<I", block, _INCOMPAT)[0] & _MMP:
        return 0
    interval = int(struct.unpack_from("<H", block, _INTERVAL)[0])
    # fs/ext4/mmp.c: it waits twice, each time min(2 * interval + 1, interval + 60), where the
    # interval is that of the writer's last check, twice the one between two writes.
    check = min(max(interval * _TIMES, _LEAST), _MOST)
    return 2 * min(2 * check + 1, check + 60)
