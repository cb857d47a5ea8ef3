# SPDX-License-Identifier: Apache-2.0
"""A target that lies on its own source is refused before the first byte, whatever
lies between the two, by a local copy and by both ends of a stream."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from support import (
    MIB,
    is_frozen,
    loop_device,
    missing,
    mounted,
    needs,
    partition,
    pyploop_cmd,
    pyploop_env,
    run,
    unmount,
)
from support_live import (
    C_RECEIVER,
    Copied,
    copy,
    file_system,
    random_file,
    sparse_file,
    succeeded,
    work_dir,
)

from pyploop.disks import backing, opening

pytestmark = pytest.mark.root
SFTP = "/usr/lib/openssh/sftp-server"
SIZE = 64 * MIB


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop", "mkfs.ext4")
    with work_dir() as made:
        yield made


@pytest.fixture
def disk(folder: Path) -> Iterator[tuple[str, Path]]:
    """A loop device and where it is mounted."""
    with (
        loop_device(sparse_file(folder / "image", SIZE)) as name,
        file_system(name, folder / "m") as point,
    ):
        yield name, point


@contextlib.contextmanager
def bind(folder: Path, point: Path) -> Iterator[Path]:
    (folder / "there").mkdir()
    run("mount", "--bind", point, folder / "there")
    try:
        yield folder / "there"
    finally:
        unmount(folder / "there")


@contextlib.contextmanager
def symlink(folder: Path, point: Path) -> Iterator[Path]:
    (folder / "there").symlink_to(point)
    yield folder / "there"


@contextlib.contextmanager
def overlay(folder: Path, point: Path, relative: bool = False) -> Iterator[Path]:
    for name in ("upper", "work"):
        (point / name).mkdir()
    for path in (folder / "lower", folder / "there"):
        path.mkdir()
    upper = os.path.relpath(point, folder) if relative else str(point)
    options = f"lowerdir=lower,upperdir={upper}/upper,workdir={upper}/work"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(folder / "there")]
    if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
        missing("needs overlay")
    try:
        yield folder / "there"
    finally:
        unmount(folder / "there")


def relative_overlay(folder: Path, point: Path) -> contextlib.AbstractContextManager[Path]:
    return overlay(folder, point, relative=True)


@contextlib.contextmanager
def loop_on_it(folder: Path, point: Path) -> Iterator[Path]:
    with (
        loop_device(sparse_file(point / "inner", 16 * MIB)) as inner,
        file_system(inner, folder / "there") as there,
    ):
        yield there


@contextlib.contextmanager
def loop_with_another_name(folder: Path, point: Path) -> Iterator[Path]:
    """The kernel knows the loop's file by a name that leads nowhere any more."""
    sparse_file(point / "inner", 16 * MIB)
    with loop_device(point / "inner") as inner:
        (point / "inner").rename(point / "moved")
        (point / "moved").unlink()
        with file_system(inner, folder / "there") as there:
            yield there


@contextlib.contextmanager
def fuse(folder: Path, point: Path, program: str) -> Iterator[Path]:
    needs(program)
    if not os.path.exists("/dev/fuse"):
        missing("needs /dev/fuse")
    (folder / "there").mkdir()
    script = folder / "ssh"
    script.write_text(f"#!/bin/sh\nexec {SFTP}\n")
    script.chmod(0o700)
    source = [str(point)] if program == "bindfs" else ["-o", f"ssh_command={script}", f"h:{point}"]
    run(program, *source, folder / "there")
    try:
        yield folder / "there"
    finally:
        unmount(folder / "there")


def bindfs(folder: Path, point: Path) -> contextlib.AbstractContextManager[Path]:
    return fuse(folder, point, "bindfs")


def sshfs_of_this_machine(folder: Path, point: Path) -> contextlib.AbstractContextManager[Path]:
    needs(SFTP)
    return fuse(folder, point, "sshfs")


Way = Callable[[Path, Path], contextlib.AbstractContextManager[Path]]
WAYS: list[Way] = [
    symlink,
    bind,
    overlay,
    relative_overlay,
    loop_on_it,
    loop_with_another_name,
    bindfs,
    sshfs_of_this_machine,
]


def refused(got: Copied, there: Path, via: str) -> None:
    assert got.code == 38, got.errors
    assert got.receiver_code == (38 if via != "local" else None), got.errors
    assert "the target lies on" in got.errors
    assert "Traceback" not in got.errors
    assert [p for p in there.iterdir() if "target" in p.name] == []


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("via", ["local", "pipe"])
def test_a_target_on_its_source_is_refused(
    folder: Path, disk: tuple[str, Path], via: str, way: Way
) -> None:
    name, point = disk
    with way(folder, point) as there:
        got = copy(name, there / "target", via=via, json_events=False)
        refused(got, there, via)
        assert not is_frozen(point)


@pytest.mark.parametrize("receiver", ["ours", "C"])
def test_a_receiver_without_a_way_back_that_writes_on_the_source_is_found(
    folder: Path, disk: tuple[str, Path], receiver: str
) -> None:
    if receiver == "C":
        needs("ploop")
    name, point = disk
    program = C_RECEIVER if receiver == "C" else None
    with overlay(folder, point) as there:
        got = copy(name, there / "target", via="mute", receiver=program, json_events=False)
        assert got.code == 38, got.errors
        assert got.receiver_code == 6, got.errors  # the stream ended
        assert "the target lies on" in got.errors
        assert not (there / "target").exists()
        assert not is_frozen(point)
    succeeded(copy(name, folder / "target", via="mute", receiver=program, json_events=False))


@pytest.mark.parametrize("via", ["local", "socket"])
def test_a_target_on_a_subvolume_of_its_source_is_refused(folder: Path, via: str) -> None:
    needs("mkfs.btrfs", "btrfs")
    sparse_file(folder / "one", 200 * MIB)
    sparse_file(folder / "two", 200 * MIB)
    with loop_device(folder / "one") as one, loop_device(folder / "two") as two:
        run("mkfs.btrfs", "-q", one, two)
        with mounted(one, folder / "m", fstype="btrfs") as point:
            run("btrfs", "subvolume", "create", point / "sub")
            got = copy(one, point / "sub/target", via=via, json_events=False)
            refused(got, point / "sub", via)
            # As the other half of it.
            with contextlib.closing(opening.open_source(two, to_freeze=False)) as source:
                found = backing.of_source(source)
            fd = os.open(point / "sub", os.O_RDONLY)
            rdev = os.stat(two).st_rdev
            assert (os.major(rdev), os.minor(rdev), 0) in backing.of_file(fd).things & found.things
            os.close(fd)


def test_the_disk_below_a_partition_is_found(folder: Path) -> None:
    image = sparse_file(folder / "image", SIZE)
    with (
        loop_device(image, options=["--partscan"]) as disk,
        partition(disk, 1, MIB, SIZE - MIB) as part,
        file_system(part, folder / "m") as point,
    ):
        got = copy(disk, point / "target", via="local", json_events=False)
        refused(got, point, "local")


def test_what_only_shares_the_disk_with_the_source_is_no_target_on_it(folder: Path) -> None:
    """Two images in one file system, a nested one, and the target beside them."""
    with (
        loop_device(sparse_file(folder / "outer", 128 * MIB)) as outer,
        file_system(outer, folder / "o") as there,
        loop_device(sparse_file(there / "inner", 32 * MIB)) as inner,
        file_system(inner, folder / "i"),
    ):
        succeeded(copy(inner, there / "target", via="pipe", json_events=False))


def in_place(source: str, out: IO[bytes]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*pyploop_cmd(), "copy", "-s", source],
        stdout=out,
        stderr=subprocess.PIPE,
        env=pyploop_env(),
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["image", "other"])
def test_the_file_of_the_source_is_no_output_by_whatever_name(
    folder: Path, disk: tuple[str, Path], name: str
) -> None:
    os.link(folder / "image", folder / "other")
    run("sync", "-f", folder / "image")
    with (folder / name).open("r+b") as out:
        got = in_place(disk[0], out)
    assert got.returncode == 38, got.stderr
    assert "would destroy the source; nothing was written" in got.stderr
    assert (folder / "image").stat().st_size == SIZE
    run("e2fsck", "-fn", folder / "image", check=False)


def test_a_file_below_a_nested_source_is_no_output(folder: Path, disk: tuple[str, Path]) -> None:
    with (
        loop_device(random_file(disk[1] / "inner", MIB)) as inner,
        (folder / "image").open("r+b") as out,
    ):
        got = in_place(inner, out)
    assert got.returncode == 38, got.stderr
    assert "would destroy the source" in got.stderr


def test_a_file_that_is_its_own_output_is_refused(folder: Path) -> None:
    data = random_file(folder / "file", MIB).read_bytes()
    with (folder / "file").open("r+b") as out:
        got = in_place(str(folder / "file"), out)
    assert got.returncode == 38, got.stderr
    assert (folder / "file").read_bytes() == data


@pytest.mark.parametrize("kind", ["overlay", "bindfs"])
@pytest.mark.parametrize("output", ["below", "above"])
def test_a_file_that_another_file_system_shows_is_its_own_output(
    folder: Path, kind: str, output: str
) -> None:
    """Neither its device nor, on FUSE, its inode number is the same there."""
    below, above = folder / "below", folder / "above"
    for name in ("below", "above", "lower", "work"):
        (folder / name).mkdir()
    data = random_file(below / "file", MIB).read_bytes()
    with contextlib.ExitStack() as undo:
        if kind == "overlay":
            layers = f"lowerdir={folder}/lower,upperdir={below},workdir={folder}/work"
            undo.enter_context(mounted("overlay", above, layers, "overlay"))
        else:
            needs("bindfs")
            run("bindfs", below, above)
            undo.callback(unmount, above)
        source, out = (above, below) if output == "below" else (below, above)
        with (out / "file").open("r+b") as opened:
            got = in_place(str(source / "file"), opened)
        assert got.returncode == 38, got.stderr
        assert "would destroy the source; nothing was written" in got.stderr
    assert (below / "file").read_bytes() == data


def test_an_output_that_is_open_for_reading_only_is_refused(folder: Path) -> None:
    random_file(folder / "file", MIB)
    (folder / "out").touch()
    with (folder / "out").open("rb") as out:
        got = in_place(str(folder / "file"), out)
    assert (got.returncode, "-o 1 is not open for writing" in got.stderr) == (38, True), got.stderr
