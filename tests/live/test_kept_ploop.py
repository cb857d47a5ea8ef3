# SPDX-License-Identifier: Apache-2.0
"""Going on from a kept file while the ploop driver tracks: it marks only what lies
before the position that it was told, so that must be the end (tests/fakeploop)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import fakeploop
import support

MIB = 1 << 20
SIZE = 8 * MIB


WRITTEN = (4096, 3 * MIB, SIZE - 65536)
"""Where nothing differs: before, between and after what the first pass sends."""


def test_what_is_written_where_the_first_pass_sends_nothing_is_sent_later(tmp_path: Path) -> None:
    support.needs("root", "loop", "gcc")
    library = fakeploop.build(tmp_path)
    image, held = tmp_path / "image", tmp_path / "held"
    data = bytearray(random.Random(2).randbytes(SIZE))
    image.write_bytes(data)
    for differs in (MIB, 5 * MIB):
        data[differs] ^= 1
    held.write_bytes(data)
    (tmp_path / "mount").mkdir()
    with support.loop_device(image) as loop:
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
