# SPDX-License-Identifier: Apache-2.0
"""A target behind a D1 stream.  Its peer may answer, or not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from pyploop import _core
from pyploop._core import Known, Pump
from pyploop.diskcopy import pipe_reader, target_room
from pyploop.diskcopy.framing import EXACT, NATIVE, PERHAPS_PLOOP, PLOOP, PYPLOOP, Compat, Framing
from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.proof import Ask, TargetDiffers
from pyploop.diskcopy.relink import Again, LinkLost, Relink, attempt
from pyploop.diskcopy.resend import Resend
from pyploop.diskcopy.target import Packets, explain_write
from pyploop.diskcopy.write_mode import OTHER_SIDE
from pyploop.disks import backing
from pyploop.disks.backing import Thing
from pyploop.disks.image import HEADER_FRAME
from pyploop.disks.source import Source
from pyploop.errors import ProtocolError, PyploopError, SyncError, WriteError
from pyploop.freeze.deadline import Deadline
from pyploop.report.events import Reporter
from pyploop.report.timeline import Heard
from pyploop.system import descriptors
from pyploop.units import BLOCK
from pyploop.wire import d1

if TYPE_CHECKING:
    from pyploop.diskcopy.prior import Contents

HELLO_WAIT = 2.0
"""Seconds to wait for the first answer on a socket, whose receiver may never
answer."""


class StreamOutput:
    """D1 frames into a pipe or socket, answers from the feedback descriptor."""

    sink = _core.SINK_FRAMES
    packets = Packets()
    write_mode = OTHER_SIDE
    old_contents = False
    prior: Contents | None = None
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
        offered: d1.Feature = d1.NO_FEATURES,
        lanes: Lanes | None = None,
        relink: Relink | None = None,
    ) -> None:
        """fd: non-blocking.  feedback: where answers are read.  two_way: `fd` is a
        socket, so answers may come there without `feedback`.  Times in seconds.
        offered: what a pyploop peer may agree to.  lanes: further streams for data, which
        are offered, too.  relink: gives another connection when this one fails, if the
        peer can go on with it, too."""
        self.fd = fd
        self.dialect = "D1"
        self.framing = NATIVE
        self.features = d1.NO_FEATURES
        self._compat = compat
        self.lanes = lanes
        self._offered = offered if lanes is None else offered | d1.Feature.LANES
        if relink is not None:
            self._offered |= d1.Feature.RESUME
        self._header: bytes | None = None
        self._feedback = feedback
        self._answers = feedback if feedback is not None else (fd if two_way else None)
        self._report = report
        self._sync_wait = sync_wait
        self._timeout = answer_timeout
        self._greeted = False
        self._timed = False
        self._asked = 0.0
        self._place: d1.Place | None = None
        self._reader: set[Thing] | None = None
        self.heard: Heard | None = None
        self.proof: bytes = b""
        self.deadline = Deadline(time.monotonic)
        self._resend = Resend(report, self.deadline, explain_write, relink, self._redirect)
        self.before_end: Callable[[], None] = lambda: None

    @property
    def resend(self) -> Resend | None:
        return self._resend if self._resend.agreed else None

    def _redirect(self, again: Again) -> None:
        self._header = None  # it comes again at the end
        self.fd = again.wfd
        self._answers = self._feedback = again.rfd

    @property
    def end_is_answered(self) -> bool:
        return self._answers is not None and not self.framing.exact

    def hello(self) -> int:
        self.framing = self._find_framing()
        self.dialect = f"D1, {self.framing.name}"
        hellos = int(self._greeted) + int(self.framing is PYPLOOP)
        return hellos * len(d1.sync(d1.HELLO))

    def _find_framing(self) -> Framing:
        if self._compat == "ploop":
            # The C tool reads no answers on the socket itself.
            self._answers = self._feedback
            return EXACT
        unknown = NATIVE if self._compat == "native" else PERHAPS_PLOOP
        if self._answers is None:
            self._report.info(
                "The peer has no way to answer (no -f, not a socket): nothing is acknowledged"
            )
            return unknown
        answer = self._greet(self._answers)
        if answer is None:
            self._answers = None
            self._report.info("The peer does not answer: nothing is acknowledged")
            return unknown
        if answer == d1.HELLO_REPLY:
            self._ask_for_times(self._answers)
            return PYPLOOP
        if answer == d1.FAILURE:
            raise SyncError(
                "the receiver cannot make its target durable (see its own message); nothing was "
                "sent"
            ).follows()
        if answer != d1.SUCCESS:
            raise ProtocolError(
                f"the receiver answered {answer!r} to the first SYNC, which is no answer "
                "of pyploop or ploop; nothing was sent",
                hint="check that -o and -f lead to one and the same receiver",
            )
        return NATIVE if self._compat == "native" else PLOOP

    def _greet(self, answers: int) -> bytes | None:
        """Send HELLO and return its answer; None: a socket without feedback has none."""
        closed = "the receiver closed the stream before anything was sent (see its own message)"
        if descriptors.is_closed(self.fd):
            raise WriteError(closed).follows()
        descriptors.write_all(self.fd, d1.sync(d1.HELLO), closed)
        self._greeted = True
        if self._feedback is None:
            deadline = time.monotonic() + HELLO_WAIT
            if not _readable_before(answers, deadline):
                return None
        return self._read(answers)

    def _ask_for_times(self, answers: int) -> None:
        """HELLO_2.  A peer of version 1 takes it as a SYNC."""
        self._asked = time.monotonic()
        descriptors.write_all(self.fd, d1.sync(d1.HELLO_2), "cannot ask the receiver")
        answer = self._read(answers)
        if answer == d1.FAILURE:
            raise SyncError(
                "the receiver cannot make its target durable (see its own message); nothing was "
                "sent"
            ).follows()
        if answer not in (d1.SUCCESS, d1.HELLO_2_REPLY):
            raise ProtocolError(
                f"the receiver answered {answer!r} to the second SYNC; nothing was sent"
            )
        self._timed = answer == d1.HELLO_2_REPLY
        self._read_times(answers)

    def announce(self, source: Source, *, compare_room: bool) -> int:
        written = self._ask_for_place(source, compare_room) if self._timed else 0
        if self._place is None:
            self._reader = pipe_reader.below_target(self.fd)
        elif self._offered:
            written += self._offer_features()
        return written

    def _offer_features(self) -> int:
        """FEATURES.  A peer of version 3 takes it as a SYNC."""
        assert self._answers is not None
        question = d1.sync(d1.FEATURES, self._offered)
        self._asked = time.monotonic()
        descriptors.write_all(self.fd, question, "cannot ask the receiver")
        answer = self._read(self._answers)
        self._read_times(self._answers)
        if answer == d1.FAILURE:
            raise SyncError(
                "the receiver cannot make its target durable (see its own message); nothing was "
                "sent"
            )
        if answer == d1.FEATURES_REPLY:
            accepted, _ = d1.ACCEPTED.unpack(self._read(self._answers, d1.ACCEPTED.size))
            if accepted & ~int(self._offered):  # ~ of a Feature leaves out unknown bits
                raise ProtocolError(
                    f"the receiver accepted features ({accepted:#x}) that were not offered "
                    f"({self._offered:#x}); nothing was sent"
                )
            self.features = d1.Feature(accepted)
            self._resend.agreed = d1.Feature.RESUME in self.features
            if d1.Feature.DIGESTS in self.features:
                from pyploop.diskcopy import prior  # few need it

                self.prior = prior.of_peer(
                    self._answers,
                    self.fd,
                    self._read(self._answers, _core.PRIOR_KEY),
                    self._timeout,
                    lambda: self.deadline.at,
                )
        if self.lanes is not None and not self.features & d1.Feature.LANES:
            self.lanes.refuse("the receiver takes none")
        if answer not in (d1.SUCCESS, d1.FEATURES_REPLY):
            raise ProtocolError(
                f"the receiver answered {answer!r} to the fourth SYNC; nothing was sent"
            )
        return len(question)

    def _ask_for_place(self, source: Source, compare_room: bool) -> int:
        """PLACE.  A peer of version 2 takes it as a SYNC."""
        assert self._answers is not None
        question = d1.sync(d1.PLACE, source.size)
        self._asked = time.monotonic()
        descriptors.write_all(self.fd, question, "cannot ask the receiver")
        answer = self._read(self._answers)
        self._read_times(self._answers)
        if answer == d1.FAILURE:
            raise WriteError(
                f"the receiver cannot take the {source.size} bytes of {source.path} (see its own "
                "message); nothing was sent",
                path=source.path,
            ).follows()
        if answer not in (d1.SUCCESS, d1.PLACE_REPLY):
            raise ProtocolError(
                f"the receiver answered {answer!r} to the third SYNC; nothing was sent"
            )
        if answer == d1.PLACE_REPLY:
            self._read_place(self._answers)
            if compare_room and self._place and self._place.room != d1.UNKNOWN_ROOM:
                try:
                    target_room.check(source, self._place.room, "the receiver")
                except WriteError as e:
                    self.refuse(e)
                    raise
        return len(question)

    def _read_place(self, fd: int) -> None:
        try:
            self._place = d1.Place.unpack(partial(self._read, fd))
        except ValueError as e:
            raise ProtocolError(
                f"the receiver sent a wrong description of its target: {e}; nothing was sent"
            ) from e

    def things(self) -> set[Thing] | None:
        here = backing.boot()
        if self._place is None:
            return self._reader
        if self._place.boot != here or not any(here):
            return None
        return set(self._place.things)

    def refuse(self, error: PyploopError) -> None:
        if self._place is not None:
            frame = d1.sync(d1.REFUSED, error.exit_code)
            with contextlib.suppress(WriteError):
                descriptors.write_all(self.fd, frame, "cannot refuse the receiver")

    def prepare(self, known: Known | None) -> None:
        # A receiver before 1.11 writes HELLO's bytes at 0: so block 0 is always sent.
        if known is not None and self._greeted:
            known.assume_data(0, BLOCK)

    def _read_times(self, fd: int) -> None:
        if self._timed:
            record = self._read(fd, d1.TIMES.size)
            self.heard = Heard(self._asked, time.monotonic(), d1.Times.unpack(record))

    def _read(self, fd: int, size: int = d1.REPLY_SIZE) -> bytes:
        limit = time.monotonic() + self._timeout
        again = self._resend
        try:
            return descriptors.read_exactly(
                fd,
                size,
                # which a cancel moves
                lambda: 0.0 if again.disconnected else min(limit, self.deadline.at),
                "reading the feedback",
                self.fd,
            )
        except PyploopError as e:
            if again.agreed and (e.peer_failed or again.disconnected):
                raise LinkLost(str(e)).follows() from e
            if not isinstance(e, ProtocolError):
                raise
            if self._feedback is not None:
                raise
            # It is the stream itself: a write would fail, too.
            closed = "the receiver closed the stream (see its own message)"
            raise WriteError(closed).follows() from e

    def _answer(self, fd: int, about: str, ask: Ask | None = None) -> list[tuple[int, int]] | None:
        """None: all is there.  Else the lanes that have ended, and what arrived of them.
        TargetDiffers: as `finish`."""
        answer = self._read(fd)
        if answer == d1.LOST_LANES and self.features & d1.Feature.LANES:
            self._read_times(fd)
            try:
                return d1.unpack_lost(partial(self._read, fd))
            except ValueError as e:
                raise ProtocolError(f"the receiver sent a wrong answer to {about}: {e}") from e
        if answer == d1.DIFFERS and self.proof and ask is not None:
            self._read_times(fd)
            raise TargetDiffers(
                "the target is not what was sent (the roots of the proof differ); no target was "
                "made",
                ask=ask,
            )
        if answer == d1.FAILURE:
            raise SyncError(
                f"the receiver failed to make its target durable (its answer to {about}; see its "
                "own message)"
            ).follows()
        if answer != d1.SUCCESS:
            raise ProtocolError(f"the receiver answered {answer!r} to {about}")
        self._read_times(fd)
        return None

    def _ask(
        self, pump: Pump, about: str, write: Callable[[], None], *, ask: Ask | None = None
    ) -> None:
        """Write SYNC or END, and wait for the answer.  What lanes have lost goes again
        first, until nothing was lost."""
        while True:
            assert self._answers is not None
            self._asked = time.monotonic()
            try:
                write()
                lost = self._answer(self._answers, about, ask)
            except LinkLost as e:
                if self._resend.frozen:
                    raise
                self._resend.bridge(pump, e)
                continue
            if not self._settle(pump, lost or []):
                if lost is None:
                    return
            elif lost is None:
                raise ProtocolError(f"the receiver answered {about}, but lanes have lost data")
            else:
                self._resend.run(pump)
                if self._header is not None:
                    self._write(pump, d1.data(0, self._header))

    def _settle(self, pump: Pump, ends: list[tuple[int, int]]) -> bool:
        """True: lanes have ended, and something must go again."""
        if not self.features & (d1.Feature.LANES | d1.Feature.RESUME):
            return False
        return self._resend.settle(pump, ends)

    def sync(self, pump: Pump, waiting: bool, start: bytes) -> str:
        if self.framing.exact and not waiting:
            return "unknown"  # the C tool sends no SYNC after its last block
        if self._answers is not None:
            self._ask(pump, "SYNC", lambda: self._write(pump, d1.sync(start)))
            return "acknowledged"
        self._write(pump, d1.sync(start))
        if not waiting or not self._sync_wait:
            return "unknown"
        self._report.info(
            f"Waiting {self._sync_wait:g} s for a peer that cannot say when it has synced "
            "(--sync-wait; with -f it could)"
        )
        time.sleep(self._sync_wait)
        return "waited"

    def header(self, pump: Pump, data: bytes) -> None:
        self._header = data
        self._write(pump, d1.data(0, data))

    def finish(self, pump: Pump, size: int, start: bytes) -> str:
        if self.framing is PYPLOOP and self._answers is not None:
            if self.lanes is not None:
                self.lanes.refuse("the copy ends")  # the receiver ends them all at END
            # One round trip: the answer to END includes what that to SYNC would say.
            try:
                self._ask(pump, "END", lambda: self._end(pump), ask=partial(self._ask_nodes, pump))
            except TargetDiffers:
                # The receiver has ended the lanes at END, with all that they carried.
                self._settle(pump, [(lane.number, lane.sent) for lane in pump.lanes])
                raise
            return "acknowledged"
        self.sync(pump, waiting=False, start=start)
        self._end(pump)
        return "unknown"

    def _ask_nodes(self, pump: Pump, level: int, nodes: list[int], size: int) -> bytes:
        assert self._answers is not None
        self._write(pump, d1.question(level, nodes))
        return self._read(self._answers, size)

    def _end(self, pump: Pump) -> None:
        self.before_end()
        self._write(pump, self.proof + d1.end())

    def _write(self, pump: Pump, frame: bytes) -> None:
        fault = attempt(lambda: pump.write(frame), pump, self._resend.check_deadline)
        if fault is not None:
            if (lost := self._resend.lost(fault)) is not None:
                raise lost from fault
            raise explain_write(fault) from fault


def _readable_before(fd: int, deadline: float) -> bool:
    while (left := deadline - time.monotonic()) > 0:
        if descriptors.readable(fd, min(left, descriptors.POLL_SLICE)):
            return True
    return False
