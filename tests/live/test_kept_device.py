# SPDX-License-Identifier: Apache-2.0
"""Going on from a kept file while the device is written."""

from __future__ import annotations

import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fakeploop
import support
from going_on import go_on

MIB = 1 << 20
SIZE = 8 * MIB
WRITTEN = (4096, 3 * MIB, SIZE - 65536)
"""Where nothing differs: before, between and after what the first pass sends."""


def test_the_ploop_driver_marks_what_is_written_where_the_first_pass_sends_nothing(
    tmp_path: Path,
    build_cache: Path,
) -> None:
    """It marks only what lies before the position that it was told: that must be the
    end (tests/fakeploop)."""
    support.needs("root", "loop", "gcc")
    library = fakeploop.build(build_cache)
    image, held = tmp_path / "image", tmp_path / "held"
    data = bytearray(random.Random(2).randbytes(SIZE))
    image.write_bytes(data)
    for differs in (MIB, 5 * MIB):
        data[differs] ^= 1
    held.write_bytes(data)
    # What is mounted must not be frozen with the target's file system.
    with support.loop_device(image) as loop, support.tmpfs(tmp_path / "mount", MIB):
        env = fakeploop.env(
            library,
            loop,
            tmp_path,
            mount=tmp_path / "mount",
            track="bpf",
            extra=support.pyploop_env({"LOOP": loop}),
        )
        script = Path(__file__).parents[1] / "going_on.py"
        writes = [f"{at}:8192:7" for at in WRITTEN]
        said = support.run(sys.executable, script, fakeploop.DEVICE, held, *writes, env=env).split()
    assert said[0] == "ploop"
    assert int(said[1]) > 6 * MIB
    assert (tmp_path / "finished").read_bytes() == image.read_bytes()
    for at in WRITTEN:
        assert image.read_bytes()[at : at + 8192] == bytes([7]) * 8192


@contextmanager
def written(device: str, seed: int) -> Iterator[Callable[[], None]]:
    """Blocks of the device are written, random ones and zeroes, until it is called."""
    over = threading.Event()

    def body() -> None:
        rng = random.Random(seed)
        fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
        with mmap.mmap(-1, 64 << 10) as page:
            while not over.is_set():
                length = rng.choice([4096, 8192, 64 << 10])
                page[:length] = rng.choice([bytes(length), rng.randbytes(length)])
                os.pwrite(fd, memoryview(page)[:length], rng.randrange(SIZE // length) * length)
                time.sleep(0.0005)
        os.close(fd)

    def stop() -> None:
        over.set()
        thread.join()

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield stop
    finally:
        stop()


def test_a_device_that_is_written_all_the_while_arrives_as_it_is(tmp_path: Path) -> None:
    support.needs("root", "loop")
    rng = random.Random(12)
    for turn in range(int(os.environ.get("PYPLOOP_REPEAT", "3"))):
        image, held = tmp_path / "image", tmp_path / "held"
        data = rng.randbytes(SIZE // 2) + bytes(SIZE // 4) + rng.randbytes(SIZE // 4)
        image.write_bytes(data)
        held.write_bytes(data[: rng.choice([SIZE, SIZE // 3])])
        with support.loop_device(image) as loop, written(loop, turn) as stop:
            copied = go_on(Path(loop), held, lambda: time.sleep(0.05), f"done{turn}", stop)
        assert copied.target == image.read_bytes()
        assert copied.summary.tracker == "bpf"
        assert 0 < copied.found.same < copied.found.kept
