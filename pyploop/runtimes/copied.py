# SPDX-License-Identifier: Apache-2.0
"""What is copied is what the configuration names, and only that is removed.

A disk's mount is of a loop device, the loop device of the image, all of each;
files are known by device and inode, not by their names.
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
"""Options of a file system that lies on more than one device."""
_EXT = ("ext2", "ext3", "ext4")
ANY_DEVICE = 0
"""In the place of a device number: another one after a reboot."""


def identity(path: str) -> list[int]:
    """[device, inode, generation] of the file that a path leads to; the generation
    is 0 where there is none.  OSError."""
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
    """MigrateError(15) unless what is mounted on the disk's mount point is the
    disk's image.  used: the container runs, so that it must be mounted."""
    try:
        st = os.stat(disk.image)
    except OSError as e:
        raise MigrateError(VzExitCode.BAD_CONFIG, f"the disk {disk.image}: {e.strerror}") from e
    if not stat.S_ISREG(st.st_mode):
        raise MigrateError(VzExitCode.BAD_CONFIG, f"the disk {disk.image} is not a regular file")
    mounted = mount_table.at(disk.mount)
    if mounted is None:
        if used:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"nothing is mounted on {disk.mount}, where the disk {disk.image} of the running "
                "container should be: correct image and mount in the configuration",
            )
    else:
        _check_mount(disk, mounted, st)
    _check_elsewhere(disk, mounted)


def _check_mount(disk: Disk, mounted: mount_table.Entry, image: os.stat_result) -> None:
    where = f"on {disk.mount}, where the disk {disk.image} should be, "
    device = mounted.device()
    if device is None:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}{mounted.source} ({mounted.fstype}) is mounted: unmount it",
        )
    check_backing(device, disk.image, image, where)
    if mounted.fstype == "btrfs":
        _check_btrfs(disk, mounted, device)
    elif mounted.root != "/":
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}only the folder {mounted.root} of it is: the target mounts it all",
        )
    if mounted.fstype != disk.fstype and not {mounted.fstype, disk.fstype} <= {*_EXT}:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{disk.mount} is {mounted.fstype}, not {disk.fstype or 'ext4'}: write "
            f'fstype = "{mounted.fstype}" for the disk, on both hosts',
        )
    for option in mount_options.split(mounted.options):
        if option.startswith(_ELSEWHERE):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{disk.mount} ({option}) has a part on a device that does not move",
            )
    if others := mount_table.below(disk.mount):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{others[0].source} is mounted on {others[0].point}, within the disk {disk.image}, "
            "and does not move: unmount it, or let config.json mount it",
        )


def check_backing(device: tuple[int, int], name: str, image: os.stat_result, where: str) -> None:
    """MigrateError(15) unless the device is a loop device that shows all of the
    image.  where: the beginning of the message."""
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
            raise MigrateError(VzExitCode.BAD_CONFIG, f"{where}is {path}: {e.strerror}") from e
        raise MigrateError(
            VzExitCode.BAD_CONFIG, f"{where}is {path}, which is no loop device"
        ) from e
    if block.is_partition:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}is the partition {path}: the target mounts the whole image",
        )
    here = (os.major(image.st_dev), os.minor(image.st_dev)), image.st_ino
    if (status.device, status.inode) != here:
        file = Path("/sys/block") / block.disk / "loop/backing_file"
        backing = os.fsdecode(file.read_bytes()).strip()
        # A name that a mount covers, or of a file made anew.
        wanted = name if backing != name else "the file that has this name now"
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}is {path}, which is attached to {backing}, not to {wanted}: "
            "correct the configuration, or mount the right one",
        )
    whole = image.st_size // SECTOR * SECTOR
    if status.offset or status.sizelimit or size != whole:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{where}is {path}, which shows {size} bytes from {status.offset} on of the image's "
            f"{image.st_size}: attach it as a whole (losetup --set-capacity {path} after it grew)",
        )


def _check_btrfs(disk: Disk, mounted: mount_table.Entry, device: tuple[int, int]) -> None:
    name = volumes.path_of(device).removeprefix("/dev/")
    for members in Path("/sys/fs/btrfs").glob(f"*/devices/{name}"):
        if len(found := sorted(p.name for p in members.parent.iterdir())) > 1:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the btrfs on {disk.mount} lies on {', '.join(found)}: only one image moves",
            )
    wanted = mount_options.value_of(disk.options, "subvol")
    if wanted is None and mount_options.value_of(disk.options, "subvolid") is not None:
        return
    if mounted.root != "/" + (wanted or "").strip("/"):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"the subvolume {mounted.root} is mounted on {disk.mount}, the configuration has "
            f'{wanted or "none"}: write options = "subvol={mounted.root}" for the disk, on both '
            "hosts",
        )


def _check_elsewhere(disk: Disk, mounted: mount_table.Entry | None) -> None:
    """The image is mounted nowhere else: what is written there is not stopped."""
    loops = {os.stat(path).st_rdev for path in sysblock.loop_device_of(disk.image)}
    devices = {(os.major(d), os.minor(d)) for d in loops}
    for entry in mount_table.read():
        ours = mounted is not None and entry.number == mounted.number
        if not ours and entry.device() in devices:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the disk {disk.image} is mounted on {entry.point}, too"
                if mounted is not None
                else f"the disk {disk.image} is mounted on {entry.point}, not on {disk.mount}",
            )


# ---- vzctl's


def check_ploop(root: str, top: str, mounted: mount_table.Entry) -> None:
    """MigrateError(15) unless what is mounted on VE_ROOT is of the ploop device whose
    top delta this is, or of a loop device of it."""
    device = mounted.device()
    if device is None:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"on {root} {mounted.source} is mounted, not the disk {top}: unmount it",
        )
    disk = sysblock.find(device).disk
    if not disk.startswith("ploop"):
        check_backing(device, top, os.stat(top), f"on {root} ")
        return
    sysfs = Path("/sys/block") / disk
    number = sysblock.attribute(sysfs / "pstate/top")
    image = sysblock.attribute(sysfs / "pdelta" / number / "image")
    if identity(image) != identity(top):
        raise MigrateError(
            VzExitCode.BAD_CONFIG, f"on {root} is {disk}, whose top delta is {image}, not {top}"
        )


def check_simfs(root: str, private: str, mounted: mount_table.Entry) -> None:
    """MigrateError(15) unless VE_ROOT shows the private area: simfs names it; what
    else stands in for simfs (a bind mount) shows the folder itself."""
    if mounted.fstype == "simfs" and os.path.realpath(mounted.source) == os.path.realpath(private):
        return
    if identity(root) != identity(private):
        raise MigrateError(
            VzExitCode.BAD_CONFIG, f"on {root} {mounted.source} is mounted, not {private}"
        )


# ---- a tree


def check_tree(tree: Tree) -> None:
    """MigrateError(15) when something hides a part of the directory, or all of it."""
    real = os.path.realpath(tree.path)
    there = [e for e in mount_table.read() if e.point == real]
    if inside := mount_table.below(real):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{inside[0].source} is mounted on {inside[0].point}, within the tree {tree.path}, "
            "and does not move: unmount it, or let config.json mount it",
        )
    if len(there) > 1:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{there[-1].source} is mounted over {there[0].source} on the tree {tree.path}: "
            "unmount one of them",
        )


# ---- all of a container's


def of_places(disks: Sequence[Disk], trees: Sequence[Tree]) -> Copied:
    """What images and trees are, now that the disks' sources are open.  OSError."""
    return {p: identity(p) for p in [*(d.image for d in disks), *(t.path for t in trees)]}


def check_same(path: str, copied: Copied | None) -> None:
    """Before it is removed: MigrateError(15) when the path leads to something that
    was not copied.  Nothing when it leads nowhere, or that is not known."""
    try:
        now = identity(path)
    except FileNotFoundError:
        return
    except OSError as e:
        raise MigrateError(VzExitCode.BAD_CONFIG, f"{path}: {e.strerror}") from e
    if copied is None:
        return
    known = copied.get(path)
    # The record of an older pyploop has no generation.
    same = known is not None and known[1:] == now[1 : len(known)]
    if known is None or not same or known[0] not in (ANY_DEVICE, now[0]):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{path} is not what was copied, but something that took its place: it is left as it "
            "is (move it away, then `pyploop migrate --recover`)",
        )


def check_unhidden(disk: Disk) -> None:
    """Before a disk is unmounted and removed: MigrateError(15) when what is mounted
    on its mount point is not its image."""
    if os.path.exists(disk.image) and (mounted := mount_table.at(disk.mount)) is not None:
        device = mounted.device()
        where = f"on {disk.mount}, from where the disk {disk.image} is to be removed, "
        if device is None:
            raise MigrateError(
                VzExitCode.BAD_CONFIG, f"{where}{mounted.source} is mounted: unmount it"
            )
        check_backing(device, disk.image, os.stat(disk.image), where)


def remove_image(path: str, copied: Copied | None) -> None:
    """The file that was copied; a link that leads to it, too."""
    check_same(path, copied)
    real = os.path.realpath(path)
    Path(real).unlink(missing_ok=True)
    if real != path:
        Path(path).unlink(missing_ok=True)


def remove_tree(path: str, copied: Copied | None) -> None:
    """What is in a tree that was copied.  OSError (EBUSY) when something is mounted
    in it."""
    check_same(path, copied)
    tree_folders.remove_contents(path)
