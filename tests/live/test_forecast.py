# SPDX-License-Identifier: Apache-2.0
"""Freezes of real copies under load: what was forecast, and what is restored."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MIB, is_frozen, loop_device, needs
from support_live import (
    comparison,
    copy,
    file_system,
    fio,
    sparse_file,
    succeeded,
    work_dir,
)

from pyploop.diskcopy.d1_target import StreamOutput
from pyploop.diskcopy.options import Options
from pyploop.diskcopy.receiver import receive
from pyploop.diskcopy.sender import Sender
from pyploop.disks.opening import open_source
from pyploop.freeze import FileSystems, filesystems
from pyploop.report.events import Reporter
from pyploop.system.jobs import Job
from pyploop.trackers.registry import choose

LOADS = {
    "fsync": ["--rw=randwrite", "--bs=4k", "--size=16m", "--fsync=1", "--rate_iops=300"],
    "buffered": ["--rw=write", "--bs=64k", "--size=48m", "--rate=40m"],
    "hot": ["--rw=write", "--bs=256k", "--size=8m", "--fsync=8"],
}


@pytest.fixture
def place() -> Iterator[tuple[Path, str, Path]]:
    """(folder, device, mount point) of an ext4."""
    needs("loop", "fio", "mkfs.ext4")
    with (
        work_dir() as folder,
        loop_device(sparse_file(folder / "image", 96 * MIB)) as device,
        file_system(device, folder / "mnt") as point,
    ):
        yield folder, device, point


@pytest.mark.parametrize("load", LOADS)
def test_a_copy_under_load_forecasts_its_freeze_and_says_where_it_went(
    load: str, place: tuple[Path, str, Path]
) -> None:
    folder, device, point = place
    with fio(point, load, *LOADS[load]) as writer:
        words = ["-F", f"{writer.stop_command}; sleep 0.1", "--before-thaw", "sleep 0.2"]
        got = copy(device, folder / "target", *words)
    succeeded(got)
    s, steps = got.summary, list(got.summary["frozen"])
    assert s["predicted"] > 0
    began = next(e["time"] for e in got.events if e.get("phase") == "frozen")
    ended = next(e["time"] for e in got.events if e["event"] == "frozen")
    assert steps[0] == "stop command" and s["frozen"]["stop command"] >= 0.1
    assert s["frozen"]["before thaw"] >= 0.2
    until_durable = [s["frozen"][k] for k in steps[: steps.index("target commit") + 1]]
    assert sum(until_durable) <= s["frozen_window"] + 1e-6
    assert s["frozen_window"] <= ended - began - 0.2, "the command before the thaw is no part of it"
    waited = s["frozen"]["target commit"]
    remote = {k: v for k, v in s["frozen_remote"].items() if k != "remote receive"}
    assert set(remote) >= {"way there", "remote write", "remote sync", "remote commit", "way back"}
    assert 0 < sum(remote.values()) <= waited + 1e-6
    assert abs(s["clock_offset"]) <= s["clock_error"] + 1e-6, "one machine has one clock"
    assert s["frozen_bytes"] < 16 * MIB
    assert not is_frozen(point)


def test_a_copy_approaches_its_freeze_again_when_something_took_its_time_meanwhile(
    place: tuple[Path, str, Path],
) -> None:
    folder, device, point = place
    ours, theirs = (s.detach() for s in socket.socketpair())
    target = folder / "target"
    receiving = Job(lambda: receive(str(target), theirs, None, Reporter(), 20)).start()
    out = StreamOutput(
        ours, ours, Reporter(), two_way=True, sync_wait=0, answer_timeout=20, compat="native"
    )
    with contextlib.closing(open_source(device)) as source:
        sender = Sender(source, choose("auto", source), out, Options(stall=20), Reporter())
        with sender:
            sender.first_pass()
            sender.converge()
            rounds = len(sender.summary.rounds)
            for number, step in enumerate([sender.converge, *[sender.prepare_freeze] * 2]):
                with (point / f"file-{number}").open("wb") as file:
                    file.write(bytes([number + 1]) * 3 * MIB)
                    file.flush()
                    os.fsync(file.fileno())  # what is not on the device is no round's
                step()
                # At least one more, which had the file.
                assert sum(r["sent"] for r in sender.summary.rounds[rounds:]) >= 3 * MIB
                rounds = len(sender.summary.rounds)
            with sender.frozen():
                sender.last_blocks()
                sender.finish()
                assert is_frozen(point)
                assert target.read_bytes() == (folder / "image").read_bytes()
    receiving.join(20)
    os.close(ours)
    os.close(theirs)
    assert not is_frozen(point)


def test_rcu_is_expedited_until_the_thaw_and_not_for_others_to_lose(
    place: tuple[Path, str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, device, point = place
    knob = folder / "rcu_expedited"
    knob.write_text("0")
    monkeypatch.setattr(filesystems, "RCU_EXPEDITED", str(knob))
    with contextlib.closing(open_source(device)) as source:
        mounts = FileSystems(source.mounts, Reporter())
        with contextlib.closing(mounts):
            assert mounts.warm_up() > 0
            assert knob.read_text() == "1" and not is_frozen(point)
            mounts.cool_down()
            assert knob.read_text() == "0"
            mounts.warm_up()
            knob.write_text("0")  # another copy has ended
            mounts.freeze()
            assert knob.read_text() == "1" and is_frozen(point)
            mounts.thaw(warm=True)
            assert knob.read_text() == "1" and not is_frozen(point)
            mounts.cool_down()
            assert knob.read_text() == "0" and not is_frozen(point)


def test_a_freeze_that_cannot_fit_is_not_begun(place: tuple[Path, str, Path]) -> None:
    folder, device, point = place
    with fio(point, "fsync", *LOADS["fsync"]) as writer:
        words = ["-F", writer.stop_command, "--max-freeze", "100us", "--deadline", "1s"]
        got = copy(device, folder / "target", *words)
        assert (got.code, writer.running) == (14, True)
    assert "no moment fitted within 1 s" in got.errors
    assert not (folder / "target").exists() and not is_frozen(point)


def test_a_freeze_that_fits_begins_with_a_forecast_below_the_limit(
    place: tuple[Path, str, Path],
) -> None:
    folder, device, point = place
    with fio(point, "buffered", *LOADS["buffered"]) as writer:
        words = ["-F", writer.stop_command, "--max-freeze", "500ms", "--freeze-limit", "60"]
        got = copy(device, folder / "target", *words)
    succeeded(got)
    assert got.summary["predicted"] <= got.summary["max_freeze"] == 0.5


def test_what_is_rewritten_in_every_round_is_left_for_last(
    place: tuple[Path, str, Path],
) -> None:
    folder, device, point = place
    with fio(point, "hot", *LOADS["hot"]) as writer:
        words = ["-F", writer.stop_command, "--max-freeze", "1us"]
        words += ["--deadline", "2s", "--on-deadline", "freeze", "--freeze-limit", "60"]
        words += ["--before-thaw", comparison(folder / "image", folder / "target", 96 * MIB)]
        got = copy(device, folder / "target", *words)
    rounds = [r for r in got.summary["rounds"] if r["left"]]
    assert rounds, "no block was hot"
    assert got.summary["rounds"][-1]["left"] == 0
    succeeded(got)
