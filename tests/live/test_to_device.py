# SPDX-License-Identifier: Apache-2.0
"""A block device as the target (--to-device), and targets that are written past the page
cache (--write): on real devices and file systems."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import (
    MIB,
    d1_end,
    d1_frame,
    loop_device,
    mounted,
    needs,
    partition,
    pyploop_cmd,
    pyploop_env,
    run,
    tmpfs,
)
from support_live import copy, file_system, random_file, same, sparse_file, succeeded, work_dir

import pyploop

pytestmark = pytest.mark.root
SIZE = 24 * MIB + 1536
"""Of most sources: no multiple of a block."""
SECTORS_4K = ("--sector-size", "4096")


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop")
    with work_dir() as made:
        yield made


def source_file(path: Path, size: int = SIZE) -> Path:
    """Data, a hole of 8 MiB, single blocks with small holes between them, a hole, data."""
    sparse_file(path, size)
    with path.open("r+b") as f:
        f.write(os.urandom(6 * MIB))
        for at in range(14 * MIB, 16 * MIB, 12288):
            f.seek(at)
            f.write(os.urandom(4096))
        f.seek(size - MIB - 100)
        f.write(os.urandom(MIB + 100))
    return path


@contextlib.contextmanager
def device(folder: Path, size: int, *options: str, name: str = "disk") -> Iterator[str]:
    """A loop device that is full of old data."""
    path = folder / name
    with path.open("wb") as f:
        for _ in range(0, size, MIB):
            f.write(b"\xa5" * MIB)
        f.truncate(size)
    with loop_device(path, options=options) as made:
        yield made


def tail_is_old(path: str, start: int) -> bool:
    with open(path, "rb") as f:
        f.seek(start)
        return set(f.read()) <= {0xA5}


def onto(folder: Path, device: str) -> Path:
    """A name of the device in the folder, beside which the events may go."""
    link = folder / "target"
    link.unlink(missing_ok=True)
    link.symlink_to(device)
    return link


def equal(source: Path | str, device: Path | str, size: int = SIZE) -> bool:
    """The first `size` bytes of both are the same, on the disks."""
    for path in (source, device):
        subprocess.run(["blockdev", "--flushbufs", path], stderr=subprocess.DEVNULL, check=False)
    done = subprocess.run(["cmp", "-n", str(size), source, device], check=False)
    return done.returncode == 0


RECEIVER = (*pyploop_cmd(), "copy", "--to-device")


# ---- onto a device


@pytest.mark.parametrize(
    ("via", "options"),
    [("local", ()), ("pipe", ()), ("local", SECTORS_4K), ("socket", SECTORS_4K), ("mute", ())],
)
def test_a_device_gets_the_image_with_zeroes_for_holes_and_keeps_what_lies_behind(
    folder: Path, via: str, options: tuple[str, ...]
) -> None:
    source = source_file(folder / "source")
    with device(folder, 32 * MIB, *options) as target:
        more = ["--to-device"] if via == "local" else []
        got = copy(source, onto(folder, target), *more, via=via, receiver=RECEIVER)
        succeeded(got)
        assert equal(source, target)
        assert tail_is_old(target, SIZE)
        assert f"(from byte {SIZE} on) were left as they were" in got.errors
        if via == "local":
            assert got.summary["write_mode"].startswith("O_DIRECT")
            assert got.summary["direct_bytes"] > 6 * MIB
            assert got.summary["filled_bytes"] > 6 * MIB


def test_a_device_that_is_written_during_the_copy_is_right_on_a_device(folder: Path) -> None:
    """A mounted source, with writes in its holes and in its data between the rounds."""
    needs("mkfs.ext4")
    sparse_file(folder / "source", 64 * MIB)
    with (
        loop_device(folder / "source") as source,
        file_system(source, folder / "mnt") as mnt,
        device(folder, 64 * MIB) as target,
        pyploop.Copy(source, target, options=pyploop.CopyOptions(to_device=True)) as copying,
    ):
        copying.first_pass()
        random_file(mnt / "new", 9 * MIB)
        copying.round()
        run("fallocate", "--punch-hole", "--length", 4 * MIB, mnt / "new")
        copying.converge()
        with copying.frozen():
            copying.last_blocks()
            copying.finish()
            assert equal(source, target, 64 * MIB)


def test_the_c_tools_stream_fills_a_device(folder: Path) -> None:
    """Clusters with halves of 4 bytes, frames at odd places, and no announced size."""
    image = bytearray(3 * MIB)
    frames = [(0, os.urandom(MIB)), (MIB + 5, os.urandom(3)), (MIB + 100000, os.urandom(70000))]
    frames += [(2 * MIB, os.urandom(4096 + 2)), (3 * MIB - 5, b"tail!")]
    with device(folder, 4 * MIB) as target:
        stream = b""
        for pos, data in frames:
            image[pos : pos + len(data)] = data
            stream += d1_frame(pos, data)
        subprocess.run(
            [*RECEIVER, "-d", target], input=stream + d1_end(), env=pyploop_env(), check=True
        )
        assert Path(target).read_bytes() == bytes(image) + b"\xa5" * MIB


# ---- refusals, before the first byte


def refused(source: Path | str, target: Path | str, code: int, *words: str) -> str:
    """A local copy and a receiver both refuse the target."""
    said = ""
    for command in (
        ["-s", str(source), "-d", str(target), "--to-device"],
        ["-d", str(target), "--to-device"],
    ):
        done = subprocess.run(
            [*pyploop_cmd(), "copy", *command],
            input="", capture_output=True, text=True, env=pyploop_env(),
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        for word in words:
            assert word in done.stderr
        said = done.stderr
    return said


def test_what_is_no_device_is_refused(folder: Path) -> None:
    source = source_file(folder / "source")
    (folder / "file").write_bytes(b"mine")
    os.mkfifo(folder / "fifo")
    for name in ("file", "fifo", "source"):
        refused(source, folder / name, 38, "is not a block device")
    refused(source, folder / "missing", 1, "No such file or directory")
    assert (folder / "file").read_bytes() == b"mine"
    assert not (folder / "missing").exists()


def test_a_device_needs_the_option_and_is_not_touched_without(folder: Path) -> None:
    source = source_file(folder / "source")
    with device(folder, 32 * MIB) as target:
        got = copy(source, onto(folder, target), via="local")
        assert got.code == 1
        assert tail_is_old(target, 0)


def test_a_mounted_device_and_the_disk_of_a_mounted_partition_are_refused(folder: Path) -> None:
    needs("mkfs.ext4")
    source = source_file(folder / "source")
    with device(folder, 64 * MIB) as target:
        with file_system(target, folder / "mnt"):
            refused(source, target, 1, "is in use", f"is mounted at {folder / 'mnt'} (ext4)")
        with (
            partition(target, 1, MIB, 16 * MIB) as one,
            partition(target, 2, 17 * MIB, 32 * MIB) as two,
            file_system(one, folder / "mnt"),
        ):
            refused(source, target, 1, "is in use", "is mounted at")
            # Its neighbour is free.
            succeeded(copy(source, onto(folder, two), "--to-device", via="local"))
            assert equal(source, two)


def test_swap_a_loop_device_and_a_process_on_it_are_refused(folder: Path) -> None:
    needs("mkswap")
    source = source_file(folder / "source")
    with device(folder, 64 * MIB) as target:
        run("mkswap", "--quiet", target)
        run("swapon", target)
        try:
            refused(source, target, 1, "is swap space in use")
        finally:
            run("swapoff", target)
        with loop_device(target) as above:
            refused(source, target, 1, f"{above} is attached to it")
        fd = os.open(target, os.O_WRONLY)
        try:
            refused(source, target, 1, f"process {os.getpid()} (", "has it open for writing")
        finally:
            os.close(fd)
        fd = os.open(target, os.O_RDONLY | os.O_EXCL)
        try:
            refused(source, target, 1, "is in use")
        finally:
            os.close(fd)
        succeeded(copy(source, onto(folder, target), "--to-device", via="local"))


def test_a_read_only_device_is_refused(folder: Path) -> None:
    source = source_file(folder / "source")
    with device(folder, 32 * MIB, "--read-only") as target:
        refused(source, target, 1, "for writing", "Read-only file system")


@pytest.mark.parametrize("via", ["local", "pipe", "socket"])
def test_a_device_that_is_too_small_is_refused_at_once(folder: Path, via: str) -> None:
    source = source_file(folder / "source")
    with device(folder, 24 * MIB) as target:
        more = ["--to-device"] if via == "local" else []
        got = copy(source, onto(folder, target), *more, via=via, receiver=RECEIVER)
        assert (got.code, got.receiver_code) == (7, None if via == "local" else 7), got.errors
        assert f"has {24 * MIB} bytes, which is too small" in got.errors
        assert tail_is_old(target, 0)


def test_a_peer_that_announces_nothing_cannot_write_past_the_end(folder: Path) -> None:
    source = source_file(folder / "source")
    with device(folder, 24 * MIB) as target:
        got = copy(source, onto(folder, target), via="mute", receiver=RECEIVER)
        assert got.receiver_code == 7
        assert "which is too small for a source of at least" in got.errors
        assert "contains only a part of the copy" in got.errors


def test_the_source_and_what_lies_on_or_below_it_are_refused(folder: Path) -> None:
    needs("mkfs.ext4")
    with device(folder, 64 * MIB) as disk, partition(disk, 1, MIB, 16 * MIB) as part:
        for source, target in ((disk, disk), (part, disk), (disk, part)):
            refused_locally(source, target, "to copy onto it would destroy the source")
        refused_locally(str(folder / "disk"), disk, "to copy onto it would destroy the source")
        with loop_device(disk) as above:
            # That the source has a loop device on it is the other way round.
            refused_locally(disk, above, "to copy onto it would destroy the source")
        assert tail_is_old(disk, 0)


def refused_locally(source: str, target: str, words: str) -> None:
    for _ in range(5):
        done = subprocess.run(
            [*pyploop_cmd(), "copy", "-s", source, "-d", target, "--to-device"],
            capture_output=True, text=True, env=pyploop_env(), check=False,
        )  # fmt: skip
        # Another test's losetup opens the device for a moment, while it searches for a free one.
        if "(losetup) has it open" not in done.stderr:
            break
    assert done.returncode == 38, done.stderr
    assert words in done.stderr


# ---- past the page cache, or through it


@pytest.mark.parametrize(
    ("via", "fstype", "options", "expected"),
    [
        ("local", "ext4", "rw", "O_DIRECT"),
        ("pipe", "ext4", "rw", "O_DIRECT"),
        ("local", "ext4", "rw,data=journal", "buffered (the file system does not take O_DIRECT"),
        ("pipe", "xfs", "rw", "O_DIRECT"),
        ("pipe", "btrfs", "rw,compress=zstd", "buffered (on btrfs"),
        ("local", "tmpfs", "rw", "buffered (tmpfs has no disk)"),
    ],
)
def test_each_file_system_gets_the_same_image_in_its_own_way(
    folder: Path, via: str, fstype: str, options: str, expected: str
) -> None:
    source = source_file(folder / "source")
    with contextlib.ExitStack() as stack:
        point = folder / "there"
        if fstype == "tmpfs":
            stack.enter_context(tmpfs(point, 64 * MIB))
        else:
            needs(f"mkfs.{fstype}")
            sparse_file(folder / "disk", 512 * MIB)
            disk = stack.enter_context(loop_device(folder / "disk"))
            run(f"mkfs.{fstype}", "-q", disk)
            stack.enter_context(mounted(disk, point, options, fstype))
        for write in ("auto", "direct", "buffered"):
            target = point / write
            events = folder / "received"
            receiver = (*pyploop_cmd(), "copy", "--write", write, "--json", str(events))
            more = ["--write", write] if via == "local" else []
            got = copy(source, target, *more, via=via, receiver=receiver)
            succeeded(got)
            assert same(source, target, SIZE)
            found = got.summary
            if via == "pipe":
                assert found["write_mode"] == ""
                found = next(
                    e for e in map(json.loads, events.read_text().splitlines())
                    if e["event"] == "received"
                )  # fmt: skip
            words = str(found["write_mode"])
            if write == "buffered":
                assert (words, found["direct_bytes"]) == ("buffered (--write)", 0)
            elif fstype != "btrfs" or write == "auto":
                assert words.startswith(expected)
                assert bool(found["direct_bytes"]) == (expected == "O_DIRECT")
            if not options.endswith("zstd"):
                assert target.stat().st_blocks * 512 < SIZE - 10 * MIB


def test_an_option_that_has_no_target_here_is_refused(
    folder: Path,
) -> None:
    source = source_file(folder / "source")
    for option in (["--to-device"], ["--write", "direct"]):
        done = subprocess.run(
            [*pyploop_cmd(), "copy", "-s", str(source), *option],
            capture_output=True, text=True, env=pyploop_env(),
            check=False,
        )  # fmt: skip
        assert done.returncode == 38
        assert "-d" in done.stderr
