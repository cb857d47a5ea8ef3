# SPDX-License-Identifier: Apache-2.0
"""Images on loop devices, mounted by the system calls themselves.

Mounting takes about a millisecond this way; mount(8) takes ten.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyploop.disks import ext4_mmp
from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Disk
from pyploop.runtimes.config import within
from pyploop.system import kernel, mount_options, mount_table, sysblock
from pyploop.usage import users

KEPT = ".pyploop-kept"
"""End of the name of a resumable file (migration/target/resumable_files.py)."""
_EXT = ("ext2", "ext3", "ext4")
BUSY_DEADLINE = 5.0
"""Seconds to wait for the last user of a mount point to leave it."""


def is_mounted(point: str) -> bool:
    """Whether something is mounted on this folder."""
    return mount_table.at(point) is not None


LEFT = "remove it if it is what an earlier migration has left here (-r no), or was copied from here"
"""The cure when something is in the place of a disk or tree: the container may come back."""


def check_free(disk: Disk, size: int) -> None:
    """On the target: nothing is in the way, and there is room for `size` more
    bytes of data."""
    if os.path.lexists(disk.image):
        raise MigrateError(
            VzExitCode.EXISTS,
            f"the image {disk.image} exists on this host already: move it away",
            path=disk.image,
            hint=LEFT,
        )
    if disk.mount and is_mounted(disk.mount):
        raise MigrateError(
            VzExitCode.EXISTS,
            f"something is mounted on {disk.mount} already: unmount it",
            path=disk.mount,
        )
    folder = existing_parent(disk.image)
    with contextlib.suppress(FileNotFoundError):
        if disk.mount and any(Path(disk.mount).iterdir()):
            raise MigrateError(
                VzExitCode.EXISTS, f"the mount point {disk.mount} is not empty", path=disk.mount
            )
    st = os.statvfs(folder)
    room = st.f_bavail * st.f_frsize
    if room < size:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{folder} has room for {room >> 20} MiB, but {disk.image} needs {size >> 20} MiB more",
            path=str(folder),
        )


def existing_parent(path: str) -> Path:
    """The nearest folder above the path that exists."""
    folder = Path(path).parent
    while not folder.is_dir():
        folder = folder.parent
    return folder


def mount(
    disk: Disk, foreign: Sequence[str] = (), *, restricted: bool = False, copied: bool = False
) -> None:
    """Attach the image to a loop device and mount it on its mount point.  foreign: folders
    whose contents came from the source; the mount point must not lie in one.
    restricted: with nosuid and nodev, until `release`.
    copied: the image has just been copied from a disk that is mounted on another host."""
    options = disk.options
    if disk.fstype in _EXT and mount_options.value_of(options, "errors") is None:
        options += ",errors=remount-ro"  # its own superblock may ask for a panic
    if restricted:
        options += ",nosuid,nodev"
    words = mount_options.parse(options)
    try:
        fd = os.open(disk.image, os.O_RDWR | os.O_CLOEXEC)
        try:
            if copied:
                ext4_mmp.clear(fd)
            path, loop = kernel.attach_loop(fd, disk.image)
        finally:
            os.close(fd)
        try:
            with _opened_point(disk.mount, foreign) as point:
                kernel.mount(path, point, disk.fstype, words.flags, words.data)
        finally:
            os.close(loop)  # it detaches with its last user, which is the mount now
    except OSError as e:
        raise MigrateError(
            VzExitCode.RESTORE_FAILED,
            f"cannot mount {disk.image} on {disk.mount}: {e.strerror}",
            path=disk.image,
        ) from e


def release(disk: Disk) -> None:
    """Drop the nosuid and nodev of `mount`: only the configured options count now.
    MigrateError(7)."""
    try:
        if is_mounted(disk.mount):
            kernel.remount(disk.mount, mount_options.parse(disk.options).flags)
    except OSError as e:
        raise MigrateError(
            VzExitCode.RESTORE_FAILED,
            f"cannot remount {disk.mount} with its own options: {e.strerror}",
            path=disk.mount,
        ) from e


@contextlib.contextmanager
def _opened_point(point: str, foreign: Sequence[str]) -> Iterator[str]:
    """A name of the folder in /proc/self/fd.  It stays the same folder when somebody changes
    the path."""
    fd = os.open(point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = f"/proc/self/fd/{fd}"
        real = os.readlink(name)
        for folder in foreign:
            if within(real, os.path.realpath(folder)):
                raise MigrateError(
                    VzExitCode.RESTORE_FAILED,
                    f"the mount point {point} leads to {real}, which lies in {folder}: no disk is "
                    "mounted among files that came from the source",
                    path=point,
                )
        yield name
    finally:
        os.close(fd)


def check_private(path: str) -> None:
    """MigrateError(15) unless a folder above the path, or one that will be created there,
    keeps other users of this host out."""
    above = existing_parent(path)
    if above != Path(path).parent:
        return  # the folders in between will be created for root alone
    real = above.resolve()
    for folder in (real, *real.parents):
        st = folder.stat()
        if st.st_uid == 0 and not st.st_mode & 0o011:
            return
    raise MigrateError(
        VzExitCode.BAD_CONFIG,
        f"all users of this host could reach {path}, and run the programs in it "
        f"that have the set-user-ID bit: run chmod 0700 {above} on this host (or set private = "
        "false in [policy])",
        path=str(above),
    )


def unmount(entry: dict[str, Any]) -> None:
    """Undo `mount`.  entry: has `mount` and `image`.  Another mount on the same folder stays.
    If it hides the image's mount, that is an OSError (EBUSY)."""
    point, image = str(entry["mount"]), str(entry["image"])
    deadline = time.monotonic() + BUSY_DEADLINE
    while ours := _mounted_from(point, image):
        top = mount_table.at(point)
        if top not in ours:
            raise OSError(errno.EBUSY, "another mount hides the image's", point)
        try:
            kernel.umount(point)
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, f"{e.strerror}{_user_of(point)}", point) from e
            time.sleep(0.01)
    detach(image)


def _user_of(point: str) -> str:
    """The process that uses the mount, for a message.  It may be any user's, where the
    folders above let it in."""
    st = os.stat(point)
    where = users.descriptor_on((os.major(st.st_dev), os.minor(st.st_dev)))
    if not where:
        return ""
    pid = int(where.split("/")[2])
    owner = ""
    with contextlib.suppress(OSError):
        owner = f" of user {os.stat(f'/proc/{pid}').st_uid}"
    return f" ({users.describe(pid)}{owner} uses it: {where}; end that process)"


def _mounted_from(point: str, image: str) -> list[mount_table.Entry]:
    """The mounts of the image on this folder, also hidden ones."""
    try:
        loops = {os.stat(path).st_rdev for path in sysblock.loop_device_of(image)}
    except FileNotFoundError:  # nothing can be mounted from it
        return []
    devices = {(os.major(d), os.minor(d)) for d in loops}
    real = os.path.realpath(point)
    return [e for e in mount_table.read() if e.point == real and e.device() in devices]


def detach(image: str) -> None:
    """Detach the image's loop devices that are left.  Most detach by themselves."""
    with contextlib.suppress(FileNotFoundError):
        for path in sysblock.loop_device_of(image):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    kernel.detach_loop(fd, path)
                finally:
                    os.close(fd)


def device_of(point: str) -> str | None:
    """The device that is mounted on this folder, as /dev/NAME.  None: nothing is mounted, or
    a file system without a device."""
    mounted = mount_table.at(point)
    device = mounted.device() if mounted else None
    return path_of(device) if device else None


def path_of(device: tuple[int, int]) -> str:
    """/dev/NAME of a block device."""
    return "/dev/" + sysblock.find(device).name.replace("!", "/")
