# SPDX-License-Identifier: Apache-2.0
"""Where a copy goes: a D1 stream to a peer, or a file here.

Both make the same promises to the sender: `sync` returns when all that was
sent is durable at the other end, as far as that can be known, and says how it
knows; `finish` likewise for the finished image under its final name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pyploop import _core, transport
from pyploop._core import Fault, Known, Pump
from pyploop.compat import EXACT, NATIVE, PERHAPS_PLOOP, PLOOP, PYPLOOP, Compat, Framing
from pyploop.errors import (
    ParameterError,
    ProtocolError,
    PyploopError,
    ReadError,
    SyncError,
    WriteError,
)
from pyploop.events import Reporter
from pyploop.freeze import FileSystems
from pyploop.image import HEADER_FRAME
from pyploop.recorder import Heard
from pyploop.sink import Sink
from pyploop.units import BLOCK, format_size
from pyploop.wire import d1, d2
from pyploop.worker import run_cancellable

HELLO_WAIT = 2.0
"""Seconds to wait for an answer on a socket that may have no receiver behind
it that answers."""


@dataclass(frozen=True)
class Packets:
    """How the data packets of D2 go: without answers, with digests, and how
    many may be unanswered."""

    unanswered: bool = False
    digests: bool = False
    window: int = 0


class Output(Protocol):
    """The target of a copy, as the sender sees it."""

    fd: int
    sink: int
    dialect: str
    framing: Framing
    """Of a stream; known after `hello`."""
    packets: Packets
    """Of a stream of packets; known after `hello`."""
    header_size: int
    """Bytes that `header` takes."""
    deadline: float
    """time.monotonic() at which waiting for an answer ends, whatever else."""
    heard: Heard | None
    """What came with the last answer, when the peer tells such things."""

    @property
    def end_is_answered(self) -> bool:
        """All that was sent has left our hands when `finish` returns; known
        after `hello`."""

    def check_apart(self, mounts: FileSystems) -> None:
        """ParameterError when the target lies on what will be frozen."""

    def hello(self) -> int:
        """Before all else: find out what the peer can do, and so the framing.
        Returns the bytes that this wrote."""

    def prepare(self, known: Known | None) -> None:
        """After `hello`, before the first block: what the target may hold."""

    def sync(self, pump: Pump, waiting: bool, start: bytes) -> str:
        """'acknowledged', 'local', 'waited' or 'unknown'.  waiting: the SYNC
        before the freeze, for which a peer that cannot answer gets the agreed
        time.  start: the image's first four bytes, which receivers before 1.11
        write at position 0."""

    def header(self, pump: Pump, data: bytes) -> None:
        """Write `data` at position 0, last of all blocks."""

    def finish(self, pump: Pump, size: int, start: bytes) -> str:
        """No block follows: all is durable when this returns, as far as it can
        be known.  Answers, and takes `start`, as `sync`."""


class StreamOutput:
    """D1 frames into a pipe or socket, answers from the feedback descriptor."""

    sink = _core.SINK_FRAMES
    packets = Packets()
    header_size = HEADER_FRAME

    def __init__(
        self,
        fd: int,
        feedback: int | None,
        report: Reporter,
        *,
        two_way: bool,
        sync_wait: float,
        answer_timeout: float,
        compat: Compat = "auto",
    ) -> None:
        """fd: never blocks in write.  two_way: `fd` is a socket that may answer
        even without a feedback descriptor.  Times in seconds."""
        self.fd = fd
        self.dialect = "D1"
        self.framing = NATIVE
        self._compat = compat
        self._feedback = feedback
        self._answers = feedback if feedback is not None else (fd if two_way else None)
        self._report = report
        self._sync_wait = sync_wait
        self._timeout = answer_timeout
        self._greeted = False
        self._timed = False
        self._asked = 0.0
        self.heard: Heard | None = None
        self.deadline = math.inf

    @property
    def end_is_answered(self) -> bool:
        return self._answers is not None and not self.framing.exact

    def check_apart(self, mounts: FileSystems) -> None:
        pass  # where the peer writes is not known here

    def hello(self) -> int:
        self.framing = self._find_framing()
        self.dialect = f"D1, {self.framing.name}"
        hellos = int(self._greeted) + int(self.framing is PYPLOOP)
        return hellos * len(d1.sync(d1.HELLO))

    def _find_framing(self) -> Framing:
        if self._compat == "ploop":
            # On a socket alone the C tool never looks for an answer.
            self._answers = self._feedback
            return EXACT
        unknown = NATIVE if self._compat == "native" else PERHAPS_PLOOP
        if self._answers is None:
            self._report.info(
                "No way back from the peer (no -f, not a socket): nothing it does is acknowledged"
            )
            return unknown
        answer = self._greet(self._answers)
        if answer is None:
            self._answers = None
            self._report.info("The peer does not answer: nothing it does is acknowledged")
            return unknown
        if answer == d1.HELLO_REPLY:
            self._ask_for_times(self._answers)
            return PYPLOOP
        if answer == d1.FAILURE:
            raise SyncError("the receiver cannot sync its target")
        if answer != d1.SUCCESS:
            raise ProtocolError(f"the receiver answered {answer!r} to the first SYNC")
        return NATIVE if self._compat == "native" else PLOOP

    def _greet(self, answers: int) -> bytes | None:
        """Say HELLO; the answer, None when a socket that promises none has none."""
        closed = "the receiver closed the stream before anything was sent (see its own message)"
        if transport.is_closed(self.fd):
            raise WriteError(closed)
        transport.write_all(self.fd, d1.sync(d1.HELLO), closed)
        self._greeted = True
        if self._feedback is None:
            deadline = time.monotonic() + HELLO_WAIT
            if not _readable_before(answers, deadline):
                return None
        return self._read(answers)

    def _ask_for_times(self, answers: int) -> None:
        """A peer of version 1 takes it for a SYNC."""
        self._asked = time.monotonic()
        transport.write_all(self.fd, d1.sync(d1.HELLO_2), "cannot ask the receiver")
        answer = self._read(answers)
        if answer == d1.FAILURE:
            raise SyncError("the receiver cannot sync its target")
        if answer not in (d1.SUCCESS, d1.HELLO_2_REPLY):
            raise ProtocolError(f"the receiver answered {answer!r} to the second SYNC")
        self._timed = answer == d1.HELLO_2_REPLY
        self._read_times(answers)

    def prepare(self, known: Known | None) -> None:
        # A receiver before 1.11 writes HELLO's bytes at 0: block 0 goes anyway.
        if known is not None and self._greeted:
            known.assume_data(0, BLOCK)

    def _read_times(self, fd: int) -> None:
        if self._timed:
            record = self._read(fd, d1.TIMES.size)
            self.heard = Heard(self._asked, time.monotonic(), d1.Times.unpack(record))

    def _read(self, fd: int, size: int = d1.REPLY_SIZE) -> bytes:
        limit = time.monotonic() + self._timeout
        try:
            return transport.read_exactly(
                fd,
                size,
                lambda: min(limit, self.deadline),  # which a cancel moves
                "reading the feedback",
                self.fd,
            )
        except ProtocolError as e:
            if self._feedback is not None:
                raise
            # The stream itself: to write more would end the same.
            raise WriteError("the receiver closed the stream (see its own message)") from e

    def _answer(self, fd: int, about: str) -> None:
        answer = self._read(fd)
        if answer == d1.FAILURE:
            raise SyncError(f"the receiver failed to make its target durable ({about})")
        if answer != d1.SUCCESS:
            raise ProtocolError(f"the receiver answered {answer!r} to {about}")
        self._read_times(fd)

    def sync(self, pump: Pump, waiting: bool, start: bytes) -> str:
        if self.framing.exact and not waiting:
            return "unknown"  # the C tool has no SYNC after its last block
        self._asked = time.monotonic()
        _write(pump, d1.sync(start))
        if self._answers is not None:
            self._answer(self._answers, "SYNC")
            return "acknowledged"
        if not waiting or not self._sync_wait:
            return "unknown"
        self._report.info(
            f"Waiting {self._sync_wait:g} s for a peer that cannot say when it has synced "
            "(--sync-wait; -f makes this needless)"
        )
        time.sleep(self._sync_wait)
        return "waited"

    def header(self, pump: Pump, data: bytes) -> None:
        _write(pump, d1.data(0, data))

    def finish(self, pump: Pump, size: int, start: bytes) -> str:
        if self.framing is PYPLOOP and self._answers is not None:
            # One round trip: the answer to END says all that SYNC's would.
            self._asked = time.monotonic()
            _write(pump, d1.end())
            self._answer(self._answers, "END")
            return "acknowledged"
        self.sync(pump, waiting=False, start=start)
        _write(pump, d1.end())
        return "unknown"


class FileOutput:
    """In place into a file here: a Sink of ours, or a descriptor that the user
    redirected (`copy -s DEVICE > IMAGE`)."""

    sink = _core.SINK_FILE
    dialect = "local file"
    framing = NATIVE
    packets = Packets()
    header_size = HEADER_FRAME
    heard: Heard | None = None
    end_is_answered = True

    def __init__(self, target: Sink | int) -> None:
        self._sink = target if isinstance(target, Sink) else None
        self.fd = target.fd if isinstance(target, Sink) else target
        self.deadline = math.inf

    def check_apart(self, mounts: FileSystems) -> None:
        point = mounts.holding(os.fstat(self.fd).st_dev)
        if point is not None:
            raise ParameterError(
                f"the target lies on {point}, which is part of the source and will be frozen: "
                "writing it would never end"
            )

    def prepare(self, known: Known | None) -> None:
        if known is not None:
            known.assume_data(0, os.fstat(self.fd).st_size)

    def hello(self) -> int:
        return 0

    def sync(self, pump: Pump, waiting: bool, start: bytes) -> str:
        self._durable(lambda: _core.fdatasync(self.fd))
        return "local"

    def header(self, pump: Pump, data: bytes) -> None:
        try:
            os.pwrite(self.fd, data, 0)
        except OSError as e:
            raise WriteError.of("cannot write the image header", e) from e

    def finish(self, pump: Pump, size: int, start: bytes) -> str:
        if self._sink is not None:
            self._sink.set_size(size)
            run_cancellable(self._sink.commit)
            return "local"
        try:
            if os.fstat(self.fd).st_size != size:
                os.ftruncate(self.fd, size)
        except OSError as e:
            raise WriteError.of(f"cannot set the size of the output to {size}", e) from e
        self._durable(lambda: os.fsync(self.fd))
        return "local"

    def _durable(self, call: Callable[[], None]) -> None:
        try:
            run_cancellable(call)
        except OSError as e:
            raise SyncError.of("cannot sync the target", e) from e


def _readable_before(fd: int, deadline: float) -> bool:
    while (left := deadline - time.monotonic()) > 0:
        if transport.readable(fd, min(left, transport.POLL_SLICE)):
            return True
    return False


def _write(pump: Pump, frame: bytes) -> None:
    try:
        run_cancellable(lambda: pump.write(frame), pump.cancel)
    except Fault as fault:
        raise explain_write(fault) from fault


def explain_write(fault: Fault) -> PyploopError:
    """The sending pump's failure to write, as an error to act on."""
    if fault.stage == "reply" and fault.errno != errno.EPIPE:
        return _explain_reply(fault)
    if fault.errno == errno.EPIPE:
        return WriteError(
            f"the receiver closed the stream after {format_size(fault.stream)} "
            "(see its own message); the source was not changed"
        )
    if fault.errno == errno.ETIMEDOUT:
        return WriteError(
            f"the receiver takes nothing, or next to nothing (--timeout), after "
            f"{format_size(fault.stream)}"
        )
    return WriteError.of(f"cannot write the stream after {format_size(fault.stream)}", fault)


def _explain_reply(fault: Fault) -> PyploopError:
    where = f"packet {fault.frame}, byte {fault.stream} of the stream"
    if fault.errno == errno.EREMOTEIO:
        kind = SyncError if fault.reply == SyncError.exit_code else WriteError
        return kind(f"the receiver failed: {d2.meaning(fault.reply)} (at {where})")
    if fault.errno == errno.EPROTO:
        return ProtocolError(f"the receiver answered more than it was asked ({where})")
    if fault.errno == errno.ETIMEDOUT:
        return ReadError(f"the receiver does not answer {where} (it may be dead or stuck)")
    return ReadError.of(f"cannot read the receiver's answer to {where}", fault)


@contextlib.contextmanager
def open_output(
    *,
    target: str | None,
    out_fd: int,
    feedback: int | None,
    report: Reporter,
    sync_wait: float,
    answer_timeout: float,
    compat: Compat = "auto",
) -> Iterator[Output]:
    """The output that `-d`, `-o` and `-f` name.  ParameterError for one that
    cannot take an image."""
    if target is not None:
        with Sink(target) as sink:
            yield FileOutput(sink)
        return
    mode = transport.check_open(out_fd, "-o").st_mode
    if stat.S_ISREG(mode):
        if fcntl.fcntl(out_fd, fcntl.F_GETFL) & os.O_APPEND:
            raise ParameterError(
                f"-o {out_fd} is a file opened for appending (>>): an image is written in place"
            )
        yield FileOutput(out_fd)
        return
    size = transport.enlarge_pipe(out_fd)
    if size:
        report.detail(f"Pipe buffer: {format_size(size)}")
    transport.no_delay(out_fd)
    with transport.nonblocking(out_fd) as fd:
        yield StreamOutput(
            fd,
            feedback,
            report,
            two_way=transport.is_socket(out_fd),
            sync_wait=sync_wait,
            answer_timeout=answer_timeout,
            compat=compat,
        )
