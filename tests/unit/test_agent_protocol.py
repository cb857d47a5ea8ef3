# SPDX-License-Identifier: Apache-2.0
"""The agent's protocol: frames, credits, and many channels over one connection."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import support

from pyploop.errors import ProtocolError, PyploopError, ReadError
from pyploop.transport.mux import Mux
from pyploop.wire import channels, messages
from pyploop.wire import mux as wire


@pytest.fixture
def pair() -> Iterator[tuple[Mux, Mux]]:
    """The two ends of one connection."""
    a, b = socket.socketpair()
    ends = Mux(a.fileno(), a.fileno()), Mux(b.fileno(), b.fileno())
    try:
        yield ends
    finally:
        for end in ends:
            end.close()
        a.close()
        b.close()


def transfer(fd: int, data: bytes) -> threading.Thread:
    def body() -> None:
        with socket.socket(fileno=fd) as s:
            s.sendall(data)

    thread = threading.Thread(target=body)
    thread.start()
    return thread


def read_all(fd: int) -> bytes:
    with socket.socket(fileno=fd) as s:
        s.settimeout(20)
        parts = []
        while part := s.recv(1 << 16):
            parts.append(part)
        return b"".join(parts)


def test_messages_arrive_in_order_and_whole(pair: tuple[Mux, Mux]) -> None:
    for n in range(50):
        pair[0].send({"n": n, "text": "x" * n * 100})
    assert [pair[1].receive(5)["n"] for _ in range(50)] == list(range(50))


def test_many_channels_carry_more_than_a_window_at_once(pair: tuple[Mux, Mux]) -> None:
    data = {n: random.Random(n).randbytes(wire.WINDOW + 12345 * n) for n in range(1, 6)}
    ends = {n: (pair[0].open(n), pair[1].open(n)) for n in data}
    senders = [transfer(ends[n][0], data[n]) for n in data]
    got: dict[int, bytes] = {}

    def take(n: int) -> None:
        got[n] = read_all(ends[n][1])

    readers = [threading.Thread(target=take, args=(n,)) for n in data]
    for t in readers:
        t.start()
    for t in [*senders, *readers]:
        t.join(30)
    assert got == data


def test_a_channel_that_nobody_reads_holds_up_no_other(pair: tuple[Mux, Mux]) -> None:
    stuck = pair[0].open(1), pair[1].open(1)
    free = pair[0].open(2), pair[1].open(2)
    stuck_sender = transfer(stuck[0], bytes(8 * wire.WINDOW))
    data = os.urandom(3 * wire.WINDOW)
    free_sender = transfer(free[0], data)
    assert read_all(free[1]) == data
    free_sender.join(10)
    assert stuck_sender.is_alive()
    assert len(read_all(stuck[1])) == 8 * wire.WINDOW
    stuck_sender.join(10)


def test_the_sender_learns_that_the_receiver_has_closed_its_channel(pair: tuple[Mux, Mux]) -> None:
    ours, theirs = pair[0].open(1), pair[1].open(1)
    os.close(theirs)
    with socket.socket(fileno=ours) as s, pytest.raises(OSError):
        s.settimeout(20)
        while True:
            s.sendall(bytes(1 << 16))


def test_a_channel_that_the_peer_closed_before_it_was_opened_here_has_ended() -> None:
    """As of a request that a signal broke off as it was sent."""
    a, b = socket.socketpair()
    mux = Mux(a.fileno(), a.fileno())
    try:
        b.sendall(header(wire.END, 5, 0) + wire.encode({"n": 1}))
        assert mux.receive(5) == {"n": 1}
        with socket.socket(fileno=mux.open(5)) as channel:
            channel.settimeout(5)
            assert channel.recv(1) == b""
    finally:
        mux.close()
        a.close()
        b.close()


def test_the_end_of_the_connection_ends_messages_and_channels() -> None:
    a, b = socket.socketpair()
    causes: list[PyploopError] = []
    mux = Mux(a.fileno(), a.fileno(), on_dead=causes.append)
    channel = mux.open(1)
    b.close()
    with pytest.raises(ReadError):
        mux.receive(10)
    assert read_all(channel) == b""
    assert len(causes) == 1
    with pytest.raises(PyploopError):
        mux.send({})
    mux.close()
    a.close()


@pytest.mark.invariant(number=6)
def test_a_silent_peer_is_given_up() -> None:
    a, b = socket.socketpair()
    mux = Mux(a.fileno(), a.fileno(), silence=0.3)
    with pytest.raises(ReadError, match="sent nothing for"):
        mux.receive(10)
    mux.close()
    a.close()
    b.close()


def test_who_waits_for_others_on_a_slow_link_does_not_give_the_peer_up() -> None:
    """Many disks by a narrow line: the wait for one's turn counted as the peer's."""
    a, b = socket.socketpair()
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    mux = Mux(a.fileno(), a.fileno(), silence=2.0)
    failed: list[PyploopError] = []

    def send() -> None:
        try:
            mux.send({"text": "x" * 80_000})
        except PyploopError as e:
            failed.append(e)

    threads = [threading.Thread(target=send) for _ in range(20)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        b.sendall(header(wire.PING, 0, 0))
        time.sleep(0.02)
        with contextlib.suppress(BlockingIOError):
            b.recv(35_000, socket.MSG_DONTWAIT)  # all of it takes longer than the silence
    assert not failed
    mux.close()
    a.close()
    b.close()


@pytest.mark.parametrize("number", [0, channels.LAST + 1])
def test_a_channel_has_a_number_that_a_frame_has_room_for(
    pair: tuple[Mux, Mux], number: int
) -> None:
    with pytest.raises(ProtocolError, match=f"no channel {number}"):
        pair[0].open(number)
    ours, theirs = (end.open(channels.LAST) for end in pair)
    sender = transfer(ours, b"over the last channel")
    with socket.socket(fileno=theirs) as s:
        assert s.recv(100) == b"over the last channel"
    sender.join()


def test_channels_that_are_open_at_once_are_limited(
    pair: tuple[Mux, Mux], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each one WINDOW bytes may wait in memory."""
    for end in pair:
        monkeypatch.setattr(end, "_at_once", 2)
    ends = [end.open(number) for end in pair for number in (1, 2)]
    with pytest.raises(ProtocolError, match="2 channels are open already"):
        pair[0].open(3)
    for fd in ends:
        os.close(fd)
    support.wait_until(lambda: not pair[0]._channels, "both have ended")
    os.close(pair[0].open(3))


@pytest.mark.parametrize(("disks", "fits"), [(channels.AT_ONCE, True), (1000, False)])
def test_a_container_has_as_many_disks_as_there_are_channels(disks: int, fits: bool) -> None:
    args = {"container": "box", "runtime": "command", "live": False, "nodeps": []}
    args |= {"facts": {"images": [0] * disks}, "sizes": [0] * disks}
    expected = contextlib.nullcontext() if fits else pytest.raises(ProtocolError, match="at most")
    with expected:
        messages.request("check", args)


def header(kind: int, channel: int, length: int, zero: int = 0) -> bytes:
    return wire.HEADER.pack(kind, zero, channel, length)


@pytest.mark.parametrize(
    "bad",
    [
        header(0, 0, 0),
        header(7, 0, 0),
        header(wire.CONTROL, 0, wire.MAX_CONTROL + 1),
        header(wire.CONTROL, 1, 2),
        header(wire.DATA, 1, wire.MAX_DATA + 1),
        header(wire.DATA, 0, 1),
        header(wire.CREDIT, 1, 3),
        header(wire.END, 1, 1),
        header(wire.PING, 0, 0, zero=1),
        header(wire.CONTROL, 0, 2) + b"[]",
        header(wire.CONTROL, 0, 3) + b"{,}",
        header(wire.CONTROL, 0, 60000) + b"[" * 60000,
    ],
)
@pytest.mark.invariant(number=5)
def test_a_frame_that_may_not_come_ends_the_connection(bad: bytes) -> None:
    a, b = socket.socketpair()
    mux = Mux(a.fileno(), a.fileno())
    b.sendall(bad)
    with pytest.raises(ProtocolError):
        mux.receive(10)
    mux.close()
    a.close()
    b.close()


def flood(send: Callable[[bytes], None], frames: int) -> None:
    with contextlib.suppress(OSError):  # cut off
        for _ in range(frames):
            send(header(wire.DATA, 1, wire.MAX_DATA) + bytes(wire.MAX_DATA))


def test_a_peer_that_sends_more_than_its_credit_is_cut_off() -> None:
    a, b = socket.socketpair()
    mux = Mux(a.fileno(), a.fileno())
    channel = mux.open(1)  # never read
    thread = threading.Thread(target=flood, args=(b.sendall, 64), daemon=True)
    thread.start()
    with pytest.raises(ProtocolError, match="more than the credit of channel"):
        mux.receive(20)
    mux.close()
    a.close()
    b.close()
    os.close(channel)


def test_random_bytes_never_hang_or_escape() -> None:
    rng = random.Random(5)
    for _ in range(200):
        data = rng.randbytes(wire.HEADER_SIZE)
        try:
            frame = wire.parse(data)
        except ProtocolError:
            continue
        assert frame.length <= wire.MAX_CONTROL


def test_the_hello_is_found_behind_what_a_login_shell_prints() -> None:
    noise = b"Welcome!\nYou have mail.\n"
    found = wire.find_hello(noise + wire.hello("0.1.0") + b"rest")
    assert found is not None
    assert (found.major, found.version) == (wire.MAJOR, "0.1.0")
    assert (noise + wire.hello("0.1.0") + b"rest")[found.end :] == b"rest"
    assert wire.find_hello(noise) is None


def test_what_a_login_shell_prints_need_not_end_its_line() -> None:
    found = wire.find_hello(b"$ " + wire.hello("0.1.0") + b"rest")
    assert found == (wire.MAJOR, "0.1.0", len(b"$ " + wire.hello("0.1.0")))
    assert wire.lane_is_ready(b"$ " + wire.LANE_READY)


def test_another_major_version_is_named() -> None:
    ours = wire.Hello(wire.MAJOR, "0.9.1", 0)
    assert wire.mismatch(ours, "0.1.0") is None
    assert "1.0" in str(wire.mismatch(wire.Hello(wire.MAJOR, "1.0", 0), "0.1.0"))
    assert "protocol 9" in str(wire.mismatch(wire.Hello(9, "0.1.0", 0), "0.1.0"))


def test_a_message_longer_than_allowed_is_not_sent() -> None:
    with pytest.raises(ProtocolError):
        wire.encode({"x": "y" * wire.MAX_CONTROL})
    encoded = wire.encode({"x": 1})
    assert json.loads(encoded[wire.HEADER_SIZE :]) == {"x": 1}


def test_a_late_answer_is_an_error_and_not_a_wait(pair: tuple[Mux, Mux]) -> None:
    start = time.monotonic()
    with pytest.raises(ReadError, match="no answer"):
        pair[0].receive(0.05)
    assert time.monotonic() - start < 10
