# SPDX-License-Identifier: Apache-2.0
"""A line between two hosts, in user space: it holds bytes back, and has a rate.

    line.py --listen 127.0.0.1:2222 --to 127.0.0.1:22 --round-trip 0.1 --rate 125e6

relays TCP connections; a program may use `Line` for pipes and sockets.  All connections
share the rate, each way for itself.  `window` limits what one connection may have under
way, as OpenSSH's channels do (2 MiB); a relay of ssh itself needs none.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import stat
import threading
import time
from collections import deque

CHUNK = 128 * 1024
SSH_WINDOW = 2 << 20
"""Bytes that one OpenSSH channel may have under way."""


class _Way:
    """One way of one connection."""

    def __init__(self, source: int, to: int, direction: int) -> None:
        self.source, self.to, self.direction = source, to, direction
        self.under_way = 0
        self.queue: deque[tuple[float, memoryview]] = deque()
        self.credits: deque[tuple[float, int]] = deque()
        self.ended = self.closed = False
        os.set_blocking(source, False)
        os.set_blocking(to, False)


class Line:
    """A context manager: the line is up inside it.  It owns the descriptors it is given."""

    def __init__(self, round_trip: float, rate: float, window: int = 0) -> None:
        """round_trip: seconds.  rate: bytes per second.  window: bytes; 0: no limit."""
        self._half, self._rate, self._window = round_trip / 2, rate, window or 1 << 40
        self._free = [0.0, 0.0]
        self._new: deque[_Way] = deque()
        self._ways: list[_Way] = []
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Line:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over = True
        os.write(self._waker, b"x")
        self._thread.join()
        os.close(self._wake)
        os.close(self._waker)

    def carry(self, source: int, to: int, direction: int = 0) -> None:
        """From any thread: what is read from one comes out of the other.  direction: 0 or
        1; each has the whole rate."""
        self._new.append(_Way(source, to, direction))
        os.write(self._waker, b"x")

    def _run(self) -> None:
        while not self._over:
            self._adopt()
            for way in self._ways:
                self._deliver(way)
            self._ways = [w for w in self._ways if not w.closed]
            self._wait()
        for way in self._ways:
            _close(way)

    def _adopt(self) -> None:
        while self._new:
            self._ways.append(self._new.popleft())

    def _deliver(self, way: _Way) -> None:
        now = time.monotonic()
        while way.credits and way.credits[0][0] <= now:
            way.under_way -= way.credits.popleft()[1]
        while way.queue and way.queue[0][0] <= now:
            due, data = way.queue.popleft()
            try:
                n = os.write(way.to, data)
            except BlockingIOError:
                way.queue.appendleft((due, data))
                return
            except OSError:
                _close(way)
                return
            way.credits.append((now + self._half, n))
            if n < len(data):
                way.queue.appendleft((due, data[n:]))
                return
        if way.ended and not way.queue:
            _close(way)

    def _wait(self) -> None:
        now = time.monotonic()
        poll, next_due = select.poll(), now + 1
        poll.register(self._wake, select.POLLIN)
        readable: dict[int, _Way] = {}
        for way in self._ways:
            if not way.ended and way.under_way < self._window:
                poll.register(way.source, select.POLLIN)
                readable[way.source] = way
            if way.queue and way.queue[0][0] <= now:
                poll.register(way.to, select.POLLOUT)
            elif way.queue:
                next_due = min(next_due, way.queue[0][0])
            if way.credits:
                next_due = min(next_due, way.credits[0][0])
        for fd, _ in poll.poll(max(0.0, next_due - now) * 1000):
            if fd == self._wake:
                os.read(fd, 100)
            elif fd in readable:
                self._take(readable[fd])

    def _take(self, way: _Way) -> None:
        try:
            data = os.read(way.source, min(CHUNK, self._window - way.under_way))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            way.ended = True
            return
        # One byte after the other goes onto the line; each then takes half a round trip.
        free = max(self._free[way.direction], time.monotonic()) + len(data) / self._rate
        self._free[way.direction] = free
        way.under_way += len(data)
        way.queue.append((free + self._half, memoryview(data)))


def _close(way: _Way) -> None:
    if way.closed:
        return
    way.closed = True
    for fd, how in ((way.source, socket.SHUT_RD), (way.to, socket.SHUT_WR)):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as s:
                s.shutdown(how)
        with contextlib.suppress(OSError):
            os.close(fd)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    parser = argparse.ArgumentParser(description="A line that holds bytes back.")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--round-trip", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--rate", type=float, default=1e12, metavar="BYTES/S")
    o = parser.parse_args()
    with socket.create_server(_address(o.listen)) as server, Line(o.round_trip, o.rate) as line:
        while True:
            near, _ = server.accept()
            far = socket.create_connection(_address(o.to))
            for s in (near, far):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.carry(os.dup(near.fileno()), os.dup(far.fileno()))
            line.carry(far.detach(), near.detach(), 1)


if __name__ == "__main__":
    main()
