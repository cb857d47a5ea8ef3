# SPDX-License-Identifier: Apache-2.0
"""One connection that carries control messages and numbered data channels.

Each channel is one end of a socket pair here, so its readers and writers need to know
nothing of the connection.  Threads move the bytes in large pieces.

Invariants: the reader of the connection never waits for a channel, so no channel delays
another: a sender has at most WINDOW bytes under way in a channel, and they are stored
here.  A peer that sends nothing for `silence` seconds is dead.  What is stored here is
bounded: WINDOW (or what both ends agreed on) for each channel, INBOX for messages.
A message waits for one frame at most: the gate lets a stream of images go last.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import math
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from pyploop._core import Gate, Intake
from pyploop.errors import ProtocolError, PyploopError, ReadError, WriteError
from pyploop.system import signals
from pyploop.system.jobs import TICK
from pyploop.transport import deadlines
from pyploop.transport.line import Line, milliseconds, why_unread
from pyploop.units import KIB, MIB
from pyploop.wire import mux as wire
from pyploop.wire.channels import AT_ONCE, LAST
from pyploop.wire.mux import Message

INBOX = 4 * MIB
"""Bytes of messages that wait to be received.  A peer that sends more floods us."""
OVERHEAD = 256
"""Bytes that each message counts for in addition to its length."""
BREAKS = 2.0
"""Seconds between the ends of both directions when a connection breaks, at most."""
MERGED = 64 * KIB
"""Bytes up to which small frames of a channel are stored as one: each object costs memory."""


class Channel(Protocol):
    """What the connection's reader needs of a channel.  It never waits in one of these."""

    def deliver(self, data: bytearray) -> None: ...
    def credit(self, n: int) -> None: ...
    def finish(self) -> None: ...
    def reset(self) -> None: ...


C = TypeVar("C", bound=Channel)


class Mux:
    """rfd, wfd: the connection; the caller closes it.  early: bytes that were already
    read from it.  on_dead: called once, from a thread, with the cause."""

    def __init__(
        self,
        rfd: int,
        wfd: int,
        early: bytes = b"",
        *,
        silence: float = deadlines.SILENCE,
        on_dead: Callable[[PyploopError], None] | None = None,
        window: int = wire.WINDOW,
        at_once: int = AT_ONCE,
    ) -> None:
        """window: bytes of a channel that may be under way.  at_once: channels that may be
        open.  Both are the same at both ends."""
        self._wfd = wfd
        self._closed = False
        """By the peer."""
        self._window, self._at_once = window, at_once
        self._silence, self._on_dead = silence, on_dead
        self._gate = Gate(wfd)
        self._channels: dict[int, Channel] = {}
        self._ended: set[int] = set()
        """Channels that the peer closed before they were opened here.  The peer abandoned
        its request before the request was read."""
        self._used: set[int] = set()
        """Numbers of channels that were opened here.  Each is used only once."""
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        """Messages as they came.  Decoded, they take many times as much memory."""
        self._arrived = 0
        self.taken = 0
        """Bytes of the messages that `receive` has returned, with OVERHEAD for each."""
        self._stop_r, self._stop_w = os.pipe()
        ms = milliseconds(silence)
        self._intake = Intake(rfd, self._stop_r, bytes(early), silence_ms=ms)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.failure: PyploopError | None = None
        """Why the connection is dead, or None."""
        os.set_blocking(wfd, False)
        self._threads = [
            threading.Thread(target=self._read_loop, daemon=True),
            threading.Thread(target=self._ping_loop, daemon=True),
        ]
        with signals.deferred():
            for t in self._threads:
                t.start()

    # ---- messages

    def send(self, message: Message) -> None:
        """WriteError when the connection is dead."""
        self.write([wire.encode(message)])

    def receive(self, timeout: float | None) -> Message:
        """The next message.  ReadError when none comes in time.  When the connection is
        dead and all messages were returned: the error that ended it."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            try:  # wait a short time only; jobs.Latch says why
                left = deadline - time.monotonic()
                payload = self._inbox.get(timeout=max(0.0, min(TICK, left)))
                break
            except queue.Empty:
                if time.monotonic() >= deadline:
                    raise ReadError(f"no answer within {timeout:g} s") from None
        if payload is None:
            self._inbox.put(None)
            raise self.failure or ReadError("the connection to the peer has ended")
        self.taken += len(payload) + OVERHEAD
        try:
            return wire.decode(payload)
        except ProtocolError as e:
            self.end(e)
            raise

    # ---- channels

    def open(self, number: int) -> int:
        """A descriptor of a socket for the channel; the caller closes it.
        ProtocolError when the number was used before or is out of range, or when
        AT_ONCE channels are open."""
        ours, theirs = socket.socketpair()
        for s in (ours, theirs):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
        try:
            self._open(number, lambda: self._channel(number, ours))
        except PyploopError:
            ours.close()
            theirs.close()
            raise
        return theirs.detach()

    def _channel(self, number: int, ours: socket.socket) -> _Channel:
        return _Channel(number, ours, self.write, self.forget, window=self._window)

    def open_line(self, number: int, window: int, make: Callable[[Line], C]) -> C:
        """Like `open`, for a channel whose bytes the native core moves.  window: bytes that
        may be under way in it."""
        line = Line(self, self._gate, self._intake, number, window, self._silence)
        return self._open(number, lambda: make(line))

    def _open(self, number: int, make: Callable[[], C]) -> C:
        if not 0 < number <= LAST:
            raise ProtocolError(f"agent protocol: there is no channel {number!r} (1 to {LAST})")
        with self._lock:
            if refusal := self._refusal(number):
                raise refusal
            self._used.add(number)
            made = self._channels[number] = make()
            if number in self._ended:
                made.finish()
        return made

    def _refusal(self, number: int) -> PyploopError | None:
        """Why a channel of that number cannot be opened.  None: it can."""
        if number in self._used and self.failure is None:
            return ProtocolError(
                f"agent protocol: channel {number} was opened before, and each is used only once"
            )
        if len(self._channels) >= self._at_once and self.failure is None:
            return ProtocolError(
                f"agent protocol: {self._at_once} channels are open already, which is the limit "
                "(each disk has one, each directory tree two)"
            )
        return self.failure

    @property
    def opened(self) -> int:
        """Channels that are open."""
        with self._lock:
            return len(self._channels)

    def reset_channels(self) -> None:
        """End all open channels, in both directions.  The connection goes on."""
        with self._lock:
            channels = list(self._channels.items())
        for number, channel in channels:
            channel.reset()
            with contextlib.suppress(PyploopError):  # the connection's end is reported elsewhere
                self.write([wire.frame(wire.RESET, number, 0)])

    def forget(self, number: int) -> None:
        with self._lock:
            self._channels.pop(number, None)

    # ---- the connection

    def close(self) -> None:
        """End all channels and threads.  The caller closes the descriptors.  May be called
        again."""
        if self._stop_w < 0:
            return
        self.end(ReadError("the connection was closed on this host"))
        self._stopping.set()
        with contextlib.suppress(OSError):
            os.write(self._stop_w, b"x")
        for t in self._threads:
            if t is not threading.current_thread():
                t.join()
        os.close(self._stop_r)
        os.close(self._stop_w)
        self._stop_w = -1

    def end(self, cause: PyploopError) -> None:
        """From any thread: mark the connection as dead.  cause: why.  The owner must still
        call `close`."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = cause
            channels = list(self._channels.values())
        for c in channels:
            c.reset()
        self._gate.shut()
        self._inbox.put(None)
        self._stopping.set()
        if self._on_dead is not None:
            self._on_dead(cause)

    def was_left(self) -> bool:
        """After its end: the peer has closed its end, and could still be written to.  So it has
        ended, and not the connection.  (What is written to it would break that, too.)"""
        if not self._closed:
            return False
        poll = select.poll()
        poll.register(self._wfd, 0)  # errors and hang-ups are always reported
        return not poll.poll(BREAKS * 1000)

    def write(self, parts: list[bytes]) -> None:
        """Write whole frames, from any thread."""
        poll = select.poll()
        poll.register(self._wfd, select.POLLOUT)
        with self._gate:
            # Not before the lock: on a slow link other threads' frames take long.
            deadline = time.monotonic() + self._silence
            left = [memoryview(p) for p in parts]
            while left:
                if self.failure:
                    raise WriteError(f"the connection to the peer has ended: {self.failure}")
                try:
                    n = os.writev(self._wfd, left)
                except BlockingIOError:
                    poll.poll(200)
                    if time.monotonic() > deadline:
                        self.end(WriteError(f"the peer took no data for {self._silence:g} s"))
                    continue
                except OSError as e:
                    cause = WriteError.of("the connection to the peer broke", e)
                    self.end(cause)
                    raise cause from e
                while left and n >= len(left[0]):
                    n -= len(left.pop(0))
                if left:
                    left[0] = left[0][n:]

    def _ping_loop(self) -> None:
        while not self._stopping.wait(deadlines.PING_EVERY):
            with contextlib.suppress(PyploopError):
                self.write([wire.frame(wire.PING, 0, 0)])

    def _read_loop(self) -> None:
        try:
            while True:
                self._take(wire.parse(self._intake.head()))
        except OSError as e:
            self._closed = e.errno == errno.ENODATA
            self.end(why_unread(e, self._silence))
        except PyploopError as e:
            self.end(e)

    def _take(self, frame: wire.Frame) -> None:
        payload = self._intake.read(frame.length)
        if frame.kind == wire.CONTROL:
            self._arrived += len(payload) + OVERHEAD
            if self._arrived - self.taken > INBOX:
                raise ProtocolError(
                    f"agent protocol: a flood of messages: more than {INBOX >> 20} MiB of them "
                    "wait to be read"
                )
            self._inbox.put(bytes(payload))
            return
        with self._lock:
            channel = self._channels.get(frame.channel)
            if channel is None and frame.kind == wire.END:
                self._ended.add(frame.channel)
        if channel is None:
            return  # a ping, or a channel that is not open yet or was just closed here
        if frame.kind == wire.DATA:
            channel.deliver(payload)
        elif frame.kind == wire.CREDIT:
            channel.credit(int.from_bytes(payload, "little"))
        elif frame.kind == wire.END:
            channel.finish()
        elif frame.kind == wire.RESET:
            channel.reset()


class _Channel:
    """Two threads: one sends the socket's bytes in frames, as the credit allows; the other
    writes the bytes of incoming frames to the socket."""

    def __init__(
        self,
        number: int,
        sock: socket.socket,
        write: Callable[[list[bytes]], None],
        forget: Callable[[int], None],
        *,
        window: int,
    ) -> None:
        self._number, self._sock, self._write, self._forget = number, sock, write, forget
        self._changed = threading.Condition()
        self._credit = self._window = window
        self._incoming: collections.deque[bytearray] = collections.deque()
        self._buffered = 0
        self._finished = False
        self._reset = False
        self._running = 2
        for body in (self._outward, self._inward):
            threading.Thread(target=self._run, args=(body,), daemon=True).start()

    def deliver(self, data: bytearray) -> None:
        """Store bytes from the peer."""
        with self._changed:
            self._buffered += len(data)
            if self._buffered > self._window:
                raise ProtocolError(
                    f"agent protocol: the peer sent more than the credit of channel {self._number}"
                )
            if self._finished:
                raise ProtocolError(
                    f"agent protocol: the peer sent data after the end of channel {self._number}"
                )
            if self._incoming and len(self._incoming[-1]) + len(data) <= MERGED:
                self._incoming[-1] += data
            else:
                self._incoming.append(data)
            self._changed.notify_all()

    def finish(self) -> None:
        """The peer sends no more in this channel."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def credit(self, n: int) -> None:
        with self._changed:
            self._credit += n
            if self._credit > self._window:
                raise ProtocolError(
                    f"agent protocol: the peer granted {self._credit} bytes of credit on channel "
                    f"{self._number}, and {self._window} is the limit"
                )
            self._changed.notify_all()

    def reset(self) -> None:
        """End both directions.  The user of the socket sees its end."""
        with self._changed:
            self._reset = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _run(self, body: Callable[[], None]) -> None:
        with contextlib.suppress(PyploopError):  # the connection's end is reported elsewhere
            body()
        with self._changed:
            self._running -= 1
            last = self._running == 0
        if last:
            self._sock.close()
            self._forget(self._number)

    def _outward(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._credit > 0 or self._reset)
                if self._reset:
                    return
                room = min(self._credit, wire.MAX_DATA)
            try:
                data = self._sock.recv(room)
            except OSError:
                data = b""
            if self._reset:
                return
            if not data:
                self._write([wire.frame(wire.END, self._number, 0)])
                return
            with self._changed:
                self._credit -= len(data)
            self._write([wire.frame(wire.DATA, self._number, len(data)), data])

    def _inward(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._incoming or self._finished or self._reset)
                if self._reset:
                    return
                data = self._incoming.popleft() if self._incoming else None
            try:
                if data is None:
                    self._sock.shutdown(socket.SHUT_WR)
                    return
                self._sock.sendall(data)
            except OSError:
                # Nothing reads the channel here any more.  Tell the peer, or it goes on.
                self._write([wire.frame(wire.RESET, self._number, 0)])
                self.reset()
                return
            with self._changed:
                self._buffered -= len(data)
            amount = len(data).to_bytes(4, "little")
            self._write([wire.frame(wire.CREDIT, self._number, 4), amount])
