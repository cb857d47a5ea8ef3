# SPDX-License-Identifier: Apache-2.0
"""What the sender asks of the place where a copy goes.

A stream to a peer and a local file make the same promises.  `sync` returns when
all that was sent is durable at the target, as far as that can be known, and says
how it knows.  `finish` does the same for the complete image under its final name.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pyploop._core import Fault, Known, Pump
from pyploop.diskcopy.framing import Framing
from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.resend import Resend
from pyploop.diskcopy.write_mode import WriteMode
from pyploop.disks.backing import Thing
from pyploop.disks.source import Source
from pyploop.errors import ProtocolError, PyploopError, ReadError, SyncError, WriteError
from pyploop.freeze.deadline import Deadline
from pyploop.report.timeline import Heard
from pyploop.units import format_size
from pyploop.wire import d2
from pyploop.wire.d1 import Feature

if TYPE_CHECKING:
    from pyploop.diskcopy.prior import Contents


@dataclass(frozen=True)
class Packets:
    """How D2's data packets are sent.  unanswered: as DATA_ASYNC.  digests: with an MD5.
    window: packets that may be unanswered."""

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
    features: Feature
    """Of a stream of frames: what the peer has agreed to.  Known after `announce`."""
    proof: bytes
    """The frame that says what the target must be, for `finish` to send; empty: none."""
    write_mode: WriteMode
    """How a file or device here is written."""
    old_contents: bool
    """It is full of what it had before: holes of the source must become zeroes there."""
    lanes: Lanes | None
    """Further streams that take part, if the peer agrees to Feature.LANES."""
    prior: Contents | None
    """What the target had before: only what differs is sent in the first pass.  Known after
    `announce`; None: the target is new, or all of it is overwritten."""
    header_size: int
    """Bytes that `header` takes."""
    deadline: Deadline
    """The copy's: when waiting for an answer ends, whatever else."""
    before_end: Callable[[], None]
    """Called right before END is written, or the target gets its name.  When it raises,
    the copy ends without a target."""
    heard: Heard | None
    """The times that came with the last answer; None: the peer sends none."""

    @property
    def resend(self) -> Resend | None:
        """Lets the copy go on when its connection fails; None: it fails with it.  Known after
        `announce`."""

    @property
    def end_is_answered(self) -> bool:
        """When `finish` returns, all that was sent has been read by the peer.  Known
        after `hello`."""

    def announce(self, source: Source, *, compare_room: bool) -> int:
        """After `hello`: WriteError when the target cannot have the source's size, or has
        no room for its data (compare_room).  Returns the bytes written."""

    def things(self) -> set[Thing] | None:
        """What lies below the target.  Known after `announce`; None: not known, or on
        another machine."""

    def refuse(self, error: PyploopError) -> None:
        """Nothing was sent, and nothing will be.  Let the peer say why, if it can."""

    def hello(self) -> int:
        """Before all else: learn what the peer can do, and choose the framing.
        Returns the bytes written."""

    def prepare(self, known: Known | None) -> None:
        """After `hello`, before the first block: tell `known` what data the target may have."""

    def sync(self, pump: Pump, waiting: bool, start: bytes) -> str:
        """Returns how it is known to be durable: 'acknowledged', 'local', 'waited'
        (--sync-wait) or 'unknown'.  waiting: wait that long for a peer that cannot
        answer.  start: the image's first four bytes, since receivers before 1.11 write
        a SYNC's payload at position 0."""

    def header(self, pump: Pump, data: bytes) -> None:
        """Write `data` at position 0, last of all blocks."""

    def finish(self, pump: Pump, size: int, start: bytes) -> str:
        """After the last block: returns when the image is complete and durable, as far
        as that can be known.  `start` and the result are as those of `sync`.
        TargetDiffers: the target is not what `proof` says; blocks can be sent again."""


def explain_write(fault: Fault) -> PyploopError:
    """The error that says why the sending pump could not write."""
    if fault.stage == "reply" and fault.errno != errno.EPIPE:
        return _explain_reply(fault)
    if fault.errno == errno.EPIPE:
        return WriteError(
            f"the receiver closed the stream after {format_size(fault.stream)} "
            "(see its own message); the source was not changed"
        ).follows()
    if fault.errno == errno.ETIMEDOUT:
        return WriteError(
            f"the receiver reads nothing, or next to nothing (--timeout), after "
            f"{format_size(fault.stream)}"
        )
    return WriteError.of(f"cannot write the stream after {format_size(fault.stream)}", fault)


def _explain_reply(fault: Fault) -> PyploopError:
    where = f"packet {fault.frame}, byte {fault.stream} of the stream"
    if fault.errno == errno.EREMOTEIO:
        kind = SyncError if fault.reply == SyncError.exit_code else WriteError
        return kind(f"the receiver failed: {d2.meaning(fault.reply)} (at {where})")
    if fault.errno == errno.EPROTO:
        return ProtocolError(f"the receiver sent more answers than there were requests ({where})")
    if fault.errno == errno.ETIMEDOUT:
        return ReadError(f"the receiver does not answer {where} (it may be dead or stuck)")
    return ReadError.of(f"cannot read the receiver's answer to {where}", fault)
