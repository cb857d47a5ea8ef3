# SPDX-License-Identifier: Apache-2.0
"""A target behind a D2 or D3 stream: packets into a socket, each answered there.

Every answer is checked.  The handshake agrees on the features of D3 (wire/d3.py).
Zeroes are left out for a pyploop peer only, since the receiver of the C library may
write into a file that has data already.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyploop import _core
from pyploop._core import Fault, Known, Pump
from pyploop.diskcopy.framing import PLOOP, PYPLOOP
from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.resend import Resend
from pyploop.diskcopy.target import Packets, explain_write
from pyploop.diskcopy.write_mode import OTHER_SIDE
from pyploop.disks.backing import Thing
from pyploop.disks.source import Source
from pyploop.errors import CancelledError, PyploopError, ReadError, WriteError
from pyploop.freeze.deadline import Deadline
from pyploop.report.events import Reporter
from pyploop.report.timeline import Heard
from pyploop.system import descriptors
from pyploop.system.worker import run_cancellable
from pyploop.wire import d2, d3
from pyploop.wire.d1 import NO_FEATURES

if TYPE_CHECKING:
    from pyploop.diskcopy.prior import Contents

WINDOW = 4096
"""Packets that may be unanswered: 16 MiB in flight if each has 4 KiB."""


class PacketOutput:
    """D2 or D3 packets into a socket."""

    sink = _core.SINK_PACKETS
    header_size = d2.HEADER_PACKET
    write_mode = OTHER_SIDE
    old_contents = False
    end_is_answered = True
    features = NO_FEATURES
    proof = b""
    lanes: Lanes | None = None
    resend: Resend | None = None
    prior: Contents | None = None

    def __init__(
        self, fd: int, report: Reporter, *, answer_timeout: float, knows_async: bool = False
    ) -> None:
        """knows_async: the peer understands DATA_ASYNC even without a handshake.
        answer_timeout: seconds for one answer."""
        descriptors.no_delay(fd)
        self.fd = fd
        self.dialect = "D2"
        self.framing = PLOOP
        self.packets = Packets(unanswered=knows_async, window=WINDOW)
        self.deadline = Deadline(time.monotonic)
        self.before_end: Callable[[], None] = lambda: None
        self.heard: Heard | None = None
        self._report = report
        self._timeout = answer_timeout

    def announce(self, source: Source, *, compare_room: bool) -> int:
        return 0  # D2 and D3 have no message for it

    def things(self) -> set[Thing] | None:
        return None

    def refuse(self, error: PyploopError) -> None:
        pass

    def hello(self) -> int:
        """D3's handshake, which is a SYNC to an older receiver."""
        offered = d3.offer()
        greeting = d2.sync(features=offered)
        closed = "the receiver closed the stream before anything was sent (see its own message)"
        descriptors.write_all(self.fd, greeting, closed)
        limit = time.monotonic() + self._timeout
        (reply,) = d2.REPLY.unpack(
            descriptors.read_exactly(
                self.fd,
                d2.REPLY.size,
                lambda: min(limit, self.deadline.at),  # which a cancel moves
                "waiting for the receiver's first answer",
            )
        )
        try:
            features = d3.agreed(offered, reply)
        except ValueError:
            raise WriteError(f"the receiver failed: {d2.meaning(reply)}") from None
        if features & d3.PYPLOOP:
            self.framing = PYPLOOP
        digests = bool(features & d3.MD5)
        unanswered = self.packets.unanswered or reply != 0
        self.packets = Packets(unanswered, digests, WINDOW)
        name = "D3" if reply else "D2"
        extra = (", MD5" if digests else "") + (", async" if unanswered else "")
        self.dialect = f"{name}, {self.framing.name}{extra}"
        return len(greeting)

    def prepare(self, known: Known | None) -> None:
        pass  # the framing decides on zeroes

    def sync(self, pump: Pump, waiting: bool, start: bytes) -> str:
        self._ask(pump, d2.sync(digest=self.packets.digests), "SYNC")
        return "acknowledged"

    def header(self, pump: Pump, data: bytes) -> None:
        self._ask(pump, d2.packet(d2.DATA, 0, data, self.packets.digests), "the header")

    def finish(self, pump: Pump, size: int, start: bytes) -> str:
        self.before_end()
        self._ask(pump, d2.end(self.packets.digests), "END")
        return "acknowledged"

    def _ask(self, pump: Pump, packet: bytes, about: str) -> None:
        """Send a control packet.  Returns when it and all before it have succeeded."""
        timeout_ms = min(int(self._timeout * 1000), 2**31 - 1)
        try:
            run_cancellable(
                lambda: pump.ask(packet, timeout_ms),
                pump.cancel,
                lambda: self._check_deadline(about),
            )
        except Fault as fault:
            if fault.errno == errno.ECANCELED:
                raise CancelledError("the copy was cancelled; no target was made") from fault
            raise explain_write(fault) from fault

    def _check_deadline(self, about: str) -> None:
        if self.deadline.passed:
            raise ReadError(
                f"no answer to {about} from the receiver in time (it may be dead or stuck)"
            )
