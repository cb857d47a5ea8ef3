# SPDX-License-Identifier: Apache-2.0
"""Room: what does not fit is found before the first byte, at both ends, and a copy
ends before it has filled the file system on which its source grows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support import (
    MIB,
    loop_device,
    mounted,
    needs,
    pyploop_cmd,
    pyploop_env,
    run,
    tmpfs,
    wait_until,
)
from support_live import (
    Copied,
    Copy,
    copy,
    file_system,
    random_file,
    sparse_file,
    succeeded,
    work_dir,
)

from pyploop.diskcopy import target_room
from pyploop.errors import WriteError
from pyploop.units import GIB

pytestmark = pytest.mark.root
LIMITED = [
    sys.executable,
    "-c",
    "import os, resource, sys\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
    *pyploop_cmd()[1:],
    "copy",
]
"""pyploop copy, whose files can have 1 MiB."""


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop", "mkfs.ext4")
    with work_dir() as made:
        yield made


def refused(got: Copied, words: str, where: Path, via: str, left: Sequence[str] = ()) -> None:
    """7 at both ends, nothing written."""
    assert got.code == 7, got.errors
    assert got.receiver_code == (7 if via != "local" else None), got.errors
    assert words in got.errors
    assert "Traceback" not in got.errors
    assert sorted(p.name for p in where.iterdir()) == sorted(left)


# ---- what does not fit


@pytest.mark.parametrize("via", ["local", "pipe", "socket"])
def test_data_that_do_not_fit_are_refused_at_once(folder: Path, via: str) -> None:
    random_file(folder / "source", 20 * MIB)
    with tmpfs(folder / "t", 16 * MIB) as there:
        got = copy(folder / "source", there / "target", via=via, json_events=False)
        refused(got, "has room for 16.0 MiB", there, via)
        assert "has 20.0 MiB of data" in got.errors


@pytest.mark.parametrize("via", ["local", "pipe"])
def test_holes_and_what_is_only_preallocated_need_no_room(folder: Path, via: str) -> None:
    source = sparse_file(folder / "source", 2 * GIB)
    run("fallocate", "-l", "100M", source)
    with source.open("r+b") as f:
        f.seek(GIB)
        f.write(os.urandom(2 * MIB))
    with tmpfs(folder / "t", 16 * MIB) as there:
        succeeded(copy(source, there / "target", via=via, json_events=False))
        assert (there / "target").stat().st_size == 2 * GIB


@pytest.mark.parametrize("via", ["local", "pipe"])
def test_without_the_comparison_the_copy_ends_where_it_is_full(folder: Path, via: str) -> None:
    random_file(folder / "source", 20 * MIB)
    with tmpfs(folder / "t", 16 * MIB) as there:
        got = copy(
            folder / "source", there / "target", "--reserve", "0", via=via, json_events=False
        )
        refused(got, "No space left on device", there, via)


@pytest.mark.parametrize("via", ["local", "pipe"])
def test_room_is_looked_for_below_a_loop_device_too(folder: Path, via: str) -> None:
    """A file system of 200 MiB on a sparse file, where 40 MiB are left."""
    random_file(folder / "source", 60 * MIB)
    with (
        tmpfs(folder / "t", 60 * MIB) as below,
        loop_device(sparse_file(below / "file", 200 * MIB)) as device,
        file_system(device, folder / "m") as there,
    ):
        random_file(below / "other", 20 * MIB)
        got = copy(folder / "source", there / "target", via=via, json_events=False)
        refused(got, "has room for", there, via, ["lost+found"])


def test_a_file_in_place_needs_room_for_what_it_does_not_have(folder: Path) -> None:
    random_file(folder / "source", 12 * MIB)
    with tmpfs(folder / "t", 16 * MIB) as there:
        random_file(there / "target", 12 * MIB)
        with (there / "target").open("r+b") as out:
            command = [*pyploop_cmd(), "copy", "-s", str(folder / "source")]
            subprocess.run(command, stdout=out, env=pyploop_env(), check=True)
        assert (there / "target").read_bytes() == (folder / "source").read_bytes()


def test_a_file_in_place_beside_its_source_needs_room_for_what_it_does_not_have(
    folder: Path,
) -> None:
    with tmpfs(folder / "t", 32 * MIB) as there:
        source, target = (random_file(there / name, 12 * MIB) for name in ("source", "target"))
        command = [*pyploop_cmd(), "copy", "-s", str(source)]
        with target.open("r+b") as out:
            subprocess.run(command, stdout=out, env=pyploop_env(), check=True)
        assert target.read_bytes() == source.read_bytes()
        target.write_bytes(b"")
        with target.open("r+b") as out:
            got = subprocess.run(
                [*command, "--reserve", "16M"],
                stdout=out,
                stderr=subprocess.PIPE,
                env=pyploop_env(),
                text=True,
                check=False,
            )
        assert (got.returncode, "nothing was copied. Hint: " in got.stderr) == (7, True), got.stderr
        assert "holds" not in got.stderr and target.read_bytes() == b""


# ---- limits of a file's size


@pytest.mark.parametrize("via", ["local", "pipe", "socket"])
def test_a_limit_of_the_process_is_found_before_the_first_byte(folder: Path, via: str) -> None:
    """Although the data, at the beginning, would go through."""
    source = random_file(folder / "source", MIB // 2)
    os.truncate(source, 3 * MIB)
    (folder / "t").mkdir()
    sender, receiver = (LIMITED, None) if via == "local" else (None, LIMITED)
    target = folder / "t/target"
    got = copy(source, target, via=via, json_events=False, sender=sender, receiver=receiver)
    refused(got, "cannot become 3145728 bytes large, as the source is", folder / "t", via)
    assert "File too large" in got.errors


@pytest.mark.parametrize("via", ["local", "pipe"])
def test_a_limit_of_the_file_system_is_found_before_the_first_byte(folder: Path, via: str) -> None:
    """ext2 with blocks of 1 KiB has no file of 20 GiB."""
    needs("mkfs.ext2")
    with (
        tmpfs(folder / "s", 16 * MIB) as at,
        loop_device(sparse_file(folder / "d", 64 * MIB)) as dev,
    ):
        source = sparse_file(at / "source", 20 * GIB)
        run("mkfs.ext2", "-q", "-b", "1024", dev)
        with mounted(dev, folder / "m") as there:
            got = copy(source, there / "target", via=via, json_events=False)
            refused(got, "File too large", there, via, ["lost+found"])
            # As where a size cannot be tried without writing zeroes (vfat, exfat).
            with (there / "file").open("w+b") as f:
                with pytest.raises(WriteError, match="File too large"):
                    target_room.check_size(f.fileno(), 20 * GIB, "vfat", "file")
                target_room.check_size(f.fileno(), GIB, "vfat", "file")
            (there / "file").unlink()


def test_an_output_in_place_that_cannot_have_the_size_is_left_as_it_was(folder: Path) -> None:
    source = random_file(folder / "source", 3 * MIB)
    (folder / "out").write_bytes(b"mine")
    with (folder / "out").open("r+b") as out:
        command = [*LIMITED, "-s", str(source)]
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, env=pyploop_env(), text=True, check=False
        )
    assert done.returncode == 7, done.stderr
    assert "nothing was copied" in done.stderr
    assert (folder / "out").read_bytes() == b"mine"


# ---- the reserve


def test_the_default_reserve_is_a_part_of_what_is_free() -> None:
    assert target_room.default_reserve(100 * GIB) == 5 * GIB
    assert target_room.default_reserve(10 * GIB) == GIB
    assert target_room.default_reserve(512 * MIB) == 256 * MIB
    assert target_room.default_reserve(0) == 0


@pytest.mark.parametrize("via", ["local", "pipe"])
def test_a_copy_that_would_take_what_its_source_needs_does_not_begin(
    folder: Path, via: str
) -> None:
    with (
        loop_device(sparse_file(folder / "d", 256 * MIB)) as dev,
        file_system(dev, folder / "m") as there,
    ):
        source = random_file(there / "source", 64 * MIB)
        left = ["lost+found", "source"]
        got = copy(source, there / "target", "--reserve", "150M", via=via, json_events=False)
        refused(got, "150.0 MiB are left to the source", there, via, left)
        succeeded(copy(source, there / "target", "--reserve", "20M", via=via, json_events=False))


@pytest.mark.parametrize("via", ["local", "pipe"])
def test_a_copy_ends_before_its_source_has_no_room_to_grow(folder: Path, via: str) -> None:
    """The guest writes to a sparse disk on the file system where the copy grows."""
    with (
        loop_device(sparse_file(folder / "d", 240 * MIB)) as outer,
        file_system(outer, folder / "o") as there,
        loop_device(sparse_file(there / "disk", 512 * MIB)) as disk,
        file_system(disk, folder / "guest") as guest,
    ):
        random_file(guest / "data", 20 * MIB)
        run("sync", "-f", guest)
        options = ("--reserve", "60M", "--bwlimit", "5M")
        with Copy(disk, there / "target", *options, via=via, json_events=False) as running:
            before = os.statvfs(there).f_bfree
            target = lambda: os.statvfs(there).f_bfree < before  # noqa: E731 - it has begun
            wait_until(target, "the copy writes")
            # It grows until less than the reserve is left.
            with (guest / "growing").open("wb") as f:
                while os.statvfs(there).f_bfree * os.statvfs(there).f_frsize > 50 * MIB:
                    f.write(os.urandom(MIB))
                    f.flush()
                    os.fdatasync(f.fileno())
            got = running.wait()
        assert got.code == 7, got.errors
        assert "stopped so that the source keeps 60.0 MiB free to grow" in got.errors
        assert not (there / "target").exists()
        # No I/O error for the guest, then or later.
        (guest / "more").write_bytes(os.urandom(20 * MIB))
        run("sync", "-f", guest)


def test_a_target_elsewhere_has_no_reserve(folder: Path) -> None:
    random_file(folder / "source", 12 * MIB)
    with tmpfs(folder / "t", 16 * MIB) as there:
        succeeded(copy(folder / "source", there / "target", via="local", json_events=False))
