# SPDX-License-Identifier: Apache-2.0
"""D and F: large sparse sources, and sizes that no cluster divides."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MIB, loop_device, needs, telling
from support_live import (
    C_RECEIVER,
    Copied,
    allocated,
    copy,
    note,
    random_file,
    same,
    sparse_file,
    succeeded,
    work_dir,
)

pytestmark = pytest.mark.root

GIB = 1 << 30
DATA = 96 * MIB
MEMORY = 64 * MIB


@pytest.fixture
def folder() -> Iterator[Path]:
    with work_dir() as path:
        yield path


def fill(image: Path, size: int, layout: str) -> Path:
    """DATA bytes in a sparse file, in one piece or in thousands."""
    sparse_file(image, size)
    dice = random.Random(layout)
    with image.open("r+b") as f:
        if layout == "contiguous":
            f.seek(size // 3 // 4096 * 4096)
            for _ in range(DATA // MIB):
                f.write(dice.randbytes(MIB))
            return image
        left = DATA
        while left > 0:
            length = 4096 * dice.randint(1, 16)
            f.seek(dice.randrange((size - length) // 4096) * 4096)
            f.write(dice.randbytes(length))
            left -= length
    return image


def same_data(image: Path, target: Path, size: int) -> bool:
    """Compare by the data of both: what is a hole in both needs no reading."""
    if target.stat().st_size != size:
        return False
    with image.open("rb") as a, target.open("rb") as b:
        for one, other in ((a, b), (b, a)):
            pos = 0
            while pos < size:
                try:
                    start = os.lseek(one.fileno(), pos, os.SEEK_DATA)
                except OSError:
                    break
                pos = os.lseek(one.fileno(), start, os.SEEK_HOLE)
                for at in range(start, pos, MIB):
                    n = min(MIB, pos - at)
                    if os.pread(one.fileno(), n, at) != os.pread(other.fileno(), n, at):
                        return False
    return True


def check_sparse(got: Copied, image: Path, target: Path, size: int, case: str) -> None:
    note(case, got, target)
    succeeded(got)
    assert same_data(image, target, size)
    assert got.summary["wire_bytes"] <= 1.05 * allocated(image)
    assert allocated(target) <= 1.1 * allocated(image)
    assert all(0 < n <= MEMORY for n in got.memory.values()), got.memory


@pytest.mark.parametrize("layout", ["contiguous", "scattered"])
def test_a_sparse_device_of_64_gib_costs_what_its_data_cost(folder: Path, layout: str) -> None:
    needs("loop")
    memory = []
    for size in (GIB, 64 * GIB):
        image, target = fill(folder / "image", size, layout), folder / f"target{size}"
        with loop_device(image) as device:
            got = copy(device, target, "--tracker", "bpf")
        check_sparse(got, image, target, size, f"sparse device {size // GIB} GiB {layout}")
        memory.append(got.memory)
    for side in ("sender", "receiver"):
        assert memory[1][side] <= memory[0][side] + 20 * MIB, memory


@pytest.mark.parametrize("tracker", ["bpf", "scan"])
def test_a_sparse_device_costs_no_more_without_a_way_back(folder: Path, tracker: str) -> None:
    """The peer may be a C ploop, yet holes are left out."""
    needs("loop")
    image, target = fill(folder / "image", 64 * GIB, "scattered"), folder / "target"
    with loop_device(image) as device:
        got = copy(device, target, "--tracker", tracker, "--sync-wait", "0", via="mute")
    check_sparse(got, image, target, 64 * GIB, f"sparse device 64 GiB mute {tracker}")


@pytest.mark.parametrize("layout", ["contiguous", "scattered"])
def test_a_sparse_file_of_64_gib_is_scanned_in_little_memory(folder: Path, layout: str) -> None:
    image, target = fill(folder / "image", 64 * GIB, layout), folder / "target"
    got = copy(image, target, "--tracker", "scan")
    check_sparse(got, image, target, 64 * GIB, f"sparse file 64 GiB {layout}")


def test_a_sparse_device_read_by_the_device_keeps_its_holes(folder: Path) -> None:
    needs("loop")
    image, target = fill(folder / "image", 64 * GIB, "scattered"), folder / "target"
    with loop_device(image) as device:
        got = copy(device, target, "--tracker", "bpf", "--read", "device")
    check_sparse(got, image, target, 64 * GIB, "sparse device 64 GiB --read device")


def test_a_local_copy_of_a_sparse_device_is_sparse(folder: Path) -> None:
    needs("loop")
    image, target = fill(folder / "image", 64 * GIB, "scattered"), folder / "target"
    with loop_device(image) as device:
        got = copy(device, target, "--tracker", "bpf", via="local")
    check_sparse(got, image, target, 64 * GIB, "sparse device 64 GiB local")


ODD = [1, 513, 4097, 8191]
"""Sectors."""


@pytest.mark.parametrize("via", ["pipe", "local"])
@pytest.mark.parametrize("sectors", telling(ODD, 0, 3))
def test_a_device_of_any_number_of_sectors_arrives(folder: Path, sectors: int, via: str) -> None:
    needs("loop")
    size = sectors * 512
    image, target = random_file(folder / "image", size), folder / "target"
    for options in ([], ["--direct-io=on"]):
        for read in ("auto", "device"):
            with loop_device(image, options=options) as device:
                got = copy(
                    device, target, "--tracker", "bpf", "--read", read, "--sync-wait", "0", via=via
                )
            succeeded(got)
            assert same(image, target, size)
            target.unlink()


@pytest.mark.parametrize("via", ["pipe", "mute", "socket", "local"])
@pytest.mark.parametrize("size", telling([0, 1, 4, 4096, 4100, MIB + 4], 0, 2, 5))
def test_a_file_of_any_size_arrives(folder: Path, size: int, via: str) -> None:
    image, target = random_file(folder / "image", size), folder / "target"
    succeeded(copy(image, target, "--tracker", "scan", "--sync-wait", "0", via=via))
    assert target.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("size", [1, 4, 4100, MIB + 4])
def test_a_file_of_zeroes_keeps_its_size(folder: Path, size: int) -> None:
    image = sparse_file(folder / "image", size)
    for via in ("pipe", "mute", "local"):
        target = folder / via
        succeeded(copy(image, target, "--tracker", "scan", "--sync-wait", "0", via=via))
        assert target.read_bytes() == bytes(size)


@pytest.mark.parametrize("size", [MIB + 4, 8196])
def test_an_odd_tail_that_changes_arrives(folder: Path, size: int) -> None:
    """The tail is dirty in the last pass only."""
    image = random_file(folder / "image", size)
    stop = f"printf tail | dd of={image} bs=1 seek={size - 4} conv=notrunc 2>/dev/null"
    for via, receiver in (("pipe", None), ("local", None), ("pipe", C_RECEIVER)):
        if receiver:
            needs("ploop")
        target = folder / f"{via}{receiver is not None}"
        options = ("--tracker", "scan", "-F", stop)
        succeeded(copy(image, target, *options, via=via, receiver=receiver))
        assert target.read_bytes() == image.read_bytes()
        assert target.read_bytes().endswith(b"tail")


@pytest.mark.parametrize("gib", [9, 20])
def test_chunks_that_are_larger_than_a_block_keep_their_data(folder: Path, gib: int) -> None:
    """A hash covers up to 64 KiB: one with a single block of data in it was
    compared and sent as a hole."""
    image, target = sparse_file(folder / "image", gib * GIB), folder / "target"
    dice = random.Random(gib)
    with image.open("r+b") as f:
        for k in range(400):
            f.seek(gib * GIB // 400 * k // 4096 * 4096)
            f.write(dice.randbytes(4096 * dice.randint(1, 3)))
    stop = f"printf last | dd of={image} bs=4k seek=1000001 conv=notrunc 2>/dev/null"
    got = copy(image, target, "--tracker", "scan", "-F", stop)
    check_sparse(got, image, target, gib * GIB, f"chunks {gib} GiB")
