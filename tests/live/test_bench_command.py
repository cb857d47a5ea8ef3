# SPDX-License-Identifier: Apache-2.0
"""`pyploop bench` of a mounted device, to a folder of a host that ssh reaches."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from support import MIB, is_frozen, loop_device, mounted, needs, run
from support_ssh import ssh_here

from pyploop.bench import freezes, line, source, target
from pyploop.bench.stages import LEAST

pytestmark = pytest.mark.root

PYPLOOP = f"{sys.executable} -m pyploop.cli.main"


def test_a_device_and_the_way_to_a_host_are_measured_and_nothing_stays(tmp_path: Path) -> None:
    needs("root", "mkfs.ext4")
    image, there = tmp_path / "image", tmp_path / "there"
    there.mkdir()
    image.touch()
    os.truncate(image, 64 * MIB)
    run("mkfs.ext4", "-q", "-F", image)
    with (
        ssh_here(tmp_path / "ssh") as ssh,
        loop_device(image) as device,
        mounted(device, tmp_path / "mnt") as point,
    ):
        (point / "data").write_bytes(os.urandom(16 * MIB))
        words = [*PYPLOOP.split(), "bench", "--seconds", "100ms", "--freeze", "--json"]
        words += ["--ssh", " ".join(ssh[1:-1]), "--remote-pyploop", PYPLOOP]
        out = run(*words, device, f"{ssh[-1]}:{there}")
        assert not is_frozen(point)
    found = json.loads(out)
    stages = {s["name"]: s for s in found["stages"]}
    for name in (
        source.READ,
        source.COMPRESS,
        line.PIPE,
        line.CONNECT,
        line.ROUND_TRIP,
        freezes.WRITTEN,
    ):
        assert stages[name]["values"], stages[name]
    for name in (freezes.COLD, freezes.WARM):
        assert len(stages[name]["values"]) == LEAST
    assert stages[line.lanes_name(1)]["values"]
    assert stages[target.SYNC]["values"]
    copy = found["copy"]
    assert copy["limit"].removesuffix(", compressed") in stages
    assert copy["data"] >= 16 * MIB and copy["seconds"] > 0 and copy["freeze"] > 0
    assert copy["seconds"] > min(stages[line.CONNECT]["values"])
    assert list(there.iterdir()) == []
