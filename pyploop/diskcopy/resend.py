# SPDX-License-Identifier: Apache-2.0
"""What has not arrived goes again: of lanes that have ended, and of a connection that has
failed and was replaced.  The sender's part of a stream with answers."""

from __future__ import annotations

import time
from collections.abc import Callable

from pyploop._core import Fault, Pump, PumpLane
from pyploop.diskcopy.lanes import ended as lane_ends
from pyploop.diskcopy.relink import Again, LinkLost, Relink, attempt, is_lost
from pyploop.errors import ProtocolError, PyploopError, ReadError, WriteError
from pyploop.freeze.deadline import Deadline
from pyploop.report.events import Reporter
from pyploop.units import format_size


class Resend:
    """Of one stream."""

    def __init__(
        self,
        report: Reporter,
        deadline: Deadline,
        explain: Callable[[Fault], PyploopError],
        relink: Relink | None,
        redirect: Callable[[Again], None],
    ) -> None:
        """deadline: of the copy.  explain: why the pump could not write.  relink: gives
        another connection; None: there is none.  redirect: the stream has its descriptors
        from now on."""
        self._report, self._deadline, self._explain = report, deadline, explain
        self._relink, self._redirect = relink, redirect
        self.agreed = False
        """The receiver can go on with another connection, too."""
        self.disconnected = False
        """The stream is given up, although its descriptors may not say so."""
        self.frozen = False
        """In the freeze: a connection that fails ends that first."""
        self.cuts = 0
        """Connections that were replaced."""
        self.seconds = 0.0
        """That passed meanwhile."""

    # ---- lanes

    def settle(self, pump: Pump, ends: list[tuple[int, int]]) -> bool:
        """A SYNC or END is answered with these ends of lanes.  True: something must go
        again."""
        before = pump.lanes
        try:
            lost = pump.settle(ends)
        except OSError as e:
            raise ProtocolError("the receiver has more of a lane than was sent") from e
        self._report_ends(before, pump.lanes)
        return lost

    def _report_ends(self, before: list[PumpLane], after: list[PumpLane]) -> None:
        for sentence in lane_ends(before, after):
            self._report.info(sentence)

    def run(self, pump: Pump, why: str = "which lanes have lost") -> None:
        """Send what was lost.  LinkLost: only in the freeze."""
        before = pump.stats.again
        fault = attempt(pump.resend, pump, self.check_deadline)
        if fault is not None:
            if fault.stage == "read":
                raise ReadError.of(
                    f"cannot read the source again at byte {fault.pos}", fault
                ) from fault
            if (lost := self.lost(fault)) is None:
                raise self._explain(fault) from fault
            if self.frozen:
                raise lost from fault
            self.bridge(pump, lost)
            return
        again = format_size(pump.stats.again - before)
        self._report.info(f"Sent {again} again, {why}")

    def check_deadline(self) -> None:
        """A receiver that reads END too late would keep an image that is stale by then."""
        if self._deadline.passed:
            raise WriteError(
                "the receiver did not read the end of the stream in time (--freeze-limit)"
            )

    # ---- the connection

    def begin(self, pump: Pump) -> None:
        """The pump is made, and its passes may begin."""
        if self._relink is not None and self.agreed:

            def disconnect() -> None:
                self.disconnected = True
                pump.disconnect()

            self._relink.begin(disconnect)

    def lost(self, fault: Fault) -> LinkLost | None:
        """The failure as that of a connection which another one may replace.  None: it is
        none."""
        if not self.agreed or not is_lost(fault):
            return None
        return LinkLost(str(self._explain(fault))).follows()

    def bridge(self, pump: Pump, why: LinkLost) -> bool:
        """Wait for another connection, and send again what had not arrived.  True: the target
        is complete, and there is no connection.  PyploopError: none came in time, or the
        receiver has failed."""
        assert self._relink is not None
        start = time.monotonic()
        again = self._relink.again(why, (), lambda: self._deadline.cancelled)
        self.cuts += 1
        self.seconds += time.monotonic() - start
        if again.committed:
            return True
        self._redirect(again)
        before = pump.lanes
        try:
            lost = pump.relink(again.wfd, again.ends)
        except OSError as e:
            raise ProtocolError("the receiver has more of the stream than was sent") from e
        self.disconnected = False
        self._relink.over()
        self._report_ends(before, pump.lanes)
        if lost:
            self.run(pump, "which had not arrived")
        return False
