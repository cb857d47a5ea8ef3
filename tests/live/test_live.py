# SPDX-License-Identifier: Apache-2.0
"""A: copies of devices that are being written, each compared with the frozen
source byte by byte.  PYPLOOP_REPEAT and PYPLOOP_LIVE_MIB make a stress run of
them."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import MIB, loop_device, needs, partition, run, telling
from support_live import (
    LIVE_SIZE,
    REPEAT,
    Copied,
    comparison,
    copy,
    file_system,
    fio,
    note,
    random_file,
    same,
    sparse_file,
    succeeded,
    work_dir,
)

pytestmark = pytest.mark.root

WRITES = ["--rw=randwrite", "--bsrange=4k-256k", "--fsync=16", "--ioengine=psync"]
RAW = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--ioengine=libaio", "--direct=1"]
BPF = ("--tracker", "bpf", "--proof", "always")
both_ways = pytest.mark.parametrize("via", ["pipe", "local"])


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop", "fio", "mkfs.ext4")
    with work_dir() as path:
        yield path


def repeat(case: str, folder: Path, once: Callable[[Path], Copied]) -> None:
    """Copy REPEAT times; every one must be identical."""
    for number in range(REPEAT):
        target = folder / f"target{number}"
        got = once(target)
        note(case, got, target)
        succeeded(got)
        assert got.summary["completeness"] in ("complete", "unknown"), got.summary
        target.unlink()


def proven(got: Copied) -> Copied:
    if got.code == 0:
        assert got.summary["completeness"] == "complete", got.summary
        # What was sent is what is there, although pages change on their way into the pipe.
        assert (got.summary["resent_bytes"], len(got.summary["root"])) == (0, 32), got.summary
    return got


def written(got: Copied) -> Copied:
    """The writer really wrote during the copy."""
    if got.code == 0:
        rounds = [e for e in got.events if e["event"] == "round" and e["number"]]
        assert sum(e["sent"] for e in rounds) + got.summary["frozen_bytes"] > 0
    return got


def live_file_system(
    folder: Path,
    via: str,
    *,
    case: str,
    fstype: str = "ext4",
    offset: int = 0,
    sizelimit: int = 0,
    direct: bool = False,
) -> None:
    size = max(LIVE_SIZE, 320 * MIB) if fstype == "xfs" else LIVE_SIZE
    image = sparse_file(folder / "image", offset + size + (7 * MIB if sizelimit else 0))
    options = [f"--sizelimit={size}"] if sizelimit else []
    options += ["--direct-io=on"] if direct else []
    with (
        loop_device(image, offset=offset, options=options) as device,
        file_system(device, folder / "mnt", fstype) as point,
        fio(point, "w", *WRITES, f"--size={size // 4}", "--numjobs=2"),
    ):

        def once(target: Path) -> Copied:
            check = comparison(image, target, size, offset=offset, direct=direct)
            return written(proven(copy(device, target, *BPF, "--before-thaw", check, via=via)))

        repeat(f"{case} {via}", folder, once)


@both_ways
@pytest.mark.invariant(number=1)
def test_ext4_under_random_writes_arrives_as_it_was_frozen(folder: Path, via: str) -> None:
    live_file_system(folder, via, case="ext4")


@both_ways
def test_ext4_on_a_direct_io_loop_arrives_as_it_was_frozen(folder: Path, via: str) -> None:
    live_file_system(folder, via, case="ext4 dio", direct=True)


@pytest.mark.parametrize("via", telling(["pipe", "local"], 0))
def test_xfs_under_random_writes_arrives_as_it_was_frozen(folder: Path, via: str) -> None:
    needs("mkfs.xfs")
    live_file_system(folder, via, case="xfs", fstype="xfs")


@both_ways
def test_the_middle_of_a_file_arrives_as_it_was_frozen(folder: Path, via: str) -> None:
    live_file_system(
        folder, via, case="offset+sizelimit", offset=4096 * 257 + 512, sizelimit=LIVE_SIZE
    )


DEEP = [("pipe", "auto"), ("pipe", "device"), ("local", "auto"), ("local", "device")]


@pytest.mark.parametrize(("via", "read"), telling(DEEP, 1, 2))
@pytest.mark.invariant(number=1)
def test_a_raw_device_under_deep_queues_arrives_as_it_was_stopped(
    folder: Path, via: str, read: str
) -> None:
    image = random_file(folder / "image", LIVE_SIZE)
    with loop_device(image, options=["--direct-io=on"]) as device:

        def once(target: Path) -> Copied:
            with fio(folder, target.name, *RAW, f"--filename={device}") as writer:
                check = comparison(image, target, LIVE_SIZE, direct=True)
                options = (*BPF, "--read", read, "-F", writer.stop_command, "--before-thaw", check)
                got = written(proven(copy(device, target, *options, via=via)))
                assert not writer.running
            return got

        repeat(f"raw {read} {via}", folder, once)


@both_ways
def test_what_was_written_through_the_page_cache_of_a_raw_device_arrives(
    folder: Path, via: str
) -> None:
    image = random_file(folder / "image", 32 * MIB)
    with loop_device(image) as device:

        def once(target: Path) -> Copied:
            options = ["--rw=randwrite", "--bs=8k", "--ioengine=psync", "--rate_iops=2000"]
            with fio(folder, target.name, *options, f"--filename={device}") as writer:
                got = copy(device, target, *BPF, "-F", writer.stop_command, via=via)
            run("blockdev", "--flushbufs", device)
            assert got.code or same(device, target, 32 * MIB, direct=True), (
                "dirty pages were missed"
            )
            return got

        repeat(f"raw buffered {via}", folder, once)


@both_ways
def test_a_partition_arrives_as_it_was_frozen(folder: Path, via: str) -> None:
    start, size = 3 * MIB + 512 * 35, LIVE_SIZE
    image = sparse_file(folder / "image", start + size + 5 * MIB)
    with (
        loop_device(image, options=["--partscan"]) as device,
        partition(device, 1, start, size) as part,
        file_system(part, folder / "mnt") as point,
        fio(point, "w", *WRITES, f"--size={size // 4}", "--numjobs=2"),
    ):

        def once(target: Path) -> Copied:
            check = comparison(image, target, size, offset=start)
            options = (*BPF, "--before-thaw", check)
            return written(proven(copy(part, target, *options, via=via)))

        repeat(f"partition {via}", folder, once)


def test_a_whole_disk_arrives_with_both_of_its_mounted_partitions_frozen(folder: Path) -> None:
    half, size = LIVE_SIZE // 2, LIVE_SIZE + 8 * MIB
    image = sparse_file(folder / "image", size)
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(loop_device(image, options=["--partscan"]))
        points = []
        for number in (1, 2):
            point, start = folder / f"mnt{number}", MIB + (number - 1) * half
            part = stack.enter_context(partition(device, number, start, half))
            points.append(stack.enter_context(file_system(part, point)))
        for point in points:
            stack.enter_context(fio(point, "w", *WRITES, f"--size={half // 2}"))

        def once(target: Path) -> Copied:
            # A second freeze is refused where the first holds.
            held = "".join(f"! fsfreeze -f {p} 2>/dev/null && " for p in points)
            check = held + comparison(image, target, size)
            got = copy(device, target, *BPF, "--before-thaw", check)
            return written(proven(got))

        repeat("whole disk", folder, once)


@both_ways
def test_trimmed_blocks_arrive_as_zeroes(folder: Path, via: str) -> None:
    size = LIVE_SIZE
    image = sparse_file(folder / "image", size)
    with (
        loop_device(image) as device,
        file_system(device, folder / "mnt") as point,
        fio(point, "w", *WRITES, f"--size={size // 4}"),
    ):
        over = threading.Event()
        stop, held = folder / "stop", folder / "held"

        def churn() -> None:
            while not over.is_set():
                (point / "junk").write_bytes(os.urandom(size // 8))
                os.sync()
                (point / "junk").unlink()
                run("fstrim", point, check=False)
                while stop.exists() and not over.is_set():
                    held.touch()
                    time.sleep(0.01)

        thread = threading.Thread(target=churn)
        thread.start()
        try:

            def once(target: Path) -> Copied:
                # A trim that has begun goes on while the file system is frozen.
                wait = f"touch {stop}; while [ ! -e {held} ]; do sleep 0.01; done"
                words = (*BPF, "-F", wait, "--undo", f"rm -f {stop} {held}")
                check = comparison(image, target, size)
                return written(
                    proven(copy(device, target, *words, "--before-thaw", check, via=via))
                )

            repeat(f"fstrim {via}", folder, once)
        finally:
            over.set()
            thread.join()


@both_ways
def test_discards_and_writes_of_a_raw_device_arrive(folder: Path, via: str) -> None:
    needs("blkdiscard")
    size = LIVE_SIZE
    image = random_file(folder / "image", size)
    with loop_device(image) as device:

        def once(target: Path) -> Copied:
            stop, held = folder / f"{target.name}.stop", folder / f"{target.name}.held"

            def churn() -> None:
                dice = random.Random(target.name)
                while not stop.exists():
                    at = dice.randrange(size // 4096) * 4096
                    length = min(dice.choice([4096, 65536, 4 * MIB]), size - at)
                    if dice.random() < 0.5:
                        run("blkdiscard", "-f", "-o", at, "-l", length, device)
                    else:
                        run(
                            "dd",
                            "if=/dev/urandom",
                            f"of={device}",
                            "bs=4096",
                            "oflag=direct",
                            f"seek={at // 4096}",
                            f"count={min(length // 4096, 64)}",
                            "conv=notrunc",
                        )
                held.touch()

            thread = threading.Thread(target=churn)
            thread.start()
            try:
                wait = f"touch {stop}; while [ ! -e {held} ]; do sleep 0.01; done"
                check = comparison(device, target, size, direct=True)
                options = (*BPF, "-F", wait, "--before-thaw", check)
                return proven(copy(device, target, *options, via=via))
            finally:
                stop.touch()
                thread.join()

        repeat(f"blkdiscard {via}", folder, once)


@contextlib.contextmanager
def zram(size: int) -> Iterator[str]:
    """A zram device of our own."""
    hot_add = Path("/sys/class/zram-control/hot_add")
    if not hot_add.exists():
        needs("zram")
    number = hot_add.read_text().strip()
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        yield f"/dev/zram{number}"
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                Path(f"/sys/block/zram{number}/reset").write_text("1")
                Path("/sys/class/zram-control/hot_remove").write_text(number)
                break
            time.sleep(0.1)


@both_ways
def test_zram_arrives_as_it_was_frozen(folder: Path, via: str) -> None:
    size = min(LIVE_SIZE, 256 * MIB)
    with (
        zram(size) as device,
        file_system(device, folder / "mnt") as point,
        fio(point, "w", *WRITES, f"--size={size // 4}"),
    ):

        def once(target: Path) -> Copied:
            check = comparison(device, target, size, direct=True)
            return written(proven(copy(device, target, *BPF, "--before-thaw", check, via=via)))

        repeat(f"zram {via}", folder, once)


@both_ways
def test_a_plain_file_arrives_as_it_was_stopped(folder: Path, via: str) -> None:
    size = LIVE_SIZE
    image = random_file(folder / "image", size)

    def once(target: Path) -> Copied:
        options = ["--rw=randwrite", "--bsrange=512-64k", "--ioengine=psync", f"--filename={image}"]
        with fio(folder, target.name, *options, f"--size={size}", "--rate_iops=3000") as writer:
            check = comparison(image, target, size)
            how = ("--tracker", "scan", "-F", writer.stop_command, "--before-thaw", check)
            return copy(image, target, *how, via=via)

    repeat(f"plain file {via}", folder, once)


def test_a_hole_between_unaligned_data_is_no_reason_to_send_zeroes(folder: Path) -> None:
    """Holes of the backing file end within blocks of the source; a block with a
    byte of data was overwritten with zeroes."""
    size = 8 * MIB
    for offset in (512, 1024, 3584, 4096 + 1536):
        image, target = sparse_file(folder / "image", size + 64 * 1024), folder / f"t{offset}"
        with image.open("r+b") as f:
            for at in range(0, size, 3 * 65536):
                f.seek(at)
                f.write(os.urandom(4096))
        for options in ([], ["--direct-io=on"]):
            with loop_device(image, offset=offset, options=[f"--sizelimit={size}", *options]) as d:
                succeeded(copy(d, target, *BPF))
            assert same(image, target, size, offset=offset)
            target.unlink()
        with loop_device(image, offset=offset, options=[f"--sizelimit={size}"]) as d:
            succeeded(copy(d, target, "--tracker", "scan"))
        assert same(image, target, size, offset=offset)
