# SPDX-License-Identifier: Apache-2.0
"""The stream that both ends of a post-copy migration speak (docs/internals/post-copy.md).

CRIU's two ends give up when their socket closes.  So each talks to a local socket that stays
open, whatever becomes of the connection between the hosts.  What is not acknowledged is kept,
and sent again over the next connection: nothing is lost or doubled.

A frame is `kind u8, zero u24, length u32, value u64`, little endian, then `length` bytes:

    HELLO  value: bytes that have been accepted.  The first frame of each connection
    DATA   value: position of its first byte
    ACK    value: bytes that CRIU has taken
    END    value: how it ended (WELL, BADLY).  No more DATA
    PING   every second
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

HEAD = struct.Struct("<BxxxIQ")
HELLO, DATA, ACK, END, PING = range(1, 6)
BADLY, WELL = 0, 1
PIECE = 256 << 10
WINDOW = 16 << 20
"""Bytes that may be on the way: more than a page request asks for, several times."""
ACK_EVERY = 1 << 20
PING_EVERY = 1.0
SILENCE = 8.0
"""Seconds without a byte after which a connection is given up for a new one."""
NICE = -10
BUFFER = 2 << 20


class BrokenLinkError(Exception):
    """The connection cannot be used any more."""


def hurry(pid: int) -> None:
    """A page takes a dozen turns of processes, and one of the container waits for it: on a busy
    host each of them comes before other work."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICE)


def enlarge(sock: socket.socket) -> None:
    """Room for a large answer.  Only who has CAP_NET_ADMIN gets more than the system's limit."""
    for option, forced in ((socket.SO_SNDBUF, 32), (socket.SO_RCVBUF, 33)):  # SO_*BUFFORCE
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)


def unblocked(fd: int) -> int:
    os.set_blocking(fd, False)
    with contextlib.suppress(OSError):  # no pipe, or a limit
        fcntl.fcntl(fd, 1031, 1 << 20)  # F_SETPIPE_SZ
    return fd


class Link:
    """One connection, as frames."""

    def __init__(self, rfd: int, wfd: int, close: Callable[[], None], early: bytes = b"") -> None:
        """early: what was read of it already."""
        self.rfd, self.wfd, self.close = unblocked(rfd), unblocked(wfd), close
        self.heard = self.pinged = time.monotonic()
        self.out: deque[memoryview] = deque()
        self._early = early
        self._head: tuple[int, int] | None = None
        self._want = bytearray(HEAD.size)
        self._got = 0

    def send(self, kind: int, value: int, data: bytes = b"") -> None:
        self.out.append(memoryview(HEAD.pack(kind, len(data), value)))
        if data:
            self.out.append(memoryview(data))

    def flush(self) -> None:
        """What can be written now."""
        try:
            while self.out:
                n = os.writev(self.wfd, [*self.out][:16])
                while self.out and n >= len(self.out[0]):
                    n -= len(self.out.popleft())
                if n:
                    self.out[0] = self.out[0][n:]
        except BlockingIOError:
            pass
        except OSError as e:
            raise BrokenLinkError(str(e)) from e

    def _fill(self) -> bool:
        """Whether what is wanted next is complete."""
        while self._got < len(self._want):
            view = memoryview(self._want)[self._got :]
            if self._early:
                n = min(len(view), len(self._early))
                view[:n], self._early = self._early[:n], self._early[n:]
            else:
                try:
                    n = os.readv(self.rfd, [view])
                except BlockingIOError:
                    return False
                except OSError as e:
                    raise BrokenLinkError(str(e)) from e
                if not n:
                    raise BrokenLinkError("the connection has ended")
                self.heard = time.monotonic()
            self._got += n
        return True

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """Kind, value and data of those that have come; some of them at a time."""
        taken = 0
        while taken < 4 * PIECE and self._fill():
            data, self._got = bytes(self._want), 0
            if self._head is None:
                kind, length, value = HEAD.unpack(data)
                if not HELLO <= kind <= PING or length > (PIECE if kind == DATA else 0):
                    raise BrokenLinkError(f"a frame of kind {kind} with {length} bytes")
                if length:
                    self._head, self._want = (kind, value), bytearray(length)
                    continue
                yield kind, value, b""
            else:
                kind, value = self._head
                self._head, self._want = None, bytearray(HEAD.size)
                taken += len(data)
                yield kind, value, data


class End(Protocol):
    """CRIU's end of a stream on this host."""

    def events(self, stream: Stream) -> dict[int, int]:
        """What to wait for (select.POLLIN, POLLOUT), by descriptor."""

    def move(self, stream: Stream) -> None:
        """Move what can be moved between CRIU and the stream, without waiting."""


class Stream:
    """Bytes in both directions, over one connection after the other."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self._met = False
        self._sent: deque[bytes] = deque()
        """Not acknowledged."""
        self._waiting: deque[bytes] = deque()
        """Not sent over this connection."""
        self._base = self._next = self._end = 0
        """Positions of what is said here: acknowledged; sent; in all."""
        self.accepted = self.delivered = self._acked = 0
        """Bytes of the peer: here; taken; acknowledged."""
        self.incoming: deque[memoryview] = deque()
        """Of the peer, in order, and not taken."""
        self.peer_ended: int | None = None
        self.heard = time.monotonic()
        """The last byte of the peer."""
        self._outcome: int | None = None
        self._told = False
        """Over this connection."""

    # ---- connections

    def attach(self, link: Link) -> None:
        self.detach()
        self._waiting.extendleft(reversed(self._sent))
        self._sent.clear()
        self._next = self._base
        self.link, self._met, self._told = link, False, False
        link.send(HELLO, self.accepted)

    def detach(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None

    @property
    def met(self) -> bool:
        """The peer is there."""
        return self.link is not None and self._met

    # ---- this end

    @property
    def room(self) -> bool:
        """More may be said."""
        return self._end - self._base < WINDOW and len(self._waiting) < 8

    def say(self, data: bytes) -> None:
        self._end += len(data)
        self._waiting.append(data)

    def took(self, n: int) -> None:
        """The first bytes of `incoming` are where they belong."""
        self.delivered += n
        while n:
            first = self.incoming[0]
            if n < len(first):
                self.incoming[0] = first[n:]
                return
            n -= len(self.incoming.popleft())

    def end(self, outcome: int) -> None:
        """Tell the peer, now and over later connections."""
        if self._outcome is None:
            self._outcome = outcome

    @property
    def acknowledged(self) -> int:
        """Bytes that were said here, and that the peer has."""
        return self._base

    # ---- frames

    def _take(self, kind: int, value: int, data: bytes) -> None:
        if kind == HELLO:
            self._acknowledge(value, self._base + sum(map(len, self._waiting)))
            self._next, self._met = self._base, True
        elif not self._met:
            raise BrokenLinkError("no HELLO")
        elif kind == DATA:
            if value != self.accepted or self.accepted - self.delivered > 2 * WINDOW:
                raise BrokenLinkError(f"data at {value}, and not at {self.accepted}")
            self.accepted += len(data)
            self.incoming.append(memoryview(data))
        elif kind == ACK:
            self._acknowledge(value, self._next)
        elif kind == END:
            self.peer_ended = value

    def _acknowledge(self, value: int, most: int) -> None:
        if not self._base <= value <= most:
            raise BrokenLinkError(f"{value} bytes acknowledged, of {self._base} to {most}")
        while self._base < value:
            pieces = self._sent or self._waiting
            n = min(len(pieces[0]), value - self._base)
            self._base += n
            if n < len(pieces[0]):
                pieces[0] = pieces[0][n:]
            else:
                pieces.popleft()

    def _queue(self, link: Link) -> None:
        while self._met and self._waiting and len(link.out) < 4:
            data = self._waiting.popleft()
            self._sent.append(data)
            link.send(DATA, self._next, data)
            self._next += len(data)
        now = time.monotonic()
        late = now - link.pinged > PING_EVERY
        news = self.delivered - self._acked
        if self._met and (news >= ACK_EVERY or (news and late)):
            link.send(ACK, self.delivered)
            self._acked = self.delivered
        if self._met and self._outcome is not None and not self._waiting and not self._told:
            self._told = True
            link.send(END, self._outcome)
        if late:
            link.pinged = now
            link.send(PING, 0)

    # ---- the loop

    def turn(self, end: End, others: Sequence[int], seconds: float) -> list[int]:
        """Move what can be moved.  Returns those of the other descriptors that can be read."""
        poll = select.poll()
        for fd in others:
            poll.register(fd, select.POLLIN)
        for fd, events in end.events(self).items():
            poll.register(fd, events)
        link = self.link
        if link is not None:
            poll.register(link.rfd, select.POLLIN)
            if link.out:
                poll.register(link.wfd, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(1000 * min(seconds, PING_EVERY / 2))}
        try:
            if link is not None and link.rfd in ready:
                for kind, value, data in link.frames():
                    self._take(kind, value, data)
                self.heard = max(self.heard, link.heard)
        except BrokenLinkError:
            self.detach()
        end.move(self)
        try:
            if link is not None and link is self.link:
                self._queue(link)
                link.flush()
                while self._met and self._waiting and not link.out:
                    self._queue(link)
                    link.flush()
                if time.monotonic() - link.heard > SILENCE:
                    raise BrokenLinkError("the peer is silent")
        except BrokenLinkError:
            self.detach()
        return [fd for fd in others if fd in ready]


class CriuSocket:
    """CRIU's socket, whose bytes the peer gets as they are."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        enlarge(sock)
        self._sock: socket.socket | None = sock
        self.eof = False
        """CRIU has closed its end."""

    @property
    def open(self) -> bool:
        return self._sock is not None

    def close(self) -> None:
        """CRIU sees the end of the stream."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self.eof = True

    def events(self, stream: Stream) -> dict[int, int]:
        if self._sock is None:
            return {}
        events = select.POLLIN if stream.room and not self.eof else 0
        if stream.incoming:
            events |= select.POLLOUT
        return {self._sock.fileno(): events} if events else {}

    def move(self, stream: Stream) -> None:
        if self._sock is not None and not self.eof:
            self._read(self._sock, stream)
        if self._sock is None:  # nobody wants it
            stream.took(sum(map(len, stream.incoming)))
        elif stream.incoming:
            self._write(self._sock, stream)

    def _read(self, sock: socket.socket, stream: Stream) -> None:
        while stream.room:
            try:
                data = sock.recv(PIECE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.eof = True
                return
            stream.say(data)

    def _write(self, sock: socket.socket, stream: Stream) -> None:
        try:
            while stream.incoming:
                stream.took(sock.send(stream.incoming[0]))
        except BlockingIOError:
            return
        except OSError:
            self.close()
