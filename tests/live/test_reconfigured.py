# SPDX-License-Identifier: Apache-2.0
"""A device that shows something else while it is copied: no write event tells."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import MIB, loop_device, needs, run, wait_until
from support_live import Copied, Copy, random_file, work_dir

pytestmark = pytest.mark.root

SIZE = 8 * MIB
LOOP_SET_STATUS64, LOOP_GET_STATUS64, LOOP_CHANGE_FD = 0x4C04, 0x4C05, 0x4C06
INFO = struct.Struct("=QQQQQIIII64s64s32s2Q")
"""struct loop_info64."""


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop")
    with work_dir() as path:
        yield path


def copied_while(device: str, target: Path, act: Callable[[], None]) -> Copied:
    """A copy that is so slow that `act` comes during its first pass."""
    with Copy(device, target, "--bwlimit", "8M", via="local") as copying:
        wait_until(lambda: copying.in_phase("first pass"), "the first pass has begun")
        act()
        return copying.wait(60)


def failed_without_a_target(got: Copied, target: Path, *words: str) -> None:
    assert got.code == 6, got.errors
    assert all(word in got.errors for word in words), got.errors
    assert not target.exists()


def change_file(device: str, other: Path | str) -> None:
    fd, file = os.open(device, os.O_RDONLY), os.open(other, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, LOOP_CHANGE_FD, file)
    finally:
        os.close(fd)
        os.close(file)


def test_a_loop_device_that_gets_another_file_during_the_copy_fails_it(folder: Path) -> None:
    image, other = random_file(folder / "a", SIZE), random_file(folder / "b", SIZE)
    with loop_device(image, options=["--read-only"]) as device:
        got = copied_while(device, folder / "target", lambda: change_file(device, other))
    failed_without_a_target(got, folder / "target", device, "another file", "start the copy again")


def test_a_loop_device_on_a_loop_device_that_gets_another_one_during_the_copy_fails_it(
    folder: Path,
) -> None:
    image, other = random_file(folder / "a", SIZE), random_file(folder / "b", SIZE)
    with (
        loop_device(image) as below,
        loop_device(other) as beside,
        loop_device(Path(below), options=["--read-only"]) as device,
    ):
        got = copied_while(device, folder / "target", lambda: change_file(device, beside))
    failed_without_a_target(got, folder / "target", device, "another", "start the copy again")


def test_a_loop_device_that_gets_another_offset_during_the_copy_fails_it(folder: Path) -> None:
    image = random_file(folder / "image", SIZE + MIB)
    with loop_device(image, options=[f"--sizelimit={SIZE}"]) as device:

        def shift() -> None:
            fd = os.open(device, os.O_RDONLY)
            try:
                info = list(INFO.unpack(fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(INFO.size))))
                info[3] = MIB  # lo_offset; the size stays as it is
                fcntl.ioctl(fd, LOOP_SET_STATUS64, INFO.pack(*info))
            finally:
                os.close(fd)

        got = copied_while(device, folder / "target", shift)
    failed_without_a_target(got, folder / "target", device, "another part", "start the copy again")


def test_a_device_that_is_resized_during_the_copy_fails_it(folder: Path) -> None:
    image = random_file(folder / "image", SIZE)
    with loop_device(image) as device:

        def grow() -> None:
            os.truncate(image, SIZE + MIB)
            run("losetup", "--set-capacity", device)

        got = copied_while(device, folder / "target", grow)
    failed_without_a_target(got, folder / "target", device, str(SIZE + MIB))


def test_a_loop_device_that_is_detached_during_the_copy_stays_until_its_end(folder: Path) -> None:
    """The kernel detaches an open loop device with its last user, so it cannot
    be attached to another file before the copy has ended."""
    image = random_file(folder / "image", SIZE)
    name = run("losetup", "--find", "--show", image).strip()

    def detach() -> None:
        run("losetup", "--detach", name)

    try:
        got = copied_while(name, folder / "target", detach)
        assert got.code == 0, got.errors
        assert (folder / "target").read_bytes() == image.read_bytes()
        wait_until(lambda: not run("losetup", "--associated", image), "detached")
    finally:
        if run("losetup", "--associated", image):
            detach()
