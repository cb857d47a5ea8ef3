# SPDX-License-Identifier: Apache-2.0
"""Lanes of a migration: how many are opened, what an agent takes by them, and how they end."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from scripts import CHECK
from test_agent_limits import FACTS, Connect, Source, box, connect, world  # noqa: F401

from pyploop.errors import ConnectError, PyploopError
from pyploop.migration import image_channels
from pyploop.migration.source.lane_supply import (
    AT_ONCE,
    EACH,
    LONG,
    TRIES,
    LaneSupply,
    wanted_ahead,
)
from pyploop.report.events import Reporter
from pyploop.system.jobs import Job
from pyploop.transport import lane_handover
from pyploop.transport.bulk import Bulk
from pyploop.transport.lane import Lane
from pyploop.units import MIB
from pyploop.wire import channels, d1
from pyploop.wire import mux as wire

SECONDS = 20.0


# ---- how many


@pytest.mark.parametrize(
    ("disks", "data", "round_trip", "lanes"),
    [
        (1, 100 * EACH, 0.001, 1),
        (3, 100 * EACH, 0.001, 3),
        (100, 0, 0.001, 8),
        (1, 100 * EACH, LONG, 8),
        (1, 3 * EACH, LONG, 3),
        (1, EACH - 1, 1.0, 1),
        (3, EACH, 1.0, 3),
        (0, EACH - 1, 1.0, 0),
        (0, 100 * EACH, 0.0, 0),
    ],
)
def test_lanes_are_opened_ahead_where_opening_takes_long(
    disks: int, data: int, round_trip: float, lanes: int
) -> None:
    assert wanted_ahead(disks, data, round_trip) == lanes


class Opened(Lane):
    """One without an ssh."""

    def __init__(self) -> None:
        self.closed = 0

    def cut(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


class Opener:
    """Opens lanes at a word."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.numbers: list[int] = []
        self.lanes: list[Opened] = []
        self.gate = threading.Event()
        self.gate.set()
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def __call__(self, number: int, gone: Callable[[], bool]) -> Lane:
        with self._lock:
            self.numbers.append(number)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            assert self.gate.wait(SECONDS)
            if self.fails:
                raise ConnectError("no")
            self.lanes.append(Opened())
            return self.lanes[-1]
        finally:
            with self._lock:
                self.at_once -= 1


@contextlib.contextmanager
def supply(opener: Opener, wanted: int, round_trip: float = 0.0) -> Iterator[LaneSupply]:
    made = LaneSupply("there", opener, round_trip, Reporter())
    made.start(wanted)
    try:
        yield made
    finally:
        made.close()


def test_as_many_lanes_are_opened_as_are_wanted_each_with_its_own_number() -> None:
    opener = Opener()
    with supply(opener, 3) as made:
        taken = [made.take(SECONDS) for _ in range(3)]
        assert sorted(one[0] for one in taken if one) == [1, 2, 3]
        assert made.take(SECONDS) is None
        made.more(1)
        assert made.take(SECONDS) == (4, opener.lanes[3])
    assert [lane.closed for lane in opener.lanes] == [1] * 4


@pytest.mark.parametrize(("round_trip", "most"), [(0.0, 1), (LONG, AT_ONCE)])
def test_few_lanes_are_opened_at_a_time(round_trip: float, most: int) -> None:
    opener = Opener()
    opener.gate.clear()
    with supply(opener, 8, round_trip) as made:
        deadline = time.monotonic() + SECONDS
        while opener.at_once < most and time.monotonic() < deadline:
            time.sleep(0.01)
        opener.gate.set()
        assert all(made.take(SECONDS) for _ in range(8))
    assert opener.most_at_once == most


def test_after_some_failures_no_lane_is_tried_any_more() -> None:
    opener = Opener(fails=True)
    with supply(opener, 8) as made:
        assert made.take(SECONDS) is None
        assert not made.comes
    assert opener.numbers == list(range(1, TRIES + 1))


def test_a_lane_that_comes_too_late_is_closed() -> None:
    opener = Opener()
    opener.gate.clear()
    with supply(opener, 1) as made:
        deadline = time.monotonic() + SECONDS
        while not opener.at_once and time.monotonic() < deadline:
            time.sleep(0.01)
        made.stop()
        opener.gate.set()
    assert [lane.closed for lane in opener.lanes] == [1]


# ---- at the agent


class Handed:
    """A lane that has come to the agent: the end that ssh would have at the source."""

    def __init__(self, token: str) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(SECONDS)
        fds = os.dup(theirs.fileno()), os.dup(theirs.fileno())
        theirs.close()
        self._thread = threading.Thread(target=self._hand_over, args=(token, *fds))
        self.failure: PyploopError | None = None
        self._thread.start()
        if not self._ready():
            self._thread.join(SECONDS)

    def _hand_over(self, token: str, rfd: int, wfd: int) -> None:
        try:
            lane_handover.hand_over(token, rfd, wfd)
        except PyploopError as e:
            self.failure = e
            os.close(rfd)
            os.close(wfd)

    def _ready(self) -> bool:
        data = b""
        while not data.endswith(b"\n"):
            part = self.sock.recv(1)
            if not part:
                return False
            data += part
        return wire.lane_is_ready(data) is True

    def ended(self) -> bool:
        """The agent has closed it."""
        try:
            return not self.sock.recv(1)
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()


@pytest.fixture
def lanes() -> Iterator[Callable[[Source, int], Handed]]:
    made: list[Handed] = []

    def one(source: Source, number: int) -> Handed:
        made.append(Handed(source.call("lane", number=number)["token"]))
        assert made[-1].failure is None
        return made[-1]

    yield one
    for lane in made:
        lane.close()


Lanes = Callable[[Source, int], Handed]


def hang_up(source: Source) -> None:
    """The connection ends, and the agent with it."""
    source._ours.shutdown(socket.SHUT_RDWR)
    assert source.ended()


def test_a_disk_comes_by_a_lane(connect: Connect, lanes: Lanes) -> None:  # noqa: F811
    source = connect()
    source.begin()
    lane = lanes(source, 1)
    source.call("disk", index=0, channel=0, lane=1)
    lane.sock.sendall(d1.data(0, bytes(4096)) + d1.data(4096, b"x" * 4096) + d1.end())
    source.call("join", name="disk 0", timeout=SECONDS)
    source.call("undo")
    assert lane.ended()


def test_a_disk_that_fails_ends_its_lane_at_once(connect: Connect, lanes: Lanes) -> None:  # noqa: F811
    source = connect()
    source.begin()
    lane = lanes(source, 1)
    source.call("disk", index=0, channel=0, lane=1)
    lane.sock.sendall(b"no marker at all")
    assert lane.ended()
    assert "bad marker" in source.refused("join", {"name": "disk 0", "timeout": SECONDS})


def test_the_end_of_the_connection_ends_what_comes_by_lanes(
    connect: Connect,  # noqa: F811
    lanes: Lanes,
) -> None:
    source = connect()
    source.begin()
    first, unused = lanes(source, 1), lanes(source, 2)
    source.call("disk", index=0, channel=0, lane=1)
    first.sock.sendall(d1.data(0, bytes(4096)))
    hang_up(source)
    assert first.ended() and unused.ended()


def test_a_lane_is_for_one_thing_and_comes_once(connect: Connect, lanes: Lanes) -> None:  # noqa: F811
    source = connect()
    assert "must come after `check`" in source.refused("lane", {"number": 1})
    source.begin()
    for number in (0, -1, channels.LANES + 1, True, "1"):
        source.refused("lane", {"number": number})
    assert "no lane 1" in source.refused("use", {"number": 1, "disk": None})
    assert "no lane 1" in source.refused("disk", {"index": 0, "channel": 0, "lane": 1})
    source.refused("disk", {"index": 0, "channel": 0})
    token = source.call("lane", number=1)["token"]
    assert "asked for before" in source.refused("lane", {"number": 1})
    lane = Handed(token)
    again = Handed(token)
    assert isinstance(again.failure, ConnectError) or again.ended()
    again.close()
    assert "no disk 0 is received by a lane" in source.refused("use", {"number": 1, "disk": 0})
    source.call("disk", index=0, channel=0, lane=1)
    assert "no lane 1" in source.refused("disk", {"index": 0, "channel": 0, "lane": 1})
    hang_up(source)
    assert lane.ended()
    lane.close()


def test_an_agent_waits_for_so_many_lanes_and_no_more(connect: Connect) -> None:  # noqa: F811
    source = connect()
    source.begin()
    for number in range(1, channels.LANES_AT_ONCE + 1):
        source.call("lane", number=number)
    last = {"number": channels.LANES_AT_ONCE + 1}
    assert "which is the limit" in source.refused("lane", last)


def test_a_lane_that_was_announced_and_does_not_come_is_not_waited_for_long(
    connect: Connect,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyploop.migration.deadlines.LANE", 0.1)
    source = connect()
    source.begin()
    source.call("lane", number=1)
    assert "has not come" in source.refused("use", {"number": 1, "disk": None})


# ---- several lanes for channels


def send(mux: object, source: Source, channel: int, size: int) -> None:
    """A probe of so many bytes."""
    window = wire.IMAGE_WINDOW
    out = image_channels.open_writer(mux, channel, window, SECONDS)  # type: ignore[arg-type]
    with out, open(os.memfd_create("probe"), "wb", buffering=0) as file:
        file.write(os.urandom(size))
        source.call("probe", channel=channel, size=size, window=window, bulk=True)
        out.file("probe", f"/proc/self/fd/{file.fileno()}")
        out.end()
        source.call("probed")


def add(bulk: Bulk, source: Source, lane: Handed, number: int) -> None:
    source.call("use", number=number, disk=None)
    fd = lane.sock.fileno()
    bulk.add(fd, fd, number)


def test_channels_go_over_several_lanes_of_which_some_die(
    connect: Connect,  # noqa: F811
    lanes: Lanes,
) -> None:
    source = connect()
    source.call("check", facts=FACTS, **CHECK)
    refused = source.refused("probe", {"channel": 1, "size": MIB, "window": 2 * MIB, "bulk": True})
    assert "there is no lane" in refused
    bulk = Bulk()
    with contextlib.closing(bulk):
        first, second = lanes(source, 1), lanes(source, 2)
        add(bulk, source, first, 1)
        add(bulk, source, second, 2)
        send(bulk.mux, source, 1, 8 * MIB)
        job: Job[None] = Job(lambda: send(bulk.mux, source, 2, 32 * MIB)).start()
        while bulk.moved < 9 * MIB and not job.over.is_set():
            time.sleep(0.001)
        first.sock.shutdown(socket.SHUT_RDWR)
        job.join(SECONDS)
        assert 1 in bulk.ended and bulk.mux.failure is None
        third = lanes(source, 3)
        add(bulk, source, third, 3)
        second.sock.shutdown(socket.SHUT_RDWR)
        send(bulk.mux, source, 3, 8 * MIB)
    hang_up(source)


def test_bytes_that_are_no_frames_of_a_lane_end_its_connection_and_nothing_else(
    connect: Connect,  # noqa: F811
    lanes: Lanes,
) -> None:
    source = connect()
    source.call("check", facts=FACTS, **CHECK)
    lane = lanes(source, 1)
    source.call("use", number=1, disk=None)
    lane.sock.sendall(b"\xff" * 64)
    # Whichever the agent notices first.
    ends = r"has ended|broke|no lane carries|closed|ended too early"
    with pytest.raises(AssertionError, match=ends):
        for channel in range(1, 9):
            source.call("probe", channel=channel, size=MIB, window=2 * MIB, bulk=True)
            time.sleep(0.2)
            source.call("probed")
    assert source.call("clock")
    hang_up(source)
