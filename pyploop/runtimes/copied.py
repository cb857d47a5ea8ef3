# SPDX-License-Identifier: Apache-2.0
"""Only what the configuration names is copied, and only what was copied is removed.

A disk's mount must show a whole loop device, and that the whole image.  Files are known
by device and inode, not by their names.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Copied, Disk, Tree, tree_folders, volumes
from pyploop.system import kernel, mount_options, mount_table, sysblock
from pyploop.units import SECTOR

_ELSEWHERE = ("logdev=", "rtdev=", "journal_dev=", "journal_path=", "device=")
"""Mount options of a file system that lies on more than one device."""
_EXT = ("ext2", "ext3", "ext4")
ANY_DEVICE = 0
"""Stands for a device number in a record that must outlast a reboot, which may change it."""


def identity(path: str) -> list[int]:
    """[device, inode, generation] of the file that a path leads to.  The generation is 0
    where the file system has none.  OSError."""
    st = os.stat(path)
    if not stat.S_ISREG(st.st_mode) and not stat.S_ISDIR(st.st_mode):
        return [st.st_dev, st.st_ino, 0]
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        st = os.fstat(fd)
        return [st.st_dev, st.st_ino, kernel.generation(fd, path)]
    finally:
        os.close(fd)


# ---- a disk


def check_disk(disk: Disk, used: bool) -> None:
    """MigrateError(15) unless the disk's image is what is mounted on its mount point.
    used: the container runs, so the disk must be mounted."""
    try:
        st = os.stat(disk.image)
    except OSError as e:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"cannot use the disk {disk.image}: {e.strerror}",
            path=disk.image,
        ) from e
    if not stat.S_ISREG(st.st_mode):
        raise MigrateError(
            VzExitCode.BAD_CONFIG, f"the disk {disk.image} is not a regular file", path=disk.image
        )
    mounted = mount_table.at(disk.mount)
    if mounted is None:
        if used:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the container runs, but its disk {disk.image} is not mounted on {disk.mount}: "
                "correct image and mount in the configuration",
                path=disk.mount,
            )
    else:
        _check_mount(disk, mounted, st)
    _check_elsewhere(disk, mounted)


def _check_mount(disk: Disk, mounted: mount_table.Entry, image: os.stat_result) -> None:
    where = f"{disk.mount} should show the disk {disk.image}, but shows "
    device = mounted.device()
    if device is None:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}{mounted.source} ({mounted.fstype}): unmount it",
            path=disk.mount,
        )
    check_backing(device, disk.image, image, where)
    if mounted.fstype == "btrfs":
        _check_btrfs(disk, mounted, device)
    elif mounted.root != "/":
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}only the folder {mounted.root} of it: mount the whole file system, as the "
            "target does",
            path=disk.mount,
        )
    if mounted.fstype != disk.fstype and not {mounted.fstype, disk.fstype} <= {*_EXT}:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"the file system on {disk.mount} is {mounted.fstype}, and not "
            f"{disk.fstype or 'ext4'} as configured: write fstype = "
            f'"{mounted.fstype}" for this disk on both hosts',
            path=disk.mount,
        )
    for option in mount_options.split(mounted.options):
        if option.startswith(_ELSEWHERE):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the file system on {disk.mount} has a part on another device ({option}), which "
                "is not copied: only a file system in one image can be migrated",
                path=disk.mount,
            )
    if others := mount_table.below(disk.mount):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{others[0].source} is mounted on {others[0].point}, within the disk {disk.image}, "
            "and would not be migrated: unmount it, or let config.json mount it",
            path=others[0].point,
        )


def check_backing(device: tuple[int, int], name: str, image: os.stat_result, where: str) -> None:
    """MigrateError(15) unless the device is a loop device that shows the whole image.
    where: the beginning of the message, up to the name of the device."""
    path = volumes.path_of(device)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = kernel.loop_status(fd, path)
            size = kernel.device_size(fd, path)
        finally:
            os.close(fd)
        block = sysblock.find(device)
    except OSError as e:
        if e.errno not in (errno.ENOTTY, errno.ENXIO, errno.EINVAL):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{where}{path}, which cannot be examined: {e.strerror}",
                path=path,
            ) from e
        raise MigrateError(
            VzExitCode.BAD_CONFIG, f"{where}{path}, which is not a loop device", path=path
        ) from e
    if block.is_partition:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}the partition {path}: the target can mount only the whole image",
            path=path,
        )
    here = (os.major(image.st_dev), os.minor(image.st_dev)), image.st_ino
    if (status.device, status.inode) != here:
        file = Path("/sys/block") / block.disk / "loop/backing_file"
        backing = os.fsdecode(file.read_bytes()).strip()
        # The same name: a mount hides the file, or another file has replaced it.
        shown = backing if backing != name else "another file that had this name"
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}{path}, which is attached to {shown}: correct the configuration, or mount "
            "the right image",
            path=path,
        )
    whole = image.st_size // SECTOR * SECTOR
    if status.offset or status.sizelimit or size != whole:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}{path}, which is attached to only {size} bytes of the image's "
            f"{image.st_size}, from {status.offset} on: attach the whole image (after it grew: "
            f"losetup --set-capacity {path})",
            path=path,
        )


def _check_btrfs(disk: Disk, mounted: mount_table.Entry, device: tuple[int, int]) -> None:
    name = volumes.path_of(device).removeprefix("/dev/")
    for members in Path("/sys/fs/btrfs").glob(f"*/devices/{name}"):
        if len(found := sorted(p.name for p in members.parent.iterdir())) > 1:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the btrfs on {disk.mount} lies on several devices ({', '.join(found)}): only a "
                "file system in one image can be migrated",
                path=disk.mount,
            )
    wanted = mount_options.value_of(disk.options, "subvol")
    if wanted is None and mount_options.value_of(disk.options, "subvolid") is not None:
        return
    if mounted.root != "/" + (wanted or "").strip("/"):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"the subvolume {mounted.root} is mounted on {disk.mount}, and not "
            f'{wanted or "the top one"} as configured: write options = "subvol={mounted.root}" '
            "for this disk on both hosts",
            path=disk.mount,
        )


def _check_elsewhere(disk: Disk, mounted: mount_table.Entry | None) -> None:
    """MigrateError(15) when the image is mounted elsewhere too: writes through that mount
    are not stopped."""
    loops = {os.stat(path).st_rdev for path in sysblock.loop_device_of(disk.image)}
    devices = {(os.major(d), os.minor(d)) for d in loops}
    for entry in mount_table.read():
        ours = mounted is not None and entry.number == mounted.number
        if not ours and entry.device() in devices:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the disk {disk.image} is mounted on {entry.point} too, where writes to it are "
                "not stopped: unmount it there"
                if mounted is not None
                else f"the disk {disk.image} is mounted on {entry.point}, and not on {disk.mount} "
                "as configured: correct the configuration, or unmount it there",
                path=entry.point,
            )


# ---- a disk or a private area of vzctl


def check_ploop(root: str, top: str, mounted: mount_table.Entry) -> None:
    """MigrateError(15) unless VE_ROOT (root) shows the ploop device with this top delta, or
    a loop device of the top delta."""
    where = f"{root} should show the disk {top}, but shows "
    device = mounted.device()
    if device is None:
        raise MigrateError(VzExitCode.BAD_CONFIG, f"{where}{mounted.source}: unmount it", path=root)
    disk = sysblock.find(device).disk
    if not disk.startswith("ploop"):
        check_backing(device, top, os.stat(top), where)
        return
    sysfs = Path("/sys/block") / disk
    number = sysblock.attribute(sysfs / "pstate/top")
    image = sysblock.attribute(sysfs / "pdelta" / number / "image")
    if identity(image) != identity(top):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}{disk}, whose top delta is {image}: mount the container's own disk",
            path=root,
        )


def check_simfs(root: str, private: str, mounted: mount_table.Entry) -> None:
    """MigrateError(15) unless VE_ROOT (root) shows the private area.  simfs has its path as
    the source; a bind mount, which stands in for simfs, shows the folder itself."""
    if mounted.fstype == "simfs" and os.path.realpath(mounted.source) == os.path.realpath(private):
        return
    if identity(root) != identity(private):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{root} should show the private area {private}, but shows {mounted.source}: unmount "
            "it",
            path=root,
        )


# ---- a tree


def check_tree(tree: Tree) -> None:
    """MigrateError(15) when a mount hides the directory, or a part of it."""
    real = os.path.realpath(tree.path)
    there = [e for e in mount_table.read() if e.point == real]
    if inside := mount_table.below(real):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{inside[0].source} is mounted on {inside[0].point}, within the tree {tree.path}, "
            "and would not be migrated: unmount it, or let config.json mount it",
            path=inside[0].point,
        )
    if len(there) > 1:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{there[-1].source} is mounted over {there[0].source} on the tree {tree.path}, and "
            "hides it: unmount one of them",
            path=tree.path,
        )


# ---- what was copied


def of_places(disks: Sequence[Disk], trees: Sequence[Tree]) -> Copied:
    """The identity of each image and tree, now that the disks' sources are open.  OSError."""
    return {p: identity(p) for p in [*(d.image for d in disks), *(t.path for t in trees)]}


def check_same(path: str, copied: Copied | None) -> None:
    """Before the path is removed: MigrateError(15) when it leads to something that was not
    copied.  A path that does not exist is no error, and neither is copied=None."""
    try:
        now = identity(path)
    except FileNotFoundError:
        return
    except OSError as e:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"cannot examine {path}, which was to be removed: {e.strerror}",
            path=path,
        ) from e
    if copied is None:
        return
    known = copied.get(path)
    # The record of an older pyploop has no generation.
    same = known is not None and known[1:] == now[1 : len(known)]
    if known is None or not same or known[0] not in (ANY_DEVICE, now[0]):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{path} is not what was copied: something else has taken its place, and was not "
            "removed; move it away, then run `pyploop migrate --recover`",
            path=path,
        )


def check_unhidden(disk: Disk) -> None:
    """Before a disk is unmounted and removed: MigrateError(15) when something else than its
    image is mounted on its mount point."""
    if os.path.exists(disk.image) and (mounted := mount_table.at(disk.mount)) is not None:
        device = mounted.device()
        where = f"the disk {disk.image} was not removed: {disk.mount} should show it, but shows "
        if device is None:
            raise MigrateError(
                VzExitCode.BAD_CONFIG, f"{where}{mounted.source}: unmount it", path=disk.mount
            )
        check_backing(device, disk.image, os.stat(disk.image), where)


def remove_image(path: str, copied: Copied | None) -> None:
    """Remove the file that was copied, and a link that leads to it."""
    check_same(path, copied)
    real = os.path.realpath(path)
    Path(real).unlink(missing_ok=True)
    if real != path:
        Path(path).unlink(missing_ok=True)


def remove_tree(path: str, copied: Copied | None) -> None:
    """Remove the contents of a tree that was copied.  OSError (EBUSY) when something is
    mounted in it."""
    check_same(path, copied)
    tree_folders.remove_contents(path)
