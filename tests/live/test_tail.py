# SPDX-License-Identifier: Apache-2.0
"""Devices whose size is no multiple of their sectors: O_DIRECT cannot read the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MIB, loop_device, needs, pyploop_cmd, pyploop_env, run, telling
from support_live import copy, random_file, succeeded, work_dir

pytestmark = pytest.mark.root

READ = ("--read", "device")


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop")
    with work_dir() as path:
        yield path


def sectors(size: int) -> list[str]:
    return [f"--sector-size={size}"]


def cut(image: Path, size: int) -> Path:
    os.truncate(image, size)
    return image


@pytest.mark.parametrize("via", ["local", "pipe"])
@pytest.mark.parametrize(
    ("sector", "size"),
    telling(
        [
            (4096, 8 * MIB),
            (4096, 8 * MIB + 512),
            (4096, 8 * MIB + 7 * 512),
            (4096, 512),  # less than one sector
            (4096, 4096 + 512),
            (2048, 8 * MIB + 512),
            (65536, 8 * MIB + 512),
            (65536, 8 * MIB + 15 * 4096),
        ],
        *(0, 2, 3, 5, 7),
    ),
)
def test_a_device_with_part_of_a_sector_at_its_end_is_read_to_the_end(
    sector: int, size: int, via: str, folder: Path
) -> None:
    image, target = random_file(folder / "image", 8 * MIB + 65536), folder / "target"
    try:
        device = loop_device(cut(image, size), options=sectors(sector))
        with device as name:
            got = copy(name, target, *READ, via=via)
    except AssertionError as e:
        if sector > 4096 and "losetup" in str(e):
            pytest.skip(f"the kernel has no sectors of {sector} bytes")
        raise
    succeeded(got)
    assert target.read_bytes() == image.read_bytes()
    said = f"the last {size % sector} bytes from the backing file"
    assert (said in got.errors) == bool(size % sector)


def test_a_sizelimit_that_is_no_whole_sector_is_read_to_its_end(folder: Path) -> None:
    image, target = random_file(folder / "image", 4 * MIB), folder / "target"
    options = [*sectors(4096), f"--sizelimit={MIB + 1536}"]
    with loop_device(image, offset=4096, options=options) as device:
        succeeded(copy(device, target, *READ, via="local"))
    assert target.read_bytes() == image.read_bytes()[4096 : 4096 + MIB + 1536]


def test_a_tail_that_nothing_can_read_is_refused_before_the_first_byte(folder: Path) -> None:
    """The backing file has another name now, so it is not used."""
    image, target = random_file(folder / "image", 4 * MIB + 512), folder / "target"
    with loop_device(image, options=sectors(4096)) as device:
        image.rename(folder / "elsewhere")
        image.write_bytes(b"another file")
        try:
            got = copy(device, target, *READ, via="local")
        finally:
            (folder / "elsewhere").rename(image)
        if got.code == 0:  # before Linux 6.11
            assert target.read_bytes() == image.read_bytes()
            return
    assert got.code == 6, got.errors
    assert "the last 512 bytes" in got.errors and "First pass" not in got.errors
    assert not target.exists()


@pytest.mark.parametrize(
    ("options", "size", "grown", "said"),
    [
        ("", MIB + 100, 0, "The last 100 of "),
        ("--offset=1024", MIB + 511, 0, "The last 511 of "),
        ("--sizelimit=1000", MIB, 0, "The last 488 of 1000 bytes"),
        ("", MIB, 8192, "the file has grown"),
        ("", MIB, 0, ""),
        ("--sizelimit=1024", MIB + 100, 0, ""),  # as it was asked for
    ],
)
def test_what_of_a_file_its_loop_device_does_not_show_is_said(
    options: str, size: int, grown: int, said: str, folder: Path
) -> None:
    image, target = random_file(folder / "image", MIB), folder / "target"
    os.truncate(image, size)
    with loop_device(image, options=options.split()) as device:
        os.truncate(image, size + grown)
        shown = int(run("blockdev", "--getsize64", device))
        got = copy(device, target, via="local")
        info = run(*pyploop_cmd(), "info", device, env=pyploop_env())
    succeeded(got)
    assert target.stat().st_size == shown
    for text in (got.errors, info):
        assert text.count("not in the copy") == bool(said)
        assert said in text
