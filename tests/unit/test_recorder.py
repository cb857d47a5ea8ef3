# SPDX-License-Identifier: Apache-2.0
"""The flight recorder: clocks, tables, traces; and version 2 of the answers
that feed it, with peers of version 1 on either end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import SUCCESS, d1_end, d1_frame, d1_sync

from pyploop.cli.main import main
from pyploop.diskcopy.d1_target import StreamOutput
from pyploop.diskcopy.receiver import receive
from pyploop.errors import ProtocolError, SyncError
from pyploop.report import timings
from pyploop.report.events import Reporter
from pyploop.report.timeline import Clock, Heard, Recorder, chrome_trace
from pyploop.wire import d1

HELLO, HELLO_REPLY = b"PYP\x01", b"PYPLOOP\x01"
HELLO_2, HELLO_2_REPLY = b"PYP\x02", b"PYPLOOP\x02"
RECORD = struct.Struct("<7Q")


# ---- clocks


def test_the_clock_is_right_to_half_of_the_shortest_round_trip() -> None:
    rng = random.Random(5)
    for offset in (-1234.5, 0.0, 98765.4321):
        clock = Clock()
        now = 100.0
        for _ in range(50):
            there, work, back = (rng.expovariate(200) for _ in range(3))
            arrived = now + there + offset
            clock.exchange(now, arrived, arrived + work, now + there + work + back)
            now += 1
        assert clock.offset is not None and clock.error is not None
        assert abs(clock.offset - offset) <= clock.error + 1e-6
        assert clock.error < 0.005
        assert abs(clock.here(500.0 + offset) - 500.0) <= clock.error + 1e-6


def test_a_long_queue_one_way_does_not_spoil_the_clock() -> None:
    clock = Clock()
    clock.exchange(0.0, 10.0005, 10.0006, 0.0011)
    clock.exchange(1.0, 14.0, 14.1, 4.1005)  # three seconds behind data
    assert clock.offset is not None and abs(clock.offset - 10.0) < 0.001


# ---- spans


def record(recorder: Recorder, *steps: tuple[str, float]) -> None:
    for name, seconds in steps:
        start = recorder.spans[-1].end if recorder.spans else 50.0
        recorder.add(name, start, start + seconds)


def frozen() -> Recorder:
    r = Recorder()
    record(r, ("first pass", 2.0))
    r.stage = "frozen"
    record(r, ("stop command", 0.005), ("source sync", 0.001), ("last blocks", 0.002))
    record(r, ("target commit", 0.02))
    asked = r.spans[-1].start
    at = [int((asked + 7 + s) * 1e9) for s in (-0.001, 0.001, 0.002, 0.015, 0.018, 0.0185)]
    r.remote(Heard(asked, asked + 0.02, d1.Times._make([*at, 4096])))
    record(r, ("last blocks", 0.001), ("thaw", 0.0005))
    return r


def test_the_wait_for_the_target_is_split_into_what_it_did() -> None:
    parts = frozen().frozen_parts()
    assert list(parts) == [
        "stop command", "source sync", "last blocks", "way there", "remote write", "remote sync",
        "remote commit", "way back", "thaw",
    ]  # fmt: skip
    waited = [parts[k] for k in list(parts)[3:8]]
    assert sum(waited) == pytest.approx(0.02)
    assert parts["remote sync"] == pytest.approx(0.013, abs=0.001)
    assert parts["last blocks"] == pytest.approx(0.003)


@pytest.mark.parametrize("first", [1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("arrived", [0, 1, 2**64 - 1])
def test_what_a_target_makes_up_lies_between_our_own_moments(first: int, arrived: int) -> None:
    r = frozen()
    begin, asked = r.spans[0].start, r.spans[-1].end
    r.remote(Heard(asked, asked + 0.02, d1.Times(first=first, arrived=arrived)))
    assert all(begin <= s.start <= s.end <= asked + 0.02 for s in r.spans)


def test_without_a_word_from_the_target_its_part_is_one() -> None:
    r = Recorder()
    r.stage = "frozen"
    record(r, ("freeze", 0.001), ("target commit", 0.5), ("thaw", 0.0))
    assert r.frozen_parts() == pytest.approx({"freeze": 0.001, "target commit": 0.5, "thaw": 0.0})
    assert r.window("target commit") == pytest.approx(0.501)
    assert "target commit, 500.0 of 501.0 ms" in r.advice()


def test_the_largest_part_is_named_with_its_cure() -> None:
    assert "remote sync, 13" in frozen().advice()
    assert "flushes faster" in frozen().advice()
    assert Recorder().advice() == ""


def test_a_trace_has_both_ends_on_one_clock() -> None:
    trace = json.loads(chrome_trace(frozen()))
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert sorted(names.values()) == ["source", "target"]
    spans = {(names[e["pid"]], e["name"]): e for e in events if e["ph"] == "X"}
    there, wait = spans["target", "way there"], spans["source", "target commit"]
    assert wait["ts"] <= there["ts"] <= wait["ts"] + wait["dur"]
    assert spans["source", "stop command"]["cat"] == "frozen"
    assert spans["source", "first pass"]["ts"] == 0
    assert abs(trace["otherData"]["clock_offset"] - 7) <= trace["otherData"]["clock_error"]


def test_the_table_has_the_layout_of_vzmigrate() -> None:
    lines = timings.table([("Stop command", 0.0051)], 1.5, total_name="Total", decimals=4).split(
        "\n"
    )
    assert lines[0] == "          Stop command: 0.0051"
    assert lines[-1] == "                 Total: 1.5000"


# ---- version 2 of the answers


@contextlib.contextmanager
def receiver(target: Path) -> Iterator[tuple[int, int]]:
    """A receiver of ours in a thread: (to it, from it).  It writes through the page cache, so
    that something is left to sync."""
    (in_r, in_w), (back_r, back_w) = os.pipe(), os.pipe()
    thread = threading.Thread(
        target=lambda: receive(str(target), in_r, back_w, Reporter(), 20.0, write="buffered"),
        daemon=True,
    )
    thread.start()
    try:
        yield in_w, back_r
    finally:
        thread.join(20)
        for fd in (in_r, in_w, back_r, back_w):
            os.close(fd)
        assert not thread.is_alive()


def test_a_sender_of_version_1_gets_answers_without_times(tmp_path: Path) -> None:
    with receiver(tmp_path / "image") as (to, back):
        os.write(to, d1_sync(HELLO) + d1_frame(0, b"x" * 512) + d1_sync() + d1_end())
        got = b""
        while len(got) < 24:
            got += os.read(back, 100)
        assert got == HELLO_REPLY + SUCCESS + SUCCESS


def test_a_sender_of_version_2_is_told_when_what_happened(tmp_path: Path) -> None:
    before = time.monotonic_ns()
    with receiver(tmp_path / "image") as (to, back):
        os.write(to, d1_sync(HELLO) + d1_sync(HELLO_2))
        got = b""
        while len(got) < 8 + 8 + 56:
            got += os.read(back, 100)
        assert got[:8] == HELLO_REPLY and got[8:16] == HELLO_2_REPLY
        _, arrived, written, synced, named, answered, dirty = RECORD.unpack(got[16:])
        assert before < arrived <= written <= answered and (synced, named, dirty) == (0, 0, 0)
        os.write(to, d1_frame(8192, b"x" * 4096) + d1_sync() + d1_end())
        got = b""
        while len(got) < 2 * 64:
            got += os.read(back, 200)
        assert got[:8] == got[64:72] == SUCCESS
        first, arrived, written, synced, named, answered, dirty = RECORD.unpack(got[8:64])
        assert 0 < first <= arrived <= written <= synced <= answered and not named
        assert dirty == 4096
        first, arrived, written, synced, named, answered, dirty = RECORD.unpack(got[72:])
        assert first == 0 and arrived <= written <= synced <= named <= answered
        assert dirty == 0, "the SYNC before made it durable"


class Peer:
    """Answers that are there already."""

    def __init__(self, answers: bytes) -> None:
        self.out_r, self.out_w = os.pipe()
        self.back_r, back_w = os.pipe()
        os.write(back_w, answers)
        os.close(back_w)
        self.output = StreamOutput(
            self.out_w, self.back_r, Reporter(), two_way=False, sync_wait=0, answer_timeout=5
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in (self.out_r, self.out_w, self.back_r):
            os.close(fd)


def test_a_receiver_of_version_1_takes_the_question_for_a_sync() -> None:
    with Peer(HELLO_REPLY + SUCCESS + SUCCESS) as peer:
        peer.output.hello()
        assert peer.output.dialect == "D1, pyploop peer"
        assert os.read(peer.out_r, 1000) == d1_sync(HELLO) + d1_sync(HELLO_2)
        peer.output._answer(peer.back_r, "SYNC")
        assert peer.output.heard is None


def test_a_receiver_of_version_2_is_heard() -> None:
    record = RECORD.pack(1, 2, 3, 4, 0, 6, 7)
    with Peer(HELLO_REPLY + HELLO_2_REPLY + RECORD.pack(*[0] * 7) + SUCCESS + record) as peer:
        peer.output.hello()
        peer.output._answer(peer.back_r, "SYNC")
        assert peer.output.heard is not None
        assert peer.output.heard.times == (1, 2, 3, 4, 0, 6, 7)
        assert peer.output.heard.asked <= peer.output.heard.got


def test_another_answer_to_the_question_is_an_error() -> None:
    with Peer(HELLO_REPLY + b"PYPLOOP\x03") as peer, pytest.raises(ProtocolError, match="second"):
        peer.output.hello()
    with Peer(HELLO_REPLY + b"FAILURE\n") as peer, pytest.raises(SyncError):
        peer.output.hello()


# ---- the options


def test_a_copy_tells_where_its_time_went(tmp_path: Path, capfd: Any) -> None:
    source, trace = tmp_path / "source", tmp_path / "trace.json"
    source.write_bytes(os.urandom(1 << 20))
    command = ["copy", "-s", source, "-d", tmp_path / "target", "-F", "true", "-t"]
    assert main([str(w) for w in (*command, "--trace", trace)]) == 0
    out = capfd.readouterr().out
    for row in ("          Stop command: 0.", "                 Total: 0.", "Largest part: "):
        assert row in out
    names = {e["name"] for e in json.loads(trace.read_text())["traceEvents"]}
    assert {"first pass", "stop command", "target commit"} <= names


def test_a_trace_that_cannot_be_written_does_not_spoil_the_copy(tmp_path: Path, capfd: Any) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 9000)
    command = ["copy", "-s", source, "-d", tmp_path / "target", "--trace", tmp_path / "no" / "t"]
    assert main([str(w) for w in command]) == 0
    assert "No such file" in capfd.readouterr().err
    assert (tmp_path / "target").read_bytes() == b"x" * 9000


def test_a_limit_that_cannot_be_kept_aborts_before_anything_is_stopped(
    tmp_path: Path, capfd: Any
) -> None:
    source, stopped = tmp_path / "source", tmp_path / "stopped"
    source.write_bytes(b"x" * 9000)
    base = ["copy", "-s", source, "-F", f"touch {stopped}", "--max-freeze", "1us"]
    base += ["--deadline", "100ms"]
    assert main([str(w) for w in (*base, "-d", tmp_path / "target")]) == 14
    assert "no moment fitted within 0.1 s" in capfd.readouterr().err
    assert not stopped.exists() and not (tmp_path / "target").exists()
    late = [*base, "--on-deadline", "freeze", "--freeze-limit", "60", "-d", tmp_path / "target"]
    assert main([str(w) for w in late]) == 0
    assert stopped.exists()
