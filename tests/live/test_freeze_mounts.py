# SPDX-License-Identifier: Apache-2.0
"""Which file systems are frozen, and how: those that a stop command unmounts or
moves, those that cannot be frozen, those of which only a file is mounted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import (
    MIB,
    is_frozen,
    loop_device,
    mounted,
    needs,
    partition,
    pyploop_cmd,
    pyploop_env,
    run,
    wait_until,
)
from support_live import Copied, comparison, copy, file_system, sparse_file, work_dir

from pyploop.errors import BusyError
from pyploop.freeze import FileSystems, filesystems
from pyploop.freeze.deadline import Deadline, Limits
from pyploop.freeze.session import FreezeSession
from pyploop.freeze.stoppers import Spec
from pyploop.report.events import Reporter
from pyploop.system.mount_table import Mount
from pyploop.undo.ledger import UndoLedger

pytestmark = pytest.mark.root
SIZE = 32 * MIB
HELD = "! fsfreeze -f {0} 2>/dev/null"
"""Succeeds where the file system is frozen."""


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop", "mkfs.ext4", "fsfreeze")
    with work_dir() as made:
        yield made


@pytest.fixture
def disk(folder: Path) -> Iterator[tuple[str, Path]]:
    """(device, mount point) of an ext4 that holds a file which is not synced yet."""
    with (
        loop_device(sparse_file(folder / "image", SIZE)) as device,
        file_system(device, folder / "m") as point,
    ):
        (point / "f").write_bytes(os.urandom(MIB))
        yield device, point


def copied_as_frozen(
    folder: Path, device: str, *options: str, frozen: str = "true", via: str = "pipe"
) -> Copied:
    """Exit code 0, and what was frozen is in FOLDER/target.  frozen: a command
    that succeeds when the right things are frozen."""
    target = folder / "target"
    check = f"{frozen} && {comparison(folder / 'image', target, SIZE)}"
    got = copy(device, target, *options, "--before-thaw", check, via=via)
    assert got.code == 0, got.errors
    return got


def unmount_again(point: Path) -> None:
    subprocess.run(["umount", str(point)], capture_output=True, check=False)


# ---- a stop command that unmounts


@pytest.mark.parametrize("via", ["local", "pipe"])
def test_unmounting_is_a_way_to_stop(folder: Path, disk: tuple[str, Path], via: str) -> None:
    device, m = disk
    target = folder / "target"
    got = copied_as_frozen(folder, device, "-F", f"umount {m}", via=via)
    assert not os.path.ismount(m)
    assert f"{m} was unmounted" in got.errors
    run("e2fsck", "-f", "-n", target)
    with loop_device(target) as copied, mounted(copied, folder / "c") as c:
        assert (c / "f").stat().st_size == MIB


def test_a_file_system_that_is_made_read_only_is_stopped(
    folder: Path, disk: tuple[str, Path]
) -> None:
    device, m = disk
    stop = f"mount -o remount,ro {m}"
    copied_as_frozen(folder, device, "-F", stop, frozen=HELD.format(m))
    run("e2fsck", "-f", "-n", folder / "target")


def test_of_two_mounts_the_one_that_is_left_is_frozen(folder: Path, disk: tuple[str, Path]) -> None:
    device, m = disk
    with mounted(device, folder / "n") as n:
        copied_as_frozen(folder, device, "-F", f"umount {m}", frozen=HELD.format(n))
        assert not is_frozen(n)


def test_a_file_system_that_is_mounted_again_is_frozen_there(
    folder: Path, disk: tuple[str, Path]
) -> None:
    device, m = disk
    n = folder / "n"
    n.mkdir()
    try:
        stop = f"umount {m} && mount {device} {n}"
        copied_as_frozen(folder, device, "-F", stop, frozen=HELD.format(n))
        assert not is_frozen(n)
    finally:
        unmount_again(n)


@pytest.mark.parametrize("way", ["again", "subvolume"])
def test_a_btrfs_is_found_again_although_its_number_changes(folder: Path, way: str) -> None:
    needs("mkfs.btrfs")
    image, m, n = sparse_file(folder / "image", 128 * MIB), folder / "m", folder / "n"
    run("mkfs.btrfs", "-q", image)
    n.mkdir()
    with loop_device(image) as device:
        try:
            with mounted(device, m):
                if way == "subvolume":
                    run("btrfs", "subvolume", "create", m / "sub")
                    run("mount", "--bind", m / "sub", n)
                mount = f" && mount {device} {n}" if way == "again" else ""
                check = f"{HELD.format(n)} && cmp {image} {folder}/target"
                stop = f"umount {m}{mount}"
                got = copy(device, folder / "target", "-F", stop, "--before-thaw", check)
                assert got.code == 0, got.errors
                assert not is_frozen(n)
        finally:
            unmount_again(n)


def test_another_file_system_at_the_same_place_is_not_frozen(
    folder: Path, disk: tuple[str, Path]
) -> None:
    device, m = disk
    with loop_device(sparse_file(folder / "other", SIZE)) as other:
        run("mkfs.ext4", "-q", other)
        try:
            stop = f"umount {m} && mount {other} {m}"
            copied_as_frozen(folder, device, "-F", stop, frozen=f"touch {m}/free")
            assert (m / "free").exists()
        finally:
            unmount_again(m)


def test_what_is_unmounted_lazily_and_still_open_is_not_taken_for_gone(
    folder: Path, disk: tuple[str, Path]
) -> None:
    device, m = disk
    with (m / "f").open("ab"):
        got = copy(device, folder / "target", "-F", f"umount -l {m}", via="local")
    assert (got.code, "is still in use" in got.errors) == (14, True), got.errors
    assert not (folder / "target").exists()


def test_one_that_is_frozen_by_name_leaves_another_free_to_be_unmounted(folder: Path) -> None:
    half = SIZE // 2
    with contextlib.ExitStack() as stack:
        image = sparse_file(folder / "image", SIZE)
        device = stack.enter_context(loop_device(image, options=["--partscan"]))
        points = []
        for number in (1, 2):
            start = MIB + (number - 1) * half
            part = stack.enter_context(partition(device, number, start, half - MIB))
            points.append(stack.enter_context(file_system(part, folder / f"m{number}")))
        a, b = points
        order = ("--freeze", f"fs:{a}", "-F", f"umount {b}")
        copied_as_frozen(folder, device, *order, frozen=HELD.format(a))
        assert not os.path.ismount(b) and not is_frozen(a)


def test_after_an_undo_the_file_system_that_is_mounted_again_is_frozen_again(
    folder: Path, disk: tuple[str, Path]
) -> None:
    """As for a second approach, after a first that took too long."""
    device, m = disk
    with contextlib.closing(UndoLedger("a test", Reporter())) as plan:
        systems = FileSystems([Mount(str(m), "ext4", device)], Reporter(), plan)
        command = Spec("cmd", f"umount {m}", f"mount {device} {m}")
        session = FreezeSession([command], systems, plan, Reporter(), Deadline(time.monotonic))
        try:
            for _ in range(2):
                session.prepare()
                session.stop(Limits.of(60))
                systems.sync()
                systems.freeze()
                session.check()
                assert not os.path.ismount(m)
                assert session.undo() == [] and os.path.ismount(m)
            systems.freeze()
            assert is_frozen(m)
        finally:
            systems.close()
        assert not is_frozen(m)


def test_what_is_mounted_again_during_the_last_steps_fails_the_copy(
    folder: Path, disk: tuple[str, Path]
) -> None:
    device, m = disk
    mount = f"mount -o ro,noload {device} {m}"  # which writes nothing
    got = copy(device, folder / "target", "-F", f"umount {m}", "--before-thaw", mount)
    assert (got.code, "was mounted again" in got.errors) == (14, True), got.errors


def test_another_copy_waits_for_the_freeze_although_nothing_pins_the_mount(
    folder: Path, disk: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, m = disk
    monkeypatch.setattr(filesystems, "LOCK_DEADLINE", 0.1)
    one, two = (FileSystems([Mount(str(m), "ext4", device)], Reporter()) for _ in range(2))
    try:
        one.guard()
        one.let_go()
        with pytest.raises(BusyError, match="another copy has frozen"):
            two.guard()
        one.thaw()
        two.guard()
        run("umount", "-l", m)  # or `one` would not be able to close
    finally:
        two.close()
        one.close()


def test_a_lock_that_every_user_can_take_keeps_no_copy_from_freezing(
    folder: Path, disk: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, m = disk
    monkeypatch.setattr(filesystems, "LOCK_DEADLINE", 0.1)
    number = Path(f"/sys/block/{Path(device).name}/dev").read_text().strip()
    open_to_all = os.open(f"/sys/dev/block/{number}/dev", os.O_RDONLY)
    systems = FileSystems([Mount(str(m), "ext4", device)], Reporter())
    try:
        fcntl.flock(open_to_all, fcntl.LOCK_EX)
        systems.guard()
    finally:
        systems.close()
        os.close(open_to_all)


# ---- what cannot be frozen


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_a_read_only_file_system_needs_no_freeze(folder: Path, kind: str) -> None:
    maker = {"squashfs": "mksquashfs", "erofs": "mkfs.erofs"}[kind]
    needs(maker)
    (folder / "tree").mkdir()
    (folder / "tree/f").write_bytes(os.urandom(MIB))
    image = folder / "image"
    run(maker, *((folder / "tree", image) if kind == "squashfs" else (image, folder / "tree")))
    with loop_device(image) as device, mounted(device, folder / "m", "ro", kind):
        got = copy(device, folder / "target")
        assert (got.code, "cannot be frozen" in got.errors) == (0, False), got.errors
        run("cmp", image, folder / "target")


@pytest.fixture
def ntfs(folder: Path) -> Iterator[tuple[str, Path]]:
    """A writable file system without a freeze, beside an ext4 on one disk."""
    needs("mkfs.ntfs", "ntfs-3g", "addpart")
    if not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse")
    half = SIZE // 2
    with contextlib.ExitStack() as stack:
        image = sparse_file(folder / "image", SIZE)
        device = stack.enter_context(loop_device(image, options=["--partscan"]))
        first = stack.enter_context(partition(device, 1, MIB, half - MIB))
        second = stack.enter_context(partition(device, 2, half, half))
        stack.enter_context(file_system(first, folder / "m"))
        run("mkfs.ntfs", "-q", "-F", "-Q", second)
        yield device, stack.enter_context(mounted(second, folder / "n", fstype="ntfs-3g"))


@pytest.mark.parametrize("via", ["local", "pipe"])
def test_a_writable_one_without_a_freeze_is_synced_and_said(
    folder: Path, ntfs: tuple[str, Path], via: str
) -> None:
    device, n = ntfs
    (n / "f").write_bytes(os.urandom(MIB))
    got = copied_as_frozen(folder, device, frozen=HELD.format(folder / "m"), via=via)
    assert f"{n} (fuseblk) cannot be frozen: it is synced instead" in got.errors
    with (
        loop_device(folder / "target", offset=SIZE // 2) as copied,
        mounted(copied, folder / "c", "ro", "ntfs-3g") as c,
    ):
        assert (c / "f").read_bytes() == (n / "f").read_bytes()


@pytest.mark.parametrize("stop", [["-F", "true"], []])
def test_a_writable_one_without_a_freeze_that_is_written_fails_the_copy(
    folder: Path, ntfs: tuple[str, Path], stop: list[str]
) -> None:
    device, n = ntfs
    got = copy(device, folder / "target", *stop, "--before-thaw", f"echo late >{n}/late")
    assert (got.code, "was written to during the last steps" in got.errors) == (14, True), (
        got.errors
    )


def test_without_any_witness_it_is_refused_before_the_first_byte(
    folder: Path, ntfs: tuple[str, Path]
) -> None:
    """Accounting that is off, and cannot be switched on: /sys is read-only."""
    needs("unshare")
    device, n = ntfs
    iostats = Path("/sys/block") / Path(device).name / "queue/iostats"
    iostats.write_text("0")
    script = 'mount -o bind,remount,ro /sys && exec "$@"'
    sender = ["unshare", "--mount", "sh", "-c", script, "sh", *pyploop_cmd(), "copy"]
    got = copy(device, folder / "target", "--tracker", "scan", sender=sender, via="local")
    assert (got.code, f"{n} cannot be frozen" in got.errors) == (3, True), got.errors
    assert "First pass" not in got.errors


# ---- what is mounted in unusual ways


def test_a_file_that_is_mounted_by_itself_is_enough_to_freeze(
    folder: Path, disk: tuple[str, Path]
) -> None:
    device, m = disk
    one = folder / "one"
    one.touch()
    run("mount", "--bind", m / "f", one)
    try:
        run("umount", m)
        # fsfreeze(8) takes folders only.
        probe = f"import fcntl; fcntl.ioctl(open('{one}'), 0xC0045877, 0)"
        held = f'! {sys.executable} -c "{probe}" 2>/dev/null'
        copied_as_frozen(folder, device, frozen=held)
        subprocess.run(["touch", str(one)], timeout=10, check=True)
    finally:
        run("umount", one)


def test_a_frozen_file_system_of_which_a_file_is_mounted_is_thawed_by_hand(
    folder: Path, disk: tuple[str, Path]
) -> None:
    from pyploop.diskcopy import undo_kinds

    _, m = disk
    one = folder / "one"
    one.touch()
    st = m.stat()
    entry = {"mount": str(one), "dev": f"{os.major(st.st_dev)}:{os.minor(st.st_dev)}"}
    run("mount", "--bind", m / "f", one)
    try:
        run("fsfreeze", "-f", m)
        undo_kinds.thaw(entry)
        assert not is_frozen(m)
    finally:
        run("umount", one)


def test_a_socket_that_is_mounted_by_itself_is_refused_with_a_way_out(
    folder: Path, disk: tuple[str, Path]
) -> None:
    device, m = disk
    one = folder / "one"
    one.touch()
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(m / "s"))
    holder = subprocess.Popen(["sleep", "60"], cwd=m)
    run("mount", "--bind", m / "s", one)
    try:
        run("umount", "-l", m)
        got = copy(device, folder / "t1", via="local")
        assert (got.code, "--mount" in got.errors) == (4, True), got.errors
        there = f"/proc/{holder.pid}/cwd"
        copied_as_frozen(folder, device, "--mount", there, frozen=HELD.format(there))
    finally:
        holder.kill()
        holder.wait()
        run("umount", one)


def test_every_mount_point_that_is_named_is_frozen(folder: Path) -> None:
    half = SIZE // 2
    with contextlib.ExitStack() as stack:
        image = sparse_file(folder / "image", SIZE)
        device = stack.enter_context(loop_device(image, options=["--partscan"]))
        points = []
        for number in (1, 2):
            part = stack.enter_context(
                partition(device, number, MIB + (number - 1) * half, half - MIB)
            )
            points.append(stack.enter_context(file_system(part, folder / f"m{number}")))
        named = [x for p in (*points, points[0]) for x in ("--mount", str(p))]
        check = " && ".join(HELD.format(p) for p in points)
        got = copied_as_frozen(folder, device, *named, frozen=check)
        assert "already frozen" not in got.errors
        assert not any(is_frozen(p) for p in points)


def test_a_user_who_may_not_freeze_gets_an_error_before_the_first_byte(
    folder: Path, disk: tuple[str, Path]
) -> None:
    needs("setpriv")
    device, m = disk
    words = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *pyploop_cmd()]
    words += ["copy", "-s", device, "-d", str(folder / "target"), "--tracker", "scan"]
    done = subprocess.run(words, env=pyploop_env(), capture_output=True, text=True, check=False)
    assert (done.returncode, f"cannot freeze {m}" in done.stderr) == (3, True), done.stderr
    assert "First pass" not in done.stdout + done.stderr
    wait_until(lambda: not is_frozen(m), "nothing is frozen")


def test_a_receipt_on_what_is_frozen_is_refused_if_it_is_written_before_the_thaw(
    disk: tuple[str, Path], folder: Path
) -> None:
    device, point = disk
    receipt, target = point / "receipt", folder / "target"
    words = ["copy", "-s", device, "-d", str(target), "--receipt", str(receipt)]
    command = [*pyploop_cmd(), *words, "--before-thaw", "true"]
    done = subprocess.run(command, env=pyploop_env(), capture_output=True, text=True, check=False)
    assert (done.returncode, "which is frozen when it is written" in done.stderr) == (38, True)
    assert not target.exists() and not receipt.exists()
    subprocess.run(command[:-2], env=pyploop_env(), capture_output=True, check=True)
    assert receipt.exists()
