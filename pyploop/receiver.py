# SPDX-License-Identifier: Apache-2.0
"""The receiving end of D1: stream -> file, with replies on the feedback channel.

Invariants: the answer to a SYNC comes after fdatasync; the answer to END comes
after the file is durable under its final name; a failure leaves nothing there.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from dataclasses import dataclass

from pyploop import _core, transport
from pyploop._core import Fault, RecvStats
from pyploop.errors import (
    ProtocolError,
    PyploopError,
    ReadError,
    TooLargeError,
    WriteError,
)
from pyploop.events import Reporter
from pyploop.sink import Sink
from pyploop.units import MIB, format_size
from pyploop.wire import d1
from pyploop.worker import run_cancellable

SLOTS = 16
SLOT_SIZE = 256 * 1024
"""Bytes of one write at most: stays in the cache, needs no large folios."""
MAX_FRAME = 64 * MIB
"""The largest frame taken, bytes: the largest cluster ploop can have."""
WINDOW = 32 * MIB
"""Dirty bytes of the target that are left to later writeback at most."""


@dataclass(frozen=True)
class Received:
    """A finished receipt."""

    stats: RecvStats
    syncs: int
    native: bool
    """The peer was a pyploop sender and has END acknowledged."""


def receive(
    path: str, in_fd: int, feedback_fd: int | None, report: Reporter, stall: float = 0.0
) -> Received:
    """Receive one image into a new file `path`.

    in_fd: pipe or socket, read until END and not further.  feedback_fd: where
    each SYNC is answered, or None.  stall: seconds without a byte after which
    the peer is given up, 0: never.
    """
    with Sink(path) as sink:
        size = transport.enlarge_pipe(in_fd)
        report.detail(f"Receiving into {path}" + (f", pipe of {format_size(size)}" if size else ""))
        pump = _core.Receiver(
            in_fd=in_fd,
            out_fd=sink.fd,
            slots=SLOTS,
            slot_size=SLOT_SIZE,
            max_frame=MAX_FRAME,
            stall_ms=int(stall * 1000),
            window=WINDOW,
            sparse=True,
        )
        channel = feedback_fd
        native, syncs = False, 0
        while True:
            try:
                kind, _, payload = run_cancellable(pump.run, pump.cancel)
            except Fault as fault:
                raise explain(fault, path) from fault
            if kind == _core.RECV_END:
                break
            if payload == d1.HELLO and not syncs and pump.stats.frames == 0:
                # A socket can carry the answer back even without -f.
                if channel is None and transport.is_socket(in_fd):
                    channel = in_fd
                if channel is not None:
                    native = _greet(channel, guessed=feedback_fd is None)
                    continue
            syncs += 1
            _answer(sink.sync, channel if feedback_fd is not None or native else None)
            report.detail(f"Synced {path}: {format_size(pump.stats.data)} so far")
        sink.set_size(pump.stats.image_size)
        _answer(sink.commit, channel if native else None, sink.keep)
        stats = pump.stats
        report.detail(
            f"Received {path}: {format_size(stats.image_size)}, {format_size(stats.data)} of data "
            f"in {stats.frames} frames"
        )
        report.event(
            "received",
            target=path,
            image_size=stats.image_size,
            data_bytes=stats.data,
            stream_bytes=stats.stream,
            frames=stats.frames,
            written_bytes=stats.written,
            hole_bytes=stats.holes,
            syncs=syncs,
            native_peer=native,
        )
        return Received(stats, syncs, native)


def _greet(channel: int, guessed: bool) -> bool:
    """Tell the sender who we are; false when a guessed channel has no reader:
    the sender has sent all and gone."""
    try:
        transport.write_all(channel, d1.HELLO_REPLY, "cannot answer the sender")
    except WriteError:
        if not guessed:
            raise
        return False
    return True


def _answer(
    durable: Callable[[], None], channel: int | None, before: Callable[[], None] | None = None
) -> None:
    """Do what makes the data durable, and tell the peer how it went; `before`
    is called just before it is told of success."""
    try:
        run_cancellable(durable)
    except PyploopError:
        if channel is not None:
            with contextlib.suppress(WriteError):  # the first error is the one to tell
                transport.write_all(channel, d1.FAILURE, "cannot answer the sender")
        raise
    if before is not None:
        before()
    if channel is not None:
        transport.write_all(channel, d1.SUCCESS, "cannot answer the sender")


def explain(fault: Fault, path: str) -> PyploopError:
    """The receiving pump's fault as an error that a person can act on."""
    where = f"frame {fault.frame}, byte {fault.stream} of the stream"
    left = f"; {path} was not created"
    if fault.stage == "write":
        return WriteError.of(f"cannot write {path} at {fault.pos}{left}", fault)
    code = fault.errno
    if code == errno.EBADMSG:
        return ProtocolError(
            f"bad marker 0x{fault.mark:08x} instead of 0x{d1.MARK:08x} at {where}{left}"
        )
    if code == errno.EMSGSIZE:
        return TooLargeError(
            f"frame of {fault.size} bytes is larger than {MAX_FRAME} at {where}{left}"
        )
    if code == errno.ERANGE:
        return WriteError(
            f"position {fault.pos} with size {fault.size} is past what a file can hold, "
            f"at {where}{left}"
        )
    if code == errno.ENODATA:
        return ReadError(f"the stream ended without END at {where} (did the sender fail?){left}")
    if code == errno.ETIMEDOUT:
        return ReadError(f"the sender fell silent at {where}{left}")
    return ReadError.of(f"cannot read the stream at {where}{left}", fault)
