# SPDX-License-Identifier: Apache-2.0
"""What the sender asks of the place where a copy goes.

A stream to a peer and a file here make the same promises: `sync` returns when
all that was sent is durable at the other end, as far as that can be known, and
says how it knows; `finish` likewise for the finished image under its final name.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pyploop._core import Fault, Known, Pump
from pyploop.diskcopy.framing import Framing
from pyploop.disks.backing import Thing
from pyploop.disks.source import Source
from pyploop.errors import ProtocolError, PyploopError, ReadError, SyncError, WriteError
from pyploop.freeze.deadline import Deadline
from pyploop.report.timeline import Heard
from pyploop.units import format_size
from pyploop.wire import d2


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
    deadline: Deadline
    """The copy's: when waiting for an answer ends, whatever else."""
    before_end: Callable[[], None]
    """Called with nothing but END's write, or the target's name, after it; what
    it raises ends the copy without a target."""
    heard: Heard | None
    """What came with the last answer, when the peer tells such things."""

    @property
    def end_is_answered(self) -> bool:
        """All that was sent has left our hands when `finish` returns; known
        after `hello`."""

    def announce(self, source: Source, *, compare_room: bool) -> int:
        """After `hello`: WriteError when the target cannot have the source's size, or,
        if it is to be compared, has no room for its data.  Returns the bytes that
        this wrote."""

    def things(self) -> set[Thing] | None:
        """What lies below the target, known after `announce`; None: not known, or
        not of this machine."""

    def refuse(self, error: PyploopError) -> None:
        """Nothing was sent, and nothing will be: the peer may say why."""

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
