# SPDX-License-Identifier: Apache-2.0
"""One mounted file system of the source: opened, closed so that it can be unmounted,
and found again by its device, wherever it is mounted then."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from pyploop.errors import LoopError, OpenError
from pyploop.system import mount_table, sysblock
from pyploop.system.claims import is_claimed
from pyploop.system.mount_table import Mount
from pyploop.undo.journal import Entry
from pyploop.undo.ledger import UndoStep

FREEZABLE = ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "nilfs2", "xfs")
"""File systems known to support a freeze.  Any other is tried before the copy."""
HALF = 0xFFFFFFFF
"""The half of a btrfs's f_fsid that all its subvolumes share."""
UNMOUNT_DEADLINE = 1.0
"""Seconds that a device may still be in use after its file system was unmounted."""


class Mounted:
    """One file system.  fd: an open file or folder on it, -1 while there is none."""

    def __init__(self, mount: Mount) -> None:
        """OpenError when it cannot be opened at its mount point."""
        self.mount = mount
        self._at = mount.point
        self.fd = _open(mount)
        st = os.fstat(self.fd)
        self.dev = os.major(st.st_dev), os.minor(st.st_dev)
        self.fsid = os.fstatvfs(self.fd).f_fsid
        self.can_freeze = True
        self.gone = False
        """It is not mounted any more, and its device is not in use."""
        self.by_others = False
        """Another process has frozen it."""
        self.prepared: UndoStep | None = None
        """Its undo step, once the journal has it."""
        self.thaw_step: UndoStep | None = None
        """The same step, while this process has frozen it."""

    @property
    def point(self) -> str:
        """Where it was opened."""
        return self._at

    @property
    def entry(self) -> Entry:
        point = os.path.abspath(self.point)
        return {
            "kind": "thaw",
            "mount": point,
            "dev": f"{self.dev[0]}:{self.dev[1]}",
            "fsid": self.fsid,
            "what": f"thaw {point}",
            "by_hand": f"fsfreeze -u {point}",
        }

    @property
    def device(self) -> tuple[int, int] | None:
        """The block device that it is on (major, minor); None: not known."""
        if self.dev[0]:
            return self.dev
        # The number of a btrfs is not that of a device.
        return _number(self.mount.source)

    @property
    def fstype(self) -> str:
        """As in mountinfo; '' when it is not known."""
        if self.mount.fstype != "?":
            return self.mount.fstype
        found = mount_table.of_device(self.dev)
        return found.fstype if found else ""

    def read_only(self) -> bool:
        """The file system, not only this mount of it."""
        found = mount_table.of_device(self.dev)
        return found is not None and found.read_only

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def find_again(self) -> None:
        """Open it again after `close`, or set `gone`.  LoopError: it cannot be found,
        and is still in use."""
        if self.fd >= 0:
            return
        self.gone = False
        if self._reopen(self.point):
            return
        device = self.device
        dev = f"{self.dev[0]}:{self.dev[1]}"
        for point in mount_table.mount_points(dev):
            if self._reopen(point):
                return
        if device is not None and not _is_claimed(device, UNMOUNT_DEADLINE):
            self.gone = True
            return
        if device is not None and self.dev[0] == 0:
            for mount in mount_table.mounts_of([sysblock.find(device)]):
                if self._reopen(mount.point):
                    return
        if device is not None:
            found = mount_table.mounted_elsewhere([sysblock.find(device)])
            if found and self._reopen(f"/proc/{found[0]}/root{found[1].point}"):
                return
        raise LoopError(
            f"the stop command unmounted the file system of {self.point}, and it is still in use "
            "(umount -l?) or hidden under another mount: it cannot be frozen"
        )

    def _reopen(self, point: str) -> bool:
        """Open it there, if it is mounted there now."""
        try:
            fd = open_at(point)
        except OSError:
            return False
        st, fsid = os.fstat(fd), os.fstatvfs(fd).f_fsid
        dev = os.major(st.st_dev), os.minor(st.st_dev)
        # btrfs has a new number each time, and one for each subvolume; what
        # these have in common is the lower half of the ID.
        same = dev == self.dev if self.dev[0] else (fsid ^ self.fsid) & HALF == 0 != fsid & HALF
        if not same:
            os.close(fd)
            return False
        self.fd, self.dev, self.fsid, self._at = fd, dev, fsid, point
        return True

    def check_gone(self) -> None:
        """LoopError when it is in use again."""
        device = self.device
        if device is not None and _is_claimed(device, 0.0):
            raise LoopError(
                f"the stop command unmounted the file system of {self.point}, and it was mounted "
                "again during the last blocks"
            )


def _open(mount: Mount) -> int:
    try:
        fd = open_at(mount.point)
    except NotADirectoryError:
        raise OpenError(
            f"the only mount of {mount.source} is {mount.point}, which is neither a folder nor a "
            "file: name a folder on that file system with --mount (for example /proc/PID/cwd)"
        ) from None
    except OSError as e:
        raise OpenError.of(f"cannot open the mount point {mount.point}", e) from e
    if not mount.is_at(os.fstat(fd)):
        os.close(fd)
        raise OpenError(
            f"{mount.point} is hidden under another mount, so {mount.source} cannot be "
            "frozen there; use --mount with a folder where it is visible"
        )
    return fd


def open_at(point: str) -> int:
    """A descriptor of the file system at `point`.  Only a folder or a file is opened:
    to open anything else may start a device, or wake the reader of a pipe."""
    mode = os.stat(point).st_mode
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise OSError(errno.ENOTDIR, "neither a folder nor a file", point)
    return os.open(point, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _number(path: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        st = os.stat(path)
        if stat.S_ISBLK(st.st_mode):
            return os.major(st.st_rdev), os.minor(st.st_rdev)
    return None


def _is_claimed(device: tuple[int, int], wait: float) -> bool:
    """As a mounted file system claims its device."""
    return is_claimed(device, wait=wait, unknown=True)
