# SPDX-License-Identifier: Apache-2.0
"""The receiving end: stream -> file, with answers in the dialect of the stream.

Invariants: a SYNC is answered after fdatasync.  END is answered after the file is
durable under its final name.  A failure before that leaves no file, and one after it
leaves the file.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pyploop import _core
from pyploop._core import Fault, Proof, Receiver, RecvStats
from pyploop.diskcopy import target_room, write_mode
from pyploop.diskcopy.lanes import LANE_STALL, Lanes
from pyploop.diskcopy.proof import TRIES
from pyploop.diskcopy.relink import Relink
from pyploop.diskcopy.replies import Answers, Feedback, NoAnswers, Replies, UnansweredError
from pyploop.diskcopy.sinks import Wanted, open_sink
from pyploop.diskcopy.target_file import Sink
from pyploop.diskcopy.write_mode import PRIOR, WRITERS, Write, WriteMode
from pyploop.disks import backing
from pyploop.errors import (
    NotSupportedError,
    ParameterError,
    ProtocolError,
    PyploopError,
    ReadError,
    SysfsError,
    TooLargeError,
    WriteError,
)
from pyploop.report.events import Reporter
from pyploop.system import descriptors
from pyploop.system.descriptors import ANSWER_TIMEOUT
from pyploop.system.worker import run_cancellable
from pyploop.units import MIB, SECTOR, format_size
from pyploop.wire import d1, d2

if TYPE_CHECKING:
    from pyploop.diskcopy.prior import Holder
    from pyploop.diskcopy.target_device import DeviceSink

SLOTS = 16
SLOT_SIZE = 256 * 1024
"""Bytes of one write at most: stays in the cache, needs no large folios."""
DIRECT_SLOTS = 8
DIRECT_SLOT_SIZE = MIB
"""Where it is written past the page cache: what a disk takes at once, several under way, and
room to read meanwhile."""
MAX_FRAME = 64 * MIB
"""Bytes of the largest frame that is accepted: the largest cluster of ploop."""
WINDOW = 32 * MIB
"""Bytes of the target that may be dirty, and left to later writeback."""


@dataclass(frozen=True)
class Received:
    """A finished copy, as the receiver saw it."""

    target: str
    stats: RecvStats
    syncs: int
    native: bool
    """The peer is a pyploop sender, and END was acknowledged."""
    dialect: str
    write_mode: str
    """How the target was written, in words."""
    proof: Proof | None
    """What both ends have compared; None: none was kept."""

    def fields(self) -> dict[str, Any]:
        """Those of the event `received`."""
        stats = self.stats
        return {
            "target": self.target,
            "image_size": stats.image_size,
            "data_bytes": stats.data,
            "stream_bytes": stats.stream,
            "frames": stats.frames,
            "written_bytes": stats.written,
            "hole_bytes": stats.holes,
            "huge_bytes": stats.huge,
            "compressed_bytes": stats.compressed,
            "compressed_frames": stats.compressed_frames,
            "direct_bytes": stats.direct,
            "filled_bytes": stats.filled,
            "syncs": self.syncs,
            "native_peer": self.native,
            "dialect": self.dialect,
            "write_mode": self.write_mode,
            "root": None if self.proof is None else self.proof.root().hex(),
        }


def receive(
    path: str,
    in_fd: int,
    feedback_fd: int | None,
    report: Reporter,
    stall: float = 0.0,
    *,
    expected: Answers | None = None,
    sink: Sink | DeviceSink | None = None,
    owner_undoes: bool = False,
    largest: int = 0,
    opened: Callable[[Callable[[], None]], None] = lambda _: None,
    to_device: bool = False,
    write: Write = "auto",
    lanes: Lanes | None = None,
    relink: Relink | None = None,
) -> Received:
    """Receive one image into a new file `path`, in the dialect of its marker.

    in_fd: pipe or socket, read until END and not further.  feedback_fd: where each
    SYNC of D1 is answered, or None.  stall: seconds without a byte until the peer is
    given up; 0: never.  expected: where a failure before the first marker is answered.
    sink: the file that becomes `path`; None: a new one.  owner_undoes: see Sink.
    largest: bytes of the image at most; 0: any.  opened: called with what cancels the receipt
    from another thread.  to_device: onto the block device `path`.  lanes: further streams
    for the data, if the sender offers to use some.  relink: gives another connection when
    this one fails, if the sender can go on with it, too.  PyploopError.
    """
    receipt = _Receipt(
        path,
        in_fd,
        feedback_fd,
        report,
        expected=expected,
        sink=sink,
        owner_undoes=owner_undoes,
        largest=largest,
        opened=opened,
        to_device=to_device,
        write=write,
        lanes=lanes,
        relink=relink,
    )
    try:
        return receipt.run(stall)
    except PyploopError as e:
        # An unfinished target is removed before the peer gets the answer.
        receipt.answers.failed(receipt.event, e)
        raise
    finally:
        if lanes is not None:
            lanes.refuse("the copy has ended")
            receipt.end_lanes()


class _Target:
    """The target, as a pyploop sender asks about it before the first byte."""

    def __init__(self, sink: Sink | DeviceSink) -> None:
        self._sink = sink

    @cached_property
    def below(self) -> backing.Below:
        return backing.of_file(self._sink.fd)

    def expect(self, size: int) -> None:
        if not isinstance(self._sink, Sink):
            self._sink.expect(size)
            return
        fstype = self.below.file_systems[0].fstype
        target_room.check_size(self._sink.fd, size, fstype, self._sink.path)

    @property
    def prior(self) -> Holder | None:
        return self._sink if self._sink.has_prior else None

    def place(self) -> d1.Place:
        left, _ = target_room.of_target(self.below)
        has = os.fstat(self._sink.fd).st_blocks * SECTOR
        return d1.Place(
            backing.boot(),
            d1.UNKNOWN_ROOM if left is None else left + has,
            tuple(sorted(self.below.things | self._sink.older())),
        )


class _Receipt:
    """Receives one image.  `event` and `answers` are needed after a failure, too."""

    def __init__(
        self,
        path: str,
        in_fd: int,
        feedback_fd: int | None,
        report: Reporter,
        *,
        expected: Answers | None,
        sink: Sink | DeviceSink | None,
        owner_undoes: bool,
        largest: int,
        opened: Callable[[Callable[[], None]], None],
        to_device: bool,
        write: Write,
        lanes: Lanes | None,
        relink: Relink | None,
    ) -> None:
        self._opened, self._to_device, self._write = opened, to_device, write
        self._sink, self._owner_undoes, self._largest = sink, owner_undoes, largest
        self._lanes, self._relink = lanes, relink
        self._path, self._in_fd, self._feedback = path, in_fd, feedback_fd
        self._report = report
        self.answers: Answers = expected or NoAnswers()
        self.event = 0
        """The SYNC or END that is not answered yet, or 0."""
        self._pump: Receiver | None = None
        self._cancelled = False
        self._had = 0
        """Bytes of data that the target had before."""
        self._stall = 0.0

    def run(self, stall: float) -> Received:
        path, report = self._path, self._report
        self._stall = stall
        with self._sink or self._new_sink() as sink:
            size = descriptors.enlarge_pipe(self._in_fd)
            descriptors.no_delay(self._in_fd)
            if self._feedback is not None:
                descriptors.no_delay(self._feedback)
            pipe = f", pipe of {format_size(size)}" if size else ""
            report.detail(f"Receiving into {path}{pipe}")
            target = _Target(sink)
            self._check_lanes(sink)
            mode = self._mode(sink, target)
            pump = _core.Receiver(
                in_fd=self._in_fd,
                out_fd=sink.fd,
                slots=DIRECT_SLOTS if mode.direct else SLOTS,
                slot_size=DIRECT_SLOT_SIZE if mode.direct else SLOT_SIZE,
                max_frame=MAX_FRAME,
                stall_ms=int(stall * 1000),
                window=WINDOW,
                sparse=True,
                old_end=sink.old_end,
                largest=self._largest if isinstance(sink, Sink) else sink.size,
                lane_stall_ms=int(LANE_STALL * 1000),
                reply_fd=self._in_fd if descriptors.is_socket(self._in_fd) else -1,
                fill=sink.old_contents,
                direct=mode.direct,
                writers=WRITERS,
                ahead=mode.ahead,
            )
            self._pump = pump
            self._opened(self._cancel)
            try:
                syncs = self._serve(pump, sink, target)
            finally:
                if self.answers.telling is not None:
                    self.answers.telling.end()
            sink.set_size(pump.stats.image_size)
            run_cancellable(sink.commit)
            try:
                self.answers.done(self.event, _times(pump, sink, named=time.monotonic_ns()))
            except UnansweredError as e:
                # The sender learns it by the next connection.
                self._report.info(f"{path} is complete, but the sender does not know yet: {e}")
            return self._finished(pump.stats, syncs, mode)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._pump is not None:
            self._pump.cancel()

    def _new_sink(self) -> Sink | DeviceSink:
        wanted = Wanted(self._to_device)
        return open_sink(self._path, self._report, wanted, owner_undoes=self._owner_undoes)

    def _mode(self, sink: Sink | DeviceSink, target: _Target) -> WriteMode:
        if sink.has_prior:
            return PRIOR
        try:
            mode = write_mode.choose(sink.fd, self._path, self._write, target.below)
        except (OSError, SysfsError) as e:  # a device below it was removed just now
            mode = WriteMode(f"buffered (what lies below it cannot be found: {e})")
        self._report.detail(f"Writing {self._path}: {mode.words}")
        return mode

    def end_lanes(self) -> None:
        """Their descriptors are not used any more."""
        if self._pump is not None:
            self._pump.cancel()
            self._pump.end_lanes()

    def _check_lanes(self, sink: Sink | DeviceSink) -> None:
        """Several streams are not for every target."""
        why = ""
        if sink.old_contents:
            why = "holes of the source are found in the order of one stream"
        elif self._write == "direct":
            why = "O_DIRECT is for one stream (--write direct)"
        if self._lanes is not None and why:
            self._lanes.refuse(why)
            self._lanes = None
            self._report.detail(f"The data come over one stream: {why}")

    def _serve(self, pump: Receiver, sink: Sink | DeviceSink, target: _Target) -> int:
        """Until END; returns the number of SYNCs."""
        syncs, dialect = 0, _core.DIALECT_NONE
        while True:
            self.event = 0
            try:
                event, pos, payload = run_cancellable(pump.run, pump.cancel)
            except Fault as fault:
                self._choose(pump, target, dialect)
                telling = self.answers.telling
                if telling is not None and isinstance(telling.failure, PyploopError):
                    raise telling.failure from fault
                witness = self.answers.witness
                if witness is not None and witness.refused and fault.errno == errno.ENODATA:
                    raise witness.failure(self._path, "the sender gave up") from fault
                if fault.errno == errno.EFBIG and not isinstance(sink, Sink):
                    least = fault.pos + fault.size
                    raise sink.too_small(f"a source of at least {least} bytes") from fault
                raise explain(fault, self._path, pump.dialect, sink.left) from fault
            finally:
                if not isinstance(sink, Sink):
                    sink.touched = bool(pump.stats.data)
            dialect = self._choose(pump, target, dialect)
            if event == _core.RECV_BROKEN:
                self._bridge(pump, sink)
                continue
            try:
                if self._handled(event, pos, payload, pump, sink):
                    return syncs
                syncs += self.event == _core.RECV_SYNC
            except UnansweredError:
                pump.disconnect()  # and with that the next run ends

    def _handled(
        self, event: int, pos: int, payload: bytes, pump: Receiver, sink: Sink | DeviceSink
    ) -> bool:
        """Answer what came.  True: it was the end."""
        if event == _core.RECV_LOST:
            self._go_on_without(pump, sink)
            return False
        if event == _core.RECV_SYNC and self.answers.greeted(pos, payload):
            self._begin(pump)
            self._report.detail(f"The sender speaks {self.answers.dialect}")
            return False
        self._wait_for_digests(sink)
        if event == _core.RECV_END:
            self.event = event
            return self._agrees(pump, sink)
        if event == _core.RECV_QUESTION:
            assert self.answers.witness is not None
            self.answers.witness.answer(pos - 1, pump.proof_data or b"")
            return False
        self.event = event
        run_cancellable(sink.sync)
        lanes = self._lanes is not None and self._lanes.agreed
        if lanes:
            self._root(sink)  # before the answer: lanes write by themselves after it
        self.answers.done(event, _times(pump, sink))
        pump.synced()
        if not lanes:
            self._root(sink)
        self._report.detail(f"Synced {self._path}: {format_size(pump.stats.data)} so far")
        return False

    # ---- another connection

    def _begin(self, pump: Receiver) -> None:
        """After each greeting."""
        if self._relink is not None and _resumes(self.answers):
            self._relink.begin(pump.disconnect)

    def _bridge(self, pump: Receiver, sink: Sink | DeviceSink) -> None:
        """The stream broke off, and what came is written: go on with another one."""
        assert self._relink is not None and isinstance(self.answers, Feedback)
        ends = pump.lost()
        for lane, received in ends:
            stream = f"Lane {lane}" if lane else "The stream"
            self._report.info(f"{stream} broke off; {received} bytes of it had arrived")
        why = ReadError(f"the stream ended without END (see the sender's message){sink.left}")
        if self.answers.telling is not None and not self.answers.telling.over:
            raise why.follows()  # what the sender has of the digests is not known
        again = self._relink.again(why.follows(), ends, lambda: self._cancelled)
        descriptors.enlarge_pipe(again.rfd)
        self.answers.redirect(again.wfd)
        pump.relink(again.rfd)
        self._relink.over()

    def _wait_for_digests(self, sink: Sink | DeviceSink) -> None:
        """What the target had is told before anything else is answered."""
        if not sink.has_prior:
            return
        if self.answers.telling is None:
            raise ProtocolError(
                f"the sender does not compare what it sends with what {self._path} had{sink.left}"
            )
        telling = self.answers.telling
        self._had = run_cancellable(lambda: telling.wait(self._stall or ANSWER_TIMEOUT))

    def _root(self, sink: Sink | DeviceSink) -> None:
        """So that little of the tree is left for END."""
        if self.answers.witness is not None:
            self.answers.witness.proof.root(sink.fd)

    def _agrees(self, pump: Receiver, sink: Sink | DeviceSink) -> bool:
        """After END.  False: the target is not what was sent; the sender may send blocks
        again.  TargetDiffers: that was the last time."""
        witness = self.answers.witness
        if witness is None or witness.agrees(pump.proof_data, sink.fd):
            return True
        self.event = 0
        witness.refuse(_times(pump, sink))
        if witness.refused == TRIES:
            raise witness.failure(self._path, "blocks were sent again already")
        self._report.note(
            f"What was written to {self._path} is not what the sender sent: {witness.why}"
        )
        pump.reopen()
        return False

    def _go_on_without(self, pump: Receiver, sink: Sink | DeviceSink) -> None:
        """Lanes have ended: let the sender send again what did not arrive."""
        ends = pump.lost()
        for lane, received in ends:
            self._report.info(f"Lane {lane} has ended; {received} bytes of it had arrived")
        self.answers.lost(ends, _times(pump, sink))

    def _choose(self, pump: Receiver, target: _Target, before: int) -> int:
        """Choose how to answer, once the marker has shown the dialect."""
        if pump.dialect != before:
            if pump.dialect == _core.DIALECT_D1:
                self.answers = Feedback(
                    pump,
                    self._in_fd,
                    self._feedback,
                    target,
                    self._lanes,
                    resumes=self._relink is not None,
                )
            elif descriptors.is_socket(self._in_fd):
                self.answers = Replies(self._in_fd, pump)
        return pump.dialect

    def _finished(self, stats: RecvStats, syncs: int, mode: WriteMode) -> Received:
        written = mode.report(stats.direct, lanes=self._lanes is not None and self._lanes.used)
        self._report.detail(
            f"Received {self._path}: {format_size(stats.image_size)}, "
            f"{format_size(stats.data)} of data in {stats.frames} frames"
            + (f", {format_size(stats.huge)} made as huge pages" if stats.huge else "")
            + (f", {format_size(stats.compressed)} came compressed" if stats.compressed else "")
            + (f"; it had {format_size(self._had)} before" if self._had else "")
            + f"; written: {written}"
        )
        answers = self.answers
        proof = None if answers.witness is None else answers.witness.proof
        if proof is not None:
            self._report.info(f"Proof: {self._path} is what was sent, root {proof.root().hex()}")
        done = Received(self._path, stats, syncs, answers.native, answers.dialect, written, proof)
        self._report.event("received", **done.fields())
        return done


def _resumes(answers: Answers) -> bool:
    return isinstance(answers, Feedback) and d1.Feature.RESUME in answers.features


def _times(pump: Receiver, sink: Sink | DeviceSink, named: int = 0) -> d1.Times:
    came = pump.arrival
    return d1.Times(came.first, came.arrived, came.written, sink.synced_ns, named, dirty=came.dirty)


def explain(fault: Fault, path: str, dialect: int, left: str) -> PyploopError:
    """The error that says why the receiving pump failed.  path: the target.  left: what
    becomes of it, as the end of a sentence."""
    where = f"frame {fault.frame}, byte {fault.stream} of the stream"
    if fault.lane:
        where += f" (lane {fault.lane})"
    code = fault.errno
    if fault.stage == "write":
        return WriteError.of(f"cannot write {path} at byte {fault.pos}{left}", fault, path=path)
    if fault.stage == "reply":
        return WriteError.of(f"cannot answer the sender at {where}{left}", fault)
    if code == errno.EBADMSG:
        return ProtocolError(f"{_bad_marker(fault.mark, dialect)} at {where}{left}")
    if code == errno.EMSGSIZE:
        return TooLargeError(
            f"a frame of {fault.size} bytes is larger than the {MAX_FRAME} bytes allowed, at "
            f"{where}{left}"
        )
    if code == errno.EFBIG:
        return TooLargeError(
            f"{fault.size} bytes for position {fault.pos} are past the size that the source "
            f"announced, at {where}{left}"
        )
    if code == errno.ERANGE:
        return WriteError(
            f"{fault.size} bytes for position {fault.pos} are past the largest size of a file, "
            f"at {where}{left}"
        )
    if code == errno.EOPNOTSUPP:
        what = d2.name_of(fault.type, fault.command)
        return NotSupportedError(f"{what} is not supported, at {where}{left}")
    if code == errno.EPROTO and fault.mark == d1.PROOF_MARK:
        return ProtocolError(f"a PROOF frame has {fault.size} bytes, at {where}{left}")
    if code == errno.EPROTO:
        return ProtocolError(f"a command has {fault.size} bytes, at {where}{left}")
    if code == errno.EBADE:
        return ProtocolError(f"the data do not match their MD5, at {where}{left}")
    if code == errno.EILSEQ:
        return ProtocolError(
            f"a compressed frame does not give the {fault.size} bytes that it announces, at "
            f"{where}{left}"
        )
    if code == errno.ENOTSOCK:
        return ParameterError(
            f"the input is a pipe, but a D2 stream is answered on the socket it comes from{left}",
            hint="give the receiver a socket",
        )
    if code == errno.ENODATA:
        return ReadError(
            f"the stream ended without END at {where} (see the sender's message){left}"
        ).follows()
    if code == errno.ETIMEDOUT:
        return ReadError(
            f"the sender sends nothing, or next to nothing (--timeout), at {where}{left}"
        )
    return ReadError.of(f"cannot read the stream at {where}{left}", fault)


def _bad_marker(mark: int, dialect: int) -> str:
    names = {d1.MARK: "D1", d2.MARK: "D2"}
    if dialect == _core.DIALECT_NONE:
        return f"bad marker 0x{mark:08x} instead of 0x{d1.MARK:08x} or 0x{d2.MARK:08x}"
    expected = d1.MARK if dialect == _core.DIALECT_D1 else d2.MARK
    if mark in names:
        return f"a {names[mark]} frame in a {names[expected]} stream"
    return f"bad marker 0x{mark:08x} instead of 0x{expected:08x}"
