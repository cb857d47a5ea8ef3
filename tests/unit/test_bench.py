# SPDX-License-Identifier: Apache-2.0
"""`pyploop bench`: its stages, what follows from them, and what it says."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support import run

from pyploop.bench import forecast, report, source, stages
from pyploop.bench import run as running
from pyploop.bench.stages import Stage
from pyploop.diskcopy.freeze_policy import Costs
from pyploop.disks import opening
from pyploop.errors import ConnectError
from pyploop.units import GIB, MIB

PYPLOOP = (sys.executable, "-m", "pyploop.cli.main")


def rate(name: str, *values: float) -> Stage:
    return Stage(name, "bytes/s", values)


# ---- what follows (pure)


def test_a_copy_is_as_fast_as_its_slowest_stage() -> None:
    copy = forecast.expected(
        10 * GIB,
        [rate("read", 2.0 * GIB), rate("ssh", 0.9 * GIB, 1.0 * GIB, 1.1 * GIB), rate("gone")],
        dirty=0.0,
        costs=Costs(),
    )
    assert (copy.limit, copy.rate, copy.seconds) == ("ssh", 1.0 * GIB, 10.0)


def test_the_connections_of_a_copy_take_their_time_once() -> None:
    stages = [rate("ssh", 100.0 * MIB)]
    alone = forecast.expected(GIB, stages, dirty=50.0 * MIB, costs=Costs())
    remote = forecast.expected(GIB, stages, dirty=50.0 * MIB, costs=Costs(), setup=1.5)
    assert alone.seconds is not None and remote.seconds == pytest.approx(alone.seconds + 1.5)
    assert remote.freeze == alone.freeze


def test_what_is_written_meanwhile_is_copied_as_well() -> None:
    copy = forecast.expected(
        GIB, [rate("read", 100.0 * MIB)], dirty=50.0 * MIB, costs=Costs(freeze=0.002)
    )
    # Half of the bandwidth is left for what was there at the beginning.
    assert copy.seconds == pytest.approx(2 * GIB / (100 * MIB))
    assert copy.freeze is not None and copy.rest > 0
    idle = forecast.expected(GIB, [rate("read", 100.0 * MIB)], dirty=0.0, costs=Costs(freeze=0.002))
    assert idle.freeze is not None and idle.freeze < copy.freeze and idle.rest == 0


def test_a_writer_that_is_faster_than_the_copy_has_no_end() -> None:
    copy = forecast.expected(GIB, [rate("read", 10.0 * MIB)], dirty=10.0 * MIB, costs=Costs())
    assert copy.seconds is None and copy.freeze is None
    (_, why) = report.sentences(copy, "/dev/vdb", "b1:/srv", frozen=True)
    assert "would not end by itself" in why


def test_without_a_stage_nothing_is_forecast() -> None:
    copy = forecast.expected(GIB, [rate("read")], dirty=0.0, costs=Costs())
    assert copy.limit == "" and copy.seconds is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "0.1 s"),
        (4.04, "4.0 s"),
        (59.0, "59 s"),
        (200.0, "3 min 20 s"),
        (7500.0, "2 h 5 min"),
    ],
)
def test_a_duration_is_said_as_people_say_it(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


# ---- stages


def test_a_stage_that_ends_early_has_the_samples_until_then() -> None:
    left = [4, 2]
    values = stages.rates(3600.0, lambda: left.pop() if left else 0)
    assert len(values) == 2


def test_a_slow_stage_has_three_samples() -> None:
    calls: list[None] = []

    def work() -> int:
        calls.append(None)
        return 1

    stages.rates(0.0, work)
    assert len(calls) == stages.LEAST


def test_parts_of_a_source_are_its_data_and_no_hole(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as f:
        f.write(b"x" * MIB)
        f.seek(4 * MIB)
        f.write(b"y" * 3 * MIB)
        f.truncate(16 * MIB)
    opened = opening.open_source(str(image))
    try:
        found = list(source.parts(opened, 2 * MIB))
        assert found == [
            [(0, MIB), (4 * MIB, 5 * MIB)],
            [(5 * MIB, 7 * MIB)],
        ]
        assert source.sample(opened) == b"x" * MIB + b"y" * 3 * MIB
    finally:
        opened.close()


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "x", "unit": "parsecs", "values": [], "note": ""},
        {"name": "x", "unit": "s", "values": [-1.0], "note": ""},
        {"name": "x", "unit": "s", "values": ["many"], "note": ""},
        {"name": "x", "unit": "s", "values": [1e300], "note": ""},
        {"name": 3, "unit": "s", "values": [], "note": ""},
        {"unit": "s", "values": [], "note": ""},
    ],
)
def test_what_another_host_measures_must_be_stages(
    tmp_path: Path, entry: dict[str, object]
) -> None:
    ssh = script(tmp_path / "ssh", f"printf %s '{json.dumps({'stages': [entry], 'aes': True})}'\n")
    with pytest.raises(ConnectError, match="something else than figures"):
        running.bench(running.Wanted(folder="/srv", host="b", ssh=(str(ssh),)))


def test_a_host_without_pyploop_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    ssh = script(tmp_path / "ssh", "echo 'sh: pyploop: not found' >&2; exit 127\n")
    told: list[Stage] = []
    with pytest.raises(ConnectError, match=r"127.*pyploop: not found"):
        running.bench(running.Wanted(folder="/srv", host="b", ssh=(str(ssh),)), told.append)
    assert told == []


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# ---- the command


def test_a_copy_of_an_image_into_a_folder_is_measured_and_forecast(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(3 * MIB))
    out = run(*PYPLOOP, "bench", "--seconds", "50ms", image, tmp_path)
    for name in ("read", "zero test", "digest", "read into a pipe", "fdatasync"):
        assert f"\n{name} " in f"\n{out}"
    assert f"A copy of {image} to {tmp_path} is limited by " in out
    assert [p.name for p in tmp_path.iterdir()] == ["image"]


def test_the_object_of_json_has_every_sample(tmp_path: Path) -> None:
    out = run(*PYPLOOP, "bench", "--seconds", "50ms", "--json", "--target", tmp_path)
    found = json.loads(out)
    assert found["schema"] == running.SCHEMA and found["copy"] is None
    for stage in found["stages"]:
        assert stage["low"] <= stage["median"] <= stage["high"]
        assert len(stage["values"]) >= stages.LEAST or stage["note"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["bench"], 38, "nothing to measure"),
        (["bench", "--target", "a", "b"], 38, "--target takes DIR alone"),
        (["bench", "--target", "-x:/srv"], 38, ""),
        (["bench", "--seconds", "1h", "a"], 38, "is not between 50ms and 10m"),
        (["bench", "--target", "/nonexistent"], 1, "cannot make a file in /nonexistent"),
        (["bench", "/nonexistent", "/tmp"], 2, "/nonexistent"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], code: int, said: str) -> None:
    done = subprocess.run([*PYPLOOP, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and "Traceback" not in done.stderr
