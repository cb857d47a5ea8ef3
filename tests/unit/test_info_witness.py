# SPDX-License-Identifier: Apache-2.0
"""`pyploop info`, as a process, beside what others say of the same thing:
`qemu-img info` and `map` of a parallels image, `losetup` and `blockdev` of a raw one."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import support
from support import MIB

KIB = 1024


def info(path: object) -> subprocess.CompletedProcess[str]:
    command = [*support.pyploop_cmd(), "info", "--json", str(path)]
    return subprocess.run(
        command, capture_output=True, text=True, env=support.pyploop_env(), timeout=60, check=False
    )


def report_of(path: object) -> dict[str, Any]:
    done = info(path)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def qemu(*command: object) -> Any:
    support.needs("qemu-img")
    return json.loads(support.run("qemu-img", *command) or "null")


def parallels(folder: Path, size: int, cluster: int, share: float) -> Path:
    """An image made by qemu-img, with so many of its clusters full."""
    raw, image = folder / "raw", folder / "image.hds"
    dice = random.Random(size)
    with raw.open("wb") as f:
        f.truncate(size)
        for at in range(0, size, cluster):
            if dice.random() < share:
                f.seek(at)
                f.write(dice.randbytes(min(512, size - at)))
    qemu("convert", "-O", "parallels", "-o", f"cluster_size={cluster}", raw, image)
    return image


@pytest.mark.parametrize(("size", "cluster", "share"), [
    (4 * MIB, 64 * KIB, 0.0),
    (4 * MIB, 64 * KIB, 0.3),
    (4 * MIB, 64 * KIB, 1.0),
    (64 * MIB, MIB, 0.5),
    (64 * MIB + 512, MIB, 1.0),
    (20000256, 4 * KIB, 0.1),
    (20000256, 1000 * KIB, 0.6),
    (512, MIB, 1.0),
    (1 << 40, MIB - 4 * KIB, 0.0),
])  # fmt: skip
def test_info_says_what_qemu_img_says(
    tmp_path: Path, size: int, cluster: int, share: float
) -> None:
    image = tmp_path / "image.hds"
    if share:
        image = parallels(tmp_path, size, cluster, share)
    else:
        options = f"cluster_size={cluster}"
        support.needs("qemu-img")
        support.run("qemu-img", "create", "-q", "-f", "parallels", "-o", options, image, size)
    mine, theirs = report_of(image), qemu("info", "--output=json", image)
    assert (mine["format"], theirs["format"]) == ("ploop1", "parallels")
    assert mine["size"] == theirs["virtual-size"]
    assert mine["in_use"] is theirs.get("dirty-flag", False) is False
    assert mine["cluster"] == cluster == theirs.get("cluster-size", cluster)
    assert mine["file_size"] == os.stat(image).st_size
    taken: set[int] = set()
    if size < 1 << 40:  # qemu-img 7.2 fails an assertion on larger ones
        for extent in qemu("map", "--output=json", "-f", "parallels", image):
            if extent["data"]:
                start, end = extent["start"], extent["start"] + extent["length"]
                taken.update(range(start // cluster, -(-end // cluster)))
    assert mine["allocated"] == len(taken) * cluster
    assert len(mine["notes"]) == (cluster & (cluster - 1) != 0)  # not a power of two


@pytest.mark.root
@pytest.mark.parametrize("options", [
    [], ["--offset=1048576"], ["--offset=4096", "--sizelimit=2097152"], ["--read-only"],
    ["--direct-io=on"], ["--sector-size=4096"],
], ids=" ".join)  # fmt: skip
def test_info_says_what_losetup_says(tmp_path: Path, options: Sequence[str]) -> None:
    support.needs("loop", "blockdev")
    image = tmp_path / "raw"
    image.write_bytes(os.urandom(MIB) + bytes(7 * MIB))
    with support.loop_device(image, options=options) as device:
        columns = "BACK-FILE,OFFSET,SIZELIMIT,DIO,RO"
        text = support.run("losetup", "--json", "-O", columns, device)
        (theirs,) = json.loads(text)["loopdevices"]
        shown = int(support.run("blockdev", "--getsize64", device))
        mine = report_of(device)
        assert (mine["kind"], mine["format"], mine["size"]) == ("device", "raw", shown)
        limit = int(theirs["sizelimit"]) or 8 * MIB - int(theirs["offset"])
        assert mine["size"] == limit
        found = mine["device"]
        assert found["path"] == device and found["backing_file"] == theirs["back-file"]
        assert ("O_DIRECT" in found["io_mode"]) == theirs["dio"]
        assert mine["data"] == limit  # zeroes that were written are no hole


V2 = b"WithouFreSpacExt"


def damaged(offset: int, value: bytes, length: int = 16 * 4096) -> bytes:
    """A good image of ten clusters of 4 KiB, three of them there, then not good."""
    data = bytearray(length)
    header = struct.pack("<16sIIIIIQIIIQ", V2, 2, 16, 1, 8, 10, 80, 0, 8, 0, 0)
    data[: len(header)] = header
    struct.pack_into("<10I", data, 64, 1, 0, 0, 15, 0, 8, 0, 0, 0, 0)
    data[offset : offset + len(value)] = value
    return bytes(data)


U32 = struct.Struct("<I")
DAMAGE = {
    "a type without a BAT": (damaged(16, U32.pack(3)), "offset 16"),
    "no cluster": (damaged(28, U32.pack(0)), "offset 28"),
    "more BAT than disk": (damaged(32, U32.pack(11)), "offset 32"),
    "more disk than BAT": (damaged(36, U32.pack(81)), "offset 32"),
    "a disk of 2^64 sectors": (damaged(36, b"\xff" * 8), "offset 36"),
    "a first block in the BAT": (damaged(48, U32.pack(0)), "offset 48"),
    "a first block past the end": (damaged(48, U32.pack(1 << 30)), "offset 48"),
    "an entry past the end": (damaged(64 + 8, U32.pack(16)), "offset 72"),
    "an entry of 2^32 - 1": (damaged(64 + 36, b"\xff" * 4), "offset 100"),
    "an entry before the first block": (damaged(48, U32.pack(16)), "offset 64"),
    "a cluster named twice": (damaged(64 + 16, U32.pack(15)), "used twice"),
    "a file cut in its last cluster": (damaged(0, b"", 16 * 4096 - 1), "past the end"),
    "a file cut in its BAT": (damaged(0, b"", 16 * 4096)[:80], "past the end"),
    "a file cut in its header": (damaged(0, b"", 16 * 4096)[:40], "ends in the header"),
    "an extension past 2^32 clusters": (
        damaged(44, struct.pack("<IIIQ", 0x312E3276, 8, 0, 8 << 33)), "offset 56"
    ),
    "an empty file": (b"", "empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_one_line_with_its_offset_and_exit_11(tmp_path: Path, name: str) -> None:
    data, what = DAMAGE[name]
    path = tmp_path / "image"
    path.write_bytes(data)
    done = info(path)
    assert (done.returncode, done.stdout) == (11, ""), done.stderr
    assert done.stderr.count("\n") == 1 and what in done.stderr and str(path) in done.stderr


def test_the_undamaged_image_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(damaged(0, b""))
    assert report_of(path)["allocated"] == 3 * 4096
