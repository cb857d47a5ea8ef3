# SPDX-License-Identifier: Apache-2.0
"""A copy between two hosts whose connection is lost, at the end that opens connections.

Connections are tried anew for `retry` seconds: that to the agent, which has outlived its
own, and one more for the data.  Both ends then go on with what has not arrived.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from pyploop.api.copy_client import LostThereError
from pyploop.api.far_end import FIRST_PAUSE, JOINING, LONGEST_PAUSE, none_within, rest
from pyploop.api.more_lanes import MoreLanes
from pyploop.api.remote_host import RemoteHost
from pyploop.diskcopy.relink import Again
from pyploop.errors import CancelledError, ConnectError, ProtocolError, PyploopError, ReadError
from pyploop.report.events import Reporter
from pyploop.transport.lane import Lane

Ends = Sequence[tuple[int, int]]


class Bridge:
    """Relink of the end here.  Call `close` on every path, when the copy has ended."""

    def __init__(
        self, there: RemoteHost, lane: Lane, more: MoreLanes, report: Reporter, retry: float
    ) -> None:
        """lane: what the data go over.  more: further ones."""
        self._there, self._more, self._report, self._retry = there, more, report, retry
        self._lanes = [lane]
        """The last one is in use."""
        self._number = self._newest = 0
        """Of the lane that the copy here uses, and of the last one that was opened for it."""
        self._arrived: Ends = ()
        """What has arrived there of the former, once it is known.  Another answer might be about
        the latter, if that was lost before the copy here has used it."""
        self._given_up = False
        self.is_done: Callable[[], bool] = lambda: False
        """The receiver there has completed its target."""

    def begin(self, disconnect: Callable[[], None]) -> None:
        pass

    def again(self, why: PyploopError, ends: Ends, gone: Callable[[], bool]) -> Again:
        host, start = self._there.host, time.monotonic()
        self._event("lost", str(why), 0.0)
        self._report.note(f"The connection to {host} was lost, and is tried again: {why}")
        self._more.hold()
        self._lanes[-1].cut()
        pause = FIRST_PAUSE

        def over() -> bool:
            return self._given_up or gone()

        while (again := self._tried(ends, over, why, start)) is None:
            rest(min(pause, self._retry), over)
            pause = min(2 * pause, LONGEST_PAUSE)
        seconds = time.monotonic() - start
        self._event("bridged", str(why), seconds)
        self._report.note(f"The copy goes on after {seconds:.1f} s without a connection to {host}")
        return again

    def _tried(
        self, ends: Ends, over: Callable[[], bool], why: PyploopError, start: float
    ) -> Again | None:
        """One attempt.  None: try again.  over: the copy is cancelled.  start: when the
        connection was lost."""
        there = self._there
        if self.is_done():
            return Again(committed=True)
        try:
            there.revive()
            theirs = [{"lane": lane, "received": received} for lane, received in ends]
            answer = self._asked(theirs, over, why)
            if answer is None:
                return Again(committed=True)
            self._arrived = self._arrived or answer
            self._newest, lane = there.next_lane("again", over)
            self._lanes.append(lane)
            self._resume(self._newest)
        except (ConnectError, CancelledError) as e:
            if over():
                raise why from e
            if isinstance(e, LostThereError):
                raise
            seconds = time.monotonic() - start
            if seconds >= self._retry:
                raise none_within(there.host, self._retry, e) from e
            self._event("retried", str(e), seconds)
            return None
        os.set_blocking(lane.wfd, False)
        return Again(lane.rfd, lane.wfd, self._arrived)

    def _resume(self, number: int) -> None:
        """ConnectError: it has come to nothing."""
        try:
            self._there.ask("resume", number=number)
        except (ReadError, ProtocolError) as e:
            raise ConnectError(str(e)) from e

    def _asked(
        self, theirs: list[dict[str, int]], over: Callable[[], bool], why: PyploopError
    ) -> Ends | None:
        """Wait until the copy there has noticed it, too.  What has arrived there; None: all,
        and the target is complete."""
        while True:
            answer = self._there.ask(
                "broken", timeout=JOINING, number=self._number, ends=theirs, committed=False
            )
            if answer["committed"]:
                return None
            if answer["ready"]:
                return [(end["lane"], end["received"]) for end in answer["ends"]]
            if over():
                raise why

    def over(self) -> None:
        self._number, self._arrived = self._newest, ()
        for lane in self._lanes[:-1]:
            lane.cut()
            lane.close()
        del self._lanes[:-1]
        self._more.go_on()

    def cut(self) -> None:
        """From any thread: the copy has failed there, so its data end here, too."""
        self._given_up = True
        self._lanes[-1].cut()

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        """After a failure, the other host may still wait for another connection: its end of a
        lane is not waited for."""
        for lane in self._lanes:
            lane.__exit__(kind, *exc)

    def _event(self, state: str, why: str, seconds: float) -> None:
        self._report.event("cut", state=state, why=why, seconds=seconds)
