# SPDX-License-Identifier: Apache-2.0
"""Copies over several streams: how many, that all arrives, and what is said about them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import d1_sync

from pyploop import _core
from pyploop._core import PumpLane
from pyploop.diskcopy import lanes as lanes_module
from pyploop.diskcopy.d1_target import StreamOutput
from pyploop.diskcopy.lane_policy import AGAIN, MOST, SOONEST, WINDOW, LanePolicy
from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.options import Options, Summary
from pyploop.diskcopy.receiver import Received, receive
from pyploop.diskcopy.sender import Sender
from pyploop.disks import opening
from pyploop.errors import ParameterError, ProtocolError
from pyploop.report.events import Reporter
from pyploop.system.jobs import Job
from pyploop.trackers.registry import choose
from pyploop.wire import d1

# ---- how many: the policy, on simulated time


@dataclass
class SimulatedLine:
    """A line that a copy fills.  Bytes per second; seconds."""

    rate: float
    round_trip: float
    one_ssh: float = 1e12
    """What one ssh can encrypt; all of them together have `cores` of it."""
    cores: float = 8
    source: float = 1e12

    def goodput(self, lanes: int) -> float:
        window = lanes * WINDOW / self.round_trip if self.round_trip else 1e12
        return min(self.rate, window, self.source, self.one_ssh * lanes, self.one_ssh * self.cores)


def lanes_after(
    line: SimulatedLine,
    seconds: float,
    policy: LanePolicy | None = None,
    at: Callable[[float, int], int] = lambda now, lanes: lanes,
) -> tuple[int, list[float]]:
    """The lanes at the end, and when some were opened."""
    policy = policy or LanePolicy(line.round_trip)
    now, sent, lanes, opened = 0.0, 0.0, 1, []
    while now < seconds:
        lanes = at(now, lanes)
        more = policy.sample(now, int(sent), lanes)
        if more:
            opened.append(now)
        lanes += more
        now += 0.25
        sent += 0.25 * line.goodput(lanes)
    return lanes, opened


@pytest.mark.parametrize(
    ("round_trip", "size", "lanes"),
    [
        (0.0005, 0, 0),
        (0.01, 0, 0),
        (0.02, 0, 1),
        (0.05, 0, 3),
        (0.1, 0, 7),
        (0.4, 0, 7),
        (0.1, 32 << 20, 0),
        (0.1, 64 << 20, 7),
    ],
)
def test_a_long_line_begins_with_as_many_lanes_as_fill_a_gigabit(
    round_trip: float, size: int, lanes: int
) -> None:
    assert LanePolicy(round_trip).first(size) == lanes


def test_no_lane_is_tried_while_the_cpus_are_busy_or_the_copy_is_young() -> None:
    policy = LanePolicy(0.001)
    opened = [
        at for at in range(20) if policy.sample(float(at), at * 10**8, 1, 0.1 if at < 10 else 0.5)
    ]
    assert opened[0] == 10
    policy = LanePolicy(0.001)
    opened = [at for at in range(20) if policy.sample(float(at), at * 10**8, 1)]
    assert opened[0] == 1 + SOONEST, "the first byte came at 1"


def test_a_long_line_gets_all_lanes_within_seconds() -> None:
    lanes, opened = lanes_after(SimulatedLine(125e6, 0.1), 10)
    assert lanes == MOST
    assert len(opened) == 3 and opened[-1] < 6, "doubled: 1, 2, 4, 8"


def test_a_short_line_that_one_lane_fills_gets_one_more_and_no_other() -> None:
    lanes, opened = lanes_after(SimulatedLine(12.5e6, 0.001), 25)
    assert (lanes, len(opened)) == (2, 1)


def test_lanes_are_added_one_by_one_while_ssh_is_the_limit() -> None:
    line = SimulatedLine(5e9, 0.0002, one_ssh=370e6, cores=3)
    lanes, opened = lanes_after(line, 20)
    assert lanes == 4, "three are used, and the fourth showed that"
    assert all(b - a >= 1 for a, b in itertools.pairwise(opened))


def test_a_slow_source_does_not_open_lanes() -> None:
    lanes, _ = lanes_after(SimulatedLine(1e9, 0.02, source=20e6), 25)
    assert lanes == 2


def test_no_lane_is_opened_before_something_was_measured() -> None:
    policy = LanePolicy(0.1)
    assert policy.sample(0.0, 0, 1) == 0
    assert policy.sample(0.5, 10 << 20, 1) == 0
    policy.pause()
    assert policy.sample(1.2, 20 << 20, 1) == 0, "measured anew"
    assert policy.sample(3.0, 20 << 20, 1) == 0, "nothing was sent"


def test_there_are_never_more_than_the_most() -> None:
    line = SimulatedLine(1e10, 0.5)
    assert lanes_after(line, 60)[0] == MOST
    assert lanes_after(line, 60, LanePolicy(0.5, most=3))[0] == 3


def test_another_try_comes_later_and_when_the_goodput_has_fallen() -> None:
    line = SimulatedLine(12.5e6, 0.001)
    _, opened = lanes_after(line, AGAIN + 10)
    assert len(opened) == 2 and opened[1] - opened[0] >= AGAIN

    def changes(now: float, lanes: int) -> int:
        line.one_ssh = 1e12 if now < 10 else 2e6
        return lanes

    line = SimulatedLine(12.5e6, 0.001)
    lanes, _ = lanes_after(line, 25, at=changes)
    assert lanes > 3


def test_a_lane_that_has_ended_is_replaced() -> None:
    def one_breaks(now: float, lanes: int) -> int:
        return lanes - 1 if now == 12 else lanes

    lanes, opened = lanes_after(SimulatedLine(125e6, 0.1), 20, at=one_breaks)
    assert lanes == MOST
    assert [t for t in opened if t > 12]


# ---- the door


class Pump:
    """A pump that says no."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.added = error, list[tuple[int, int]]()

    def add_lane(self, fd: int, number: int) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.added.append((fd, number))


def test_lanes_wait_until_both_ends_have_agreed() -> None:
    lanes, pump = Lanes(), Pump()
    lanes.add(7, 1)
    assert not pump.added
    lanes.open(pump, lambda: 0)
    lanes.add(8, 2)
    assert pump.added == [(7, 1), (8, 2)]
    lanes.refuse("the copy has ended")
    with pytest.raises(ParameterError, match="lane 3 cannot be added: the copy has ended"):
        lanes.add(9, 3)


@pytest.mark.parametrize(
    ("error", "why"),
    [(errno.ECANCELED, "the copy has ended"), (errno.ENOSPC, os.strerror(errno.ENOSPC))],
)
def test_a_lane_that_the_pump_refuses_is_named(error: int, why: str) -> None:
    lanes = Lanes()
    lanes.open(Pump(error), lambda: 0)
    with pytest.raises(ParameterError, match=f"lane 5 cannot be added: {why}"):
        lanes.add(7, 5)


def test_the_lanes_that_have_left_are_described() -> None:
    before = [PumpLane(1, 0, 10), PumpLane(2, errno.EPIPE, 20), PumpLane(3, 0, 30)]
    assert lanes_module.ended(before, [PumpLane(1, 0, 10)]) == [
        "Lane 2 has ended after 20 bytes (Broken pipe)",
        "Lane 3 has ended after 30 bytes (at the receiver)",
    ]


# ---- whole copies


class Cut:
    """A lane that carries so many bytes, and breaks then."""

    def __init__(self, most: int) -> None:
        into, self.out = os.pipe2(os.O_CLOEXEC)
        self.received, onward = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.out, False)
        self._thread = threading.Thread(target=self._carry, args=(into, onward, most))
        self._thread.start()

    @staticmethod
    def _carry(source: int, to: int, most: int) -> None:
        with contextlib.suppress(OSError):
            while most > 0 and (data := os.read(source, min(most, 65536))):
                os.write(to, data)
                most -= len(data)
        os.close(source)
        os.close(to)

    def close(self) -> None:
        os.close(self.out)
        os.close(self.received)
        self._thread.join()


@dataclass
class Copied:
    summary: Summary
    received: Received
    again: int
    log: list[str]


class Log(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)


@contextlib.contextmanager
def lines(*most: int) -> Iterator[list[Cut]]:
    cuts = [Cut(n) for n in most]
    try:
        yield cuts
    finally:
        for cut in cuts:
            cut.close()


def copy(source: Path, target: Path, cuts: list[Cut], *, old_peer: bool = False) -> Copied:
    report, theirs = Log(), Log()
    ours, taken = Lanes(), None if old_peer else Lanes()
    for number, cut in enumerate(cuts, 1):
        ours.add(cut.out, number)
        if taken is not None:
            taken.add(cut.received, number)
    a, b = socket.socketpair()
    with contextlib.closing(opening.open_source(str(source))) as src, a, b:
        job = Job(lambda: receive(str(target), b.fileno(), None, theirs, 10, lanes=taken)).start()
        out = StreamOutput(
            a.fileno(), None, report, two_way=True, sync_wait=0, answer_timeout=10, lanes=ours
        )
        with Sender(src, choose("auto", src), out, Options(stall=10), report) as sender:
            sender.first_pass()
            sender.converge()
            sender.freeze_and_finish()
            again = sender._source_pump.pump.stats.again
        received = job.join(10)
    return Copied(sender.summary, received, again, report.lines + theirs.lines)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(os.urandom(24 << 20))
    return tmp_path / "source"


def test_a_copy_over_several_lanes_is_the_source(tmp_path: Path, source: Path) -> None:
    with lines(1 << 40, 1 << 40, 1 << 40) as cuts:
        done = copy(source, tmp_path / "target", cuts)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert done.summary.acknowledged == "acknowledged"
    assert done.again == 0
    assert done.received.stats.data == done.summary.data_bytes
    assert not [line for line in done.log if "has ended" in line]


def test_a_lane_that_breaks_costs_what_was_under_way(tmp_path: Path, source: Path) -> None:
    with lines(700_000, 1 << 40) as cuts:
        done = copy(source, tmp_path / "target", cuts)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert 0 < done.again < 4 << 20
    assert [line for line in done.log if line.startswith("Lane 1 has ended")]
    assert not [line for line in done.log if line.startswith("Lane 2 has ended")]
    assert [line for line in done.log if line.endswith("again, which lanes have lost")]


def test_a_copy_whose_lanes_have_all_broken_ends_over_the_main_stream(
    tmp_path: Path, source: Path
) -> None:
    with lines(10, 100_000, 1_000_000) as cuts:
        done = copy(source, tmp_path / "target", cuts)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert done.summary.acknowledged == "acknowledged"


def test_a_receiver_that_takes_no_lanes_gets_everything_over_the_main_stream(
    tmp_path: Path, source: Path
) -> None:
    with lines(1 << 40) as cuts:
        done = copy(source, tmp_path / "target", cuts, old_peer=True)
        os.set_blocking(cuts[0].received, False)
        with pytest.raises(BlockingIOError):
            os.read(cuts[0].received, 1)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert done.received.stats.data == done.summary.data_bytes


# ---- the answer


def test_the_answer_about_lost_lanes_is_read_as_it_was_written() -> None:
    ends = [(1, 0), (65535, 1 << 60)]
    data = d1.pack_lost(ends)
    assert len(data) == 8 + 2 * 16

    def read(size: int) -> bytes:
        nonlocal data
        part, data = data[:size], data[size:]
        return part

    assert d1.unpack_lost(read) == ends and not data
    data = d1.pack_lost([])
    assert d1.unpack_lost(read) == [] and not data
    data = d1.LOST_HEAD.pack(65, 0)
    with pytest.raises(ValueError, match="65 lanes"):
        d1.unpack_lost(read)


@pytest.mark.parametrize("features", [d1.NO_FEATURES, d1.Feature.LANES])
def test_the_answer_needs_the_feature(features: d1.Feature) -> None:
    (out_r, out_w), (back_r, back_w) = os.pipe(), os.pipe()
    out = StreamOutput(out_w, back_r, Reporter(), two_way=False, sync_wait=0, answer_timeout=5)
    out.features = features
    os.write(back_w, d1.LOST_LANES + d1.LOST_HEAD.pack(65, 0))
    with pytest.raises(ProtocolError, match="wrong answer" if features else "LOSTLANE"):
        out._answer(back_r, "SYNC")
    for fd in (out_r, out_w, back_r, back_w):
        os.close(fd)


def test_a_receiver_cannot_have_more_of_a_lane_than_was_sent(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 8192)
    src = os.open(tmp_path / "source", os.O_RDONLY)
    (main_r, main_w), (lane_r, lane_w) = os.pipe(), os.pipe()
    os.set_blocking(main_w, False)
    os.set_blocking(lane_w, False)
    pump = _core.Pump(
        src_fd=src, src_base=0, size=8192, align=1, out_fd=main_w, sink=_core.SINK_FRAMES,
        cluster=4096, slots=4, readers=0, features=d1.Feature.LANES,
    )  # fmt: skip
    pump.add_lane(lane_w, 7)
    pump.write(d1_sync())
    (lane,) = pump.lanes
    assert (lane.number, lane.error) == (7, 0)
    assert lane.sent == len(os.read(lane_r, 1000))
    with pytest.raises(OSError, match="Protocol error"):
        pump.settle([(7, lane.sent + 1)])
    assert not pump.settle([(6, 1 << 40), (7, lane.sent)]), "6 is none of ours"
    assert pump.lanes == []
    for fd in (src, main_r, main_w, lane_r, lane_w):
        os.close(fd)
