# SPDX-License-Identifier: Apache-2.0
"""The relay of a post-copy migration at its target, and the stream that both ends speak
(docs/internals/post-copy.md).

CRIU's two ends give up when their socket closes.  So each talks to a local socket that stays
open, whatever becomes of the connection between the hosts.  What is not acknowledged is kept,
and sent again over the next connection: nothing is lost or doubled.

It is started by its path (python -I -S), in a session of its own.  It imports only the
standard library.

argv: the descriptor of CRIU's socket; the name of the socket to make in the working folder,
through which the agents of later connections hand over their descriptors; the record of the
lazy restore; CRIU's working folder; seconds without the source after which it gives up.

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
import json
import os
import select
import signal
import socket
import struct
import sys
import syslog
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

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
OUTCOME_SECONDS = 60.0
"""For the guard to say how the daemon has ended."""
NICE = -10
LINGER = 20.0
"""For the source to hear that it ended badly.  It finds out in another way, too."""


class BrokenLinkError(Exception):
    """The connection cannot be used any more."""


def hurry(pid: int) -> None:
    """A page takes a dozen turns of processes, and one of the container waits for it: on a busy
    host each of them comes before other work."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICE)


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


class Stream:
    """Bytes of CRIU's socket in both directions, over one connection after the other."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 2 << 20)
        self.sock: socket.socket | None = sock
        self.link: Link | None = None
        self._met = False
        self._sent: deque[bytes] = deque()
        """Not acknowledged."""
        self._waiting: deque[bytes] = deque()
        """Not sent over this connection."""
        self._base = self._next = self._end = 0
        """Positions of what CRIU said: acknowledged; sent; in all."""
        self.accepted = self.delivered = self._acked = 0
        """Bytes of the peer: here; taken by CRIU; acknowledged."""
        self._todo: deque[memoryview] = deque()
        self.eof = False
        """CRIU has closed its end."""
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

    # ---- CRIU's socket

    def end(self, outcome: int) -> None:
        """Tell the peer, now and over later connections."""
        if self._outcome is None:
            self._outcome = outcome

    def close(self) -> None:
        """CRIU's end sees the end of the stream."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self._todo.clear()
        self.eof = True

    def _from_criu(self) -> None:
        assert self.sock is not None
        while self._end - self._base < WINDOW and len(self._waiting) < 8:
            try:
                data = self.sock.recv(PIECE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.eof = True
                return
            self._end += len(data)
            self._waiting.append(data)

    def _to_criu(self) -> None:
        assert self.sock is not None
        try:
            while self._todo:
                n = self.sock.send(self._todo[0])
                self.delivered += n
                if n < len(self._todo[0]):
                    self._todo[0] = self._todo[0][n:]
                else:
                    self._todo.popleft()
        except BlockingIOError:
            return
        except OSError:
            self.close()

    # ---- frames

    def _take(self, kind: int, value: int, data: bytes) -> None:
        assert self.link is not None
        if kind == HELLO:
            self._acknowledge(value, self._base + sum(map(len, self._waiting)))
            self._next, self._met = self._base, True
        elif not self._met:
            raise BrokenLinkError("no HELLO")
        elif kind == DATA:
            if value != self.accepted or self.accepted - self.delivered > 2 * WINDOW:
                raise BrokenLinkError(f"data at {value}, and not at {self.accepted}")
            self.accepted += len(data)
            if self.sock is not None:
                self._todo.append(memoryview(data))
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

    def _queue(self) -> None:
        assert self.link is not None
        while self._met and self._waiting and len(self.link.out) < 4:
            data = self._waiting.popleft()
            self._sent.append(data)
            self.link.send(DATA, self._next, data)
            self._next += len(data)
        news = self.delivered - self._acked
        if self._met and news and (news >= ACK_EVERY or not self._todo):
            self.link.send(ACK, self.delivered)
            self._acked = self.delivered
        if self._met and self._outcome is not None and not self._waiting and not self._told:
            self._told = True
            self.link.send(END, self._outcome)
        now = time.monotonic()
        if now - self.link.pinged > PING_EVERY:
            self.link.pinged = now
            self.link.send(PING, 0)

    # ---- the loop

    def turn(self, others: Sequence[int], seconds: float) -> list[int]:
        """Move what can be moved.  Returns those of the other descriptors that can be read."""
        poll = select.poll()
        for fd in others:
            poll.register(fd, select.POLLIN)
        if self.sock is not None:
            room = self._end - self._base < WINDOW and len(self._waiting) < 8
            events = select.POLLIN if room and not self.eof else 0
            if self._todo:
                events |= select.POLLOUT
            if events:
                poll.register(self.sock.fileno(), events)
        link = self.link
        if link is not None:
            poll.register(link.rfd, select.POLLIN)
            if link.out:
                poll.register(link.wfd, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(1000 * min(seconds, PING_EVERY / 2))}
        if self.sock is not None and not self.eof:
            self._from_criu()
        try:
            if link is not None:
                if link.rfd in ready:
                    for kind, value, data in link.frames():
                        self._take(kind, value, data)
                    self.heard = max(self.heard, link.heard)
                if self.sock is not None and self._todo:
                    self._to_criu()
                self._queue()
                link.flush()
                if time.monotonic() - link.heard > SILENCE:
                    raise BrokenLinkError("the peer is silent")
        except BrokenLinkError:
            self.detach()
        if self.link is None and self.sock is not None and self._todo:
            self._to_criu()
        return [fd for fd in others if fd in ready]

    @property
    def acknowledged(self) -> int:
        """Bytes that CRIU said, and the peer has."""
        return self._base

    @property
    def drained(self) -> bool:
        """CRIU has all that has come."""
        return not self._todo


class TargetRelay:
    """Between `criu lazy-pages` and the connections that the agents hand over."""

    def __init__(self, sock: socket.socket, name: str, record: str, work: str) -> None:
        self._stream = Stream(sock)
        self._record, self._work, self._name = record, work, name
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):  # a new migration has a new name
            os.unlink(name)
        before = os.umask(0o177)
        self._listener.bind(name)
        os.umask(before)
        self._listener.listen(8)
        self._progress = os.open(f"{work}/progress", os.O_WRONLY | os.O_CREAT, 0o600)

    def serve(self, timeout: float) -> None:
        stream, noted = self._stream, -1
        try:
            while not stream.eof:
                if self._listener.fileno() in stream.turn([self._listener.fileno()], 1.0):
                    self._accept()
                if stream.delivered != noted:
                    noted = stream.delivered
                    os.pwrite(self._progress, b"%020d" % noted, 0)
                if stream.peer_ended is not None and stream.drained:
                    # Harmless when the daemon has all: it closes its end itself then.
                    self._say("the page server on the source has ended")
                    break
                if time.monotonic() - stream.heard > timeout:
                    self._say(f"the source could not be reached for {timeout:g} s")
                    break
            stream.close()
            self._tell(self._outcome(), timeout)
        finally:
            stream.detach()
            with contextlib.suppress(OSError):
                os.unlink(self._name)

    def _accept(self) -> None:
        """The connection of an agent, which hands over its standard input and output, and
        stays until they are not needed any more."""
        agent, _ = self._listener.accept()
        agent.settimeout(5)
        fds: list[int] = []
        with contextlib.suppress(OSError):
            fds = socket.recv_fds(agent, 1, 2)[1]
        if len(fds) != 2:
            for fd in fds:
                os.close(fd)
            agent.close()
            return

        def close() -> None:
            for fd in fds:
                os.close(fd)
            agent.close()

        self._stream.attach(Link(fds[0], fds[1], close))

    def _say(self, why: str) -> None:
        with contextlib.suppress(OSError), open(f"{self._work}/why", "x") as f:
            f.write(why)

    def _outcome(self) -> int:
        """As the guard has written it into the record."""
        deadline = time.monotonic() + OUTCOME_SECONDS
        while time.monotonic() < deadline:
            try:
                with open(self._record) as f:
                    state = json.load(f).get("state")
            except (OSError, ValueError):
                return BADLY  # it was stopped before anything ran
            if state in ("complete", "lost"):
                return WELL if state == "complete" else BADLY
            self._stream.turn([], 0.02)
        return BADLY

    def _tell(self, outcome: int, timeout: float) -> None:
        """Until the source knows."""
        stream = self._stream
        stream.end(outcome)
        deadline = time.monotonic() + (timeout if outcome == WELL else LINGER)
        while stream.peer_ended is None and time.monotonic() < deadline:
            if self._listener.fileno() in stream.turn([self._listener.fileno()], 0.5):
                self._accept()


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGPIPE"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    syslog.openlog("pyploop-pages", syslog.LOG_PID, syslog.LOG_DAEMON)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("-1000")
    hurry(os.getpid())
    fd, name, record, work, timeout = sys.argv[1:]
    sock = socket.socket(fileno=int(fd))
    TargetRelay(sock, name, record, work).serve(float(timeout))


if __name__ == "__main__":
    main()
