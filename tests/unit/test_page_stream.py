# SPDX-License-Identifier: Apache-2.0
"""The stream of a post-copy migration: what CRIU's two ends say to each other arrives
once and in order, however often the connection between them ends."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Sequence
from functools import partial

import pytest

from pyploop.runtimes.runc import page_stream
from pyploop.runtimes.runc.page_stream import BrokenLinkError, CriuSocket, Link, Stream
from pyploop.units import MIB


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


class Ends:
    """Two streams, each with CRIU's end of its socket."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.streams = [Stream() for _ in pairs]
        self.sockets = [CriuSocket(ours) for ours, _ in pairs]
        self.criu = [theirs for _, theirs in pairs]
        self.cut: list[socket.socket] = []

    def connect(self) -> None:
        """Over a new connection; the old one is cut, with what is on its way."""
        for old in self.cut:
            old.close()
        pair = socket.socketpair()
        self.cut = list(pair)
        for stream, one in zip(self.streams, pair, strict=True):
            fds = os.dup(one.fileno()), os.dup(one.fileno())
            stream.attach(Link(*fds, partial(_close, fds)))

    def turn(self) -> None:
        for stream, sock in zip(self.streams, self.sockets, strict=True):
            stream.turn(sock, [], 0.001)

    def close(self) -> None:
        for stream in self.streams:
            stream.detach()
        for sock in self.sockets:
            sock.close()
        for one in (*self.criu, *self.cut):
            one.close()


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_arrives_once_and_in_order_over_many_connections(seed: int) -> None:
    chance, ends = random.Random(seed), Ends()
    said = [chance.randbytes(6 * MIB), chance.randbytes(200_000)]
    heard: list[bytes] = [b"", b""]

    def read(n: int) -> None:
        parts = []
        while part := ends.criu[n].recv(1 << 16):
            parts.append(part)
        heard[n] = b"".join(parts)

    talk = [
        *(threading.Thread(target=ends.criu[n].sendall, args=(said[n],)) for n in range(2)),
        *(threading.Thread(target=read, args=(n,)) for n in range(2)),
    ]
    for one in talk:
        one.start()
    deadline = time.monotonic() + 30
    try:
        turns = 0
        while [s.delivered for s in ends.streams] != [len(said[1]), len(said[0])]:
            if ends.streams[0].link is None or ends.streams[1].link is None or turns == 0:
                ends.connect()
                turns = chance.randrange(3, 60)
            turns -= 1
            ends.turn()
            assert time.monotonic() < deadline
        for stream in ends.streams:
            assert stream.accepted == stream.delivered
        for sock in ends.sockets:
            sock.close()
        for one in talk:
            one.join(10)
        assert heard == [said[1], said[0]]
    finally:
        ends.close()


def test_the_outcome_is_told_over_the_next_connection() -> None:
    ends = Ends()
    try:
        ends.streams[0].end(page_stream.WELL)
        ends.connect()
        for _ in range(20):
            ends.turn()
        assert ends.streams[1].peer_ended == page_stream.WELL
        ends.connect()
        ends.streams[1].peer_ended = None
        for _ in range(20):
            ends.turn()
        assert ends.streams[1].peer_ended == page_stream.WELL
    finally:
        ends.close()


@pytest.mark.parametrize(
    "frame",
    [
        page_stream.HEAD.pack(9, 0, 0),
        page_stream.HEAD.pack(page_stream.DATA, page_stream.PIECE + 1, 0),
        page_stream.HEAD.pack(page_stream.ACK, 5, 0),
    ],
    ids=["unknown kind", "too long", "an acknowledgement with data"],
)
def test_a_frame_that_may_not_come_ends_the_connection(frame: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame)
        link = Link(ours.fileno(), ours.fileno(), lambda: None)
        with pytest.raises(BrokenLinkError):
            list(link.frames())


@pytest.mark.parametrize(
    "frames",
    [
        [(page_stream.DATA, 0, b"x")],
        [(page_stream.HELLO, 7, b"")],
        [(page_stream.HELLO, 0, b""), (page_stream.DATA, 1, b"x")],
        [(page_stream.HELLO, 0, b""), (page_stream.ACK, 1, b"")],
    ],
    ids=["data before hello", "more than was said", "a gap", "more than was sent"],
)
def test_a_peer_that_lies_about_positions_is_cut_off(
    frames: list[tuple[int, int, bytes]],
) -> None:
    criu, inner = socket.socketpair()
    ours, theirs = socket.socketpair()
    with criu, ours, theirs:
        stream, sock = Stream(), CriuSocket(inner)
        stream.attach(Link(ours.fileno(), ours.fileno(), lambda: None))
        for kind, value, data in frames:
            theirs.sendall(page_stream.HEAD.pack(kind, len(data), value) + data)
        for _ in range(3):
            stream.turn(sock, [], 0.01)
        assert stream.link is None
        sock.close()
