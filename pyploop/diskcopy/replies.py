# SPDX-License-Identifier: Apache-2.0
"""What a receiver answers, and where: the feedback of D1, the replies of D2."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pyploop._core import RECV_END, RECV_SYNC, LaneEnd, Receiver
from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.proof import Witness
from pyploop.errors import ParameterError, ProtocolError, PyploopError, WriteError
from pyploop.system import descriptors
from pyploop.wire import d1, d2, d3

if TYPE_CHECKING:
    from pyploop.diskcopy.prior import Holder, Telling

CANNOT = "cannot answer the sender"


class UnansweredError(WriteError):
    """The answer did not go out; if the connection has failed, another one may come."""


SUPPORTED = d1.Feature.COMPRESSED | d1.Feature.PROOF
"""What our receiver agrees to."""


class Answers(Protocol):
    """How one dialect answers the sender.  event: what is answered (RECV_SYNC, RECV_END;
    0: neither)."""

    dialect: str
    native: bool
    """The peer is a pyploop sender."""
    witness: Witness | None
    """Keeps the proof of what is written, if both ends have agreed to compare it."""
    telling: Telling | None
    """Tells the sender what the target had, if both ends have agreed on that."""

    def greeted(self, pos: int, payload: bytes) -> bool:
        """A SYNC came.  True: it was a greeting, which this has answered."""

    def done(self, event: int, times: d1.Times) -> None:
        """Answer that it is durable.  WriteError: the answer cannot be sent."""

    def lost(self, ends: Sequence[LaneEnd], times: d1.Times) -> None:
        """Answer that lanes have ended, and that the sender should go on without them."""

    def failed(self, event: int, error: PyploopError) -> None:
        """Answer that the copy failed.  Never raises, so that the failure is reported."""


class Asked(Protocol):
    """The target, as a pyploop sender asks about it before the first byte."""

    def expect(self, size: int) -> None:
        """WriteError when the target cannot have so many bytes."""

    def place(self) -> d1.Place:
        """Where it lies."""

    @property
    def prior(self) -> Holder | None:
        """What it had before; None: nothing."""


class NoAnswers:
    """Before the first marker."""

    dialect = "unknown"
    native = False
    witness: Witness | None = None
    telling: Telling | None = None

    def greeted(self, pos: int, payload: bytes) -> bool:
        return False

    def done(self, event: int, times: d1.Times) -> None:
        pass

    def lost(self, ends: Sequence[LaneEnd], times: d1.Times) -> None:
        raise AssertionError("no lanes are agreed yet")

    def failed(self, event: int, error: PyploopError) -> None:
        pass


class Feedback:
    """D1: eight bytes for each SYNC on the feedback descriptor.  A pyploop sender gets
    an answer to END, too, and without a descriptor on the socket of the stream."""

    def __init__(
        self,
        pump: Receiver,
        in_fd: int,
        feedback: int | None,
        target: Asked,
        lanes: Lanes | None = None,
        *,
        resumes: bool = False,
    ) -> None:
        """lanes: further streams for data, which are agreed to.  resumes: so is another
        connection, when this one fails (`redirect`)."""
        self.dialect = "D1"
        self._target, self._lanes, self._resumes = target, lanes, resumes
        self.native = False
        self.features = d1.NO_FEATURES
        """What both ends have agreed on; known before the first data."""
        self.witness: Witness | None = None
        self.telling: Telling | None = None
        self._size: int | None = None
        self._timed = self._offered = False
        self._pump, self._guessed = pump, feedback is None
        self._first = True
        self._channel = feedback
        if feedback is None and descriptors.is_socket(in_fd):
            self._channel = in_fd

    def greeted(self, pos: int, payload: bytes) -> bool:
        if payload == d1.HELLO_2 and self.native and not self._pump.stats.frames:
            return self._greeted_again()
        if self._timed and not self._pump.stats.frames:
            if payload == d1.PLACE:
                return self._asked_for_place(pos)
            if payload == d1.FEATURES and not self._offered:
                return self._offered_features(pos)
            if payload == d1.REFUSED:
                raise _refusal(pos)
        first, self._first = self._first, False
        if not first or payload != d1.HELLO or self._pump.stats.frames:
            return False
        if self._channel is None:
            return False
        try:
            descriptors.write_all(self._channel, d1.HELLO_REPLY, CANNOT)
        except WriteError:
            if not self._guessed:
                raise
            return True  # it has sent everything and ended, and reads no answer
        self.native = True
        return True

    def _greeted_again(self) -> bool:
        if not self._timed:
            self._timed = True
            assert self._channel is not None
            came = self._pump.arrival
            times = d1.Times(arrived=came.arrived, written=came.written)
            descriptors.write_all(self._channel, d1.HELLO_2_REPLY + self._record(times), CANNOT)
        return True

    def _asked_for_place(self, size: int) -> bool:
        assert self._channel is not None
        self._size = size
        came = self._pump.arrival
        times = self._record(d1.Times(arrived=came.arrived, written=came.written))
        try:
            self._target.expect(size)
            place = self._target.place().pack()
        except WriteError:
            with contextlib.suppress(WriteError):
                descriptors.write_all(self._channel, d1.FAILURE + times, CANNOT)
            raise
        descriptors.write_all(self._channel, d1.PLACE_REPLY + times + place, CANNOT)
        return True

    def _offered_features(self, offered: int) -> bool:
        assert self._channel is not None
        self._offered = True
        supported = SUPPORTED if self._lanes is None else SUPPORTED | d1.Feature.LANES
        if self._resumes:
            supported |= d1.Feature.RESUME
        self.features = supported & d1.Feature(offered)
        if d1.Feature.PROOF in self.features:
            self._keep_proof()
        before = self._target.prior
        if before is not None and self._size is not None:
            self.features |= d1.Feature.DIGESTS & d1.Feature(offered)
        self._pump.expect(self.features & ~int(d1.Feature.DIGESTS))
        if self._lanes is not None and self.features & d1.Feature.LANES:
            self._lanes.open(self._pump, lambda: self._pump.stats.stream)
        came = self._pump.arrival
        times = self._record(d1.Times(arrived=came.arrived, written=came.written))
        answer = d1.FEATURES_REPLY + times + d1.ACCEPTED.pack(self.features, 0)
        if d1.Feature.DIGESTS not in self.features:
            descriptors.write_all(self._channel, answer, CANNOT)
            return True
        assert before is not None and self._size is not None
        from pyploop.diskcopy import prior  # few need it

        key = prior.new_key()
        descriptors.write_all(self._channel, answer + key, CANNOT)
        proof = None if self.witness is None else self.witness.proof
        teller = prior.Teller(before, self._size, key, proof)
        self.telling = prior.Telling(teller, self._channel, self._pump.cancel)
        return True

    def _keep_proof(self) -> None:
        """It needs the size, and address space for the hashes of all blocks."""
        with contextlib.suppress(OSError):
            if self._size is not None:
                self.witness = Witness(self._size, self._say, self._record)
                self._pump.expect_proof(self.witness.proof)
                return
        self.witness = None
        self.features &= ~d1.Feature.PROOF

    def _record(self, times: d1.Times) -> bytes:
        """The times after an answer, for a peer that asked for them."""
        if not self._timed:
            return b""
        return times._replace(answered=time.monotonic_ns()).pack()

    def _channel_for(self, event: int) -> int | None:
        """Where to answer; None: the peer does not read it.  Only a pyploop sender reads
        answers to END, or on the socket of the stream."""
        known = self.native or (event == RECV_SYNC and not self._guessed)
        return self._channel if known else None

    def done(self, event: int, times: d1.Times) -> None:
        channel = self._channel_for(event)
        if channel is None:
            return
        try:
            self._say(d1.SUCCESS + self._record(times))
        except UnansweredError:
            raise
        except WriteError:
            self._channel = None
            raise

    def lost(self, ends: Sequence[LaneEnd], times: d1.Times) -> None:
        self._say(d1.LOST_LANES + self._record(times) + d1.pack_lost(ends))

    def _say(self, answer: bytes) -> None:
        assert self._channel is not None
        try:
            descriptors.write_all(self._channel, answer, CANNOT)
        except WriteError as e:
            if d1.Feature.RESUME in self.features:
                raise UnansweredError(str(e)).follows() from e
            raise

    def redirect(self, feedback: int) -> None:
        """Another connection has taken the place of the one that failed."""
        self._channel = feedback

    def failed(self, event: int, error: PyploopError) -> None:
        channel = self._channel_for(event) if event in (RECV_SYNC, RECV_END) else None
        if channel is not None:
            with contextlib.suppress(WriteError):
                descriptors.write_all(channel, d1.FAILURE + self._record(d1.Times()), CANNOT)


def _refusal(code: int) -> PyploopError:
    """Why the sender refused to begin, by its exit code."""
    if code == WriteError.exit_code:
        return WriteError(
            "the sender refused to begin: the target has too little room (see its own message)"
        ).follows()
    return ParameterError(
        "the sender refused to begin: the target lies on its source (see its own message)"
    ).follows()


class Replies:
    """D2 and D3: an int32 on the same socket.  The pump answers DATA."""

    def __init__(self, fd: int, pump: Receiver | None = None) -> None:
        """pump: None before the first packet, when only a failure can be answered."""
        self.dialect = "D2"
        self.native = False
        self.witness: Witness | None = None
        self.telling: Telling | None = None
        self._fd, self._pump = fd, pump
        self._first = True
        self._broken = False

    def greeted(self, pos: int, payload: bytes) -> bool:
        first, self._first = self._first, False
        if pos == 0 or self._pump is None:
            return False
        if not first or self._pump.stats.frames:
            raise ProtocolError("the sender sent a handshake in the middle of the copy")
        reply, features = d3.answer(pos)
        self._say(reply)
        if features & d3.MD5:
            self._pump.expect_digests()
            self.dialect = "D3, MD5"
        self.native = bool(features & d3.PYPLOOP)
        return True

    def done(self, event: int, times: d1.Times) -> None:
        self._say(0)

    def lost(self, ends: Sequence[LaneEnd], times: d1.Times) -> None:
        raise AssertionError("D2 has no lanes")

    def _say(self, code: int) -> None:
        try:
            descriptors.write_all(self._fd, d2.reply(code), CANNOT)
        except WriteError:
            self._broken = True
            raise

    def failed(self, event: int, error: PyploopError) -> None:
        with contextlib.suppress(WriteError):
            if not self._broken:
                self._say(error.exit_code)
        hang_up(self._fd)


def hang_up(fd: int) -> None:
    """Shut down a socket that the caller will close."""
    with contextlib.suppress(OSError), socket.fromfd(fd, socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.shutdown(socket.SHUT_RDWR)
