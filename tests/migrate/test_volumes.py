# SPDX-License-Identifier: Apache-2.0
"""What is mounted where, on file systems and mounts that mislead; options as mount(8)
takes them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from anypair import make_disk

from pyploop.runtimes import Disk, volumes
from pyploop.system import mount_table


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    support.needs("root", "loop")
    yield tmp_path
    for entry in mount_table.read()[::-1]:
        if mount_table.within(entry.point, str(tmp_path)):
            subprocess.run(["umount", "-l", entry.point], capture_output=True, check=False)


def attached(folder: Path) -> list[str]:
    lines = support.run("losetup", "-nO", "BACK-FILE").splitlines()
    return [x for x in lines if x.startswith(str(folder))]


def detached(folder: Path) -> None:
    """A loop device goes a moment after its last user, who may be anybody."""
    support.wait_until(lambda: not attached(folder), "no loop device is left")


def seen(point: Path) -> tuple[str, str]:
    """Options of the mount and of its file system, as the kernel tells them."""
    table = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    (line,) = (x for x in table.split("\n") if f" {point} " in x)
    return line.split()[5], line.split()[-1]


OPTIONS = {
    "ext4": (
        "defaults,nofail,_netdev,x-systemd.requires=a.mount",
        "user,exec,errors=remount-ro,noatime",
        "owner,comment=x,ro",
        "group,dev,lazytime,data=ordered",
        "users,nodiratime,nosymfollow,sync",
        "rw,ro,rw,nosuid,suid,noexec",
    ),
    "xfs": ("nouuid,noatime,nofail,inode64", "ro,norecovery,users"),
    "btrfs": ("noatime,noauto,user,compress=zstd", "subvol=/,_netdev,nodev"),
}


@pytest.mark.parametrize("fstype", OPTIONS)
def test_a_disk_is_mounted_as_mount_8_mounts_it(folder: Path, fstype: str) -> None:
    support.needs(f"mkfs.{fstype}")
    image, point = folder / "image", folder / "point"
    make_disk(image, fstype)
    point.mkdir()
    for options in OPTIONS[fstype]:
        # The file system itself may ask for a panic, and does not get it.
        more = ",errors=remount-ro" if fstype == "ext4" and "errors=" not in options else ""
        support.run("mount", "-t", fstype, "-o", f"loop,{options}{more}", image, point)
        wanted = seen(point)
        support.run("umount", point)
        disk = Disk(str(image), str(point), fstype, options)
        volumes.mount(disk)
        assert seen(point) == wanted, options
        device = volumes.device_of(str(point))
        assert device is not None and device.startswith("/dev/loop")
        volumes.unmount({"mount": disk.mount, "image": disk.image})
        assert not volumes.is_mounted(str(point))
        detached(folder)


def test_a_folder_is_mounted_only_if_the_mount_table_has_it(folder: Path) -> None:
    support.needs("btrfs")
    make_disk(folder / "image", "btrfs")
    top, link, file = folder / "top", folder / "link", folder / "file"
    top.mkdir()
    file.touch()
    support.run("mount", "-o", "loop", folder / "image", top)
    support.run("btrfs", "subvolume", "create", top / "sub")
    link.symlink_to(top)
    assert volumes.is_mounted(str(top)) and volumes.is_mounted(f"{top}/.")
    assert volumes.is_mounted(str(link))  # what it leads to is
    assert not volumes.is_mounted(str(top / "sub"))
    assert volumes.device_of(str(top / "sub")) is None
    (folder / "to-sub").symlink_to(top / "sub")
    assert not volumes.is_mounted(str(folder / "to-sub"))
    # A bind mount of the same file system, of a folder and of a file.
    (top / "bound").mkdir()
    support.run("mount", "--bind", top / "sub", top / "bound")
    support.run("mount", "--bind", folder / "image", file)
    assert volumes.is_mounted(str(top / "bound")) and volumes.is_mounted(str(file))
    assert volumes.device_of(str(top / "bound")) == volumes.device_of(str(top))
    assert not volumes.is_mounted(str(folder / "none"))
    # What is hidden is not what is seen there.
    support.run("mount", "-t", "tmpfs", "none", top)
    (top / "bound").mkdir()
    assert not volumes.is_mounted(str(top / "bound"))
    assert volumes.is_mounted(str(top)) and volumes.device_of(str(top)) is None


def test_an_undone_mount_leaves_what_others_mounted_there(folder: Path) -> None:
    support.needs("mkfs.ext4")
    point = folder / "point"
    point.mkdir()
    for name in ("image", "other"):
        make_disk(folder / name)
    disk = {"mount": str(point), "image": str(folder / "image")}
    support.run("mount", "-o", "loop", folder / "other", point)
    volumes.unmount(disk)
    assert volumes.is_mounted(str(point))
    support.run("umount", point)
    volumes.mount(Disk(disk["image"], disk["mount"], "ext4", "rw"))
    support.run("mount", "-o", "loop", folder / "other", point)
    with pytest.raises(OSError, match="another mount hides"):
        volumes.unmount(disk)
    assert sorted(attached(folder)) == [str(folder / "image"), str(folder / "other")]
    support.run("umount", point)
    volumes.unmount(disk)
    assert not volumes.is_mounted(str(point))
    detached(folder)
    with contextlib.suppress(FileNotFoundError):
        (folder / "image").unlink()
    volumes.unmount(disk)  # again, and nothing is left
