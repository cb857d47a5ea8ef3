# SPDX-License-Identifier: Apache-2.0
"""How a remote copy goes at its other end: `join`, asked again and again in a thread, and over
another connection when the first one is lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from pyploop.api.copy_client import CopyClient, LostThereError
from pyploop.errors import ConnectError, PyploopError
from pyploop.system.jobs import TICK, Job
from pyploop.transport.lane import Lane

UNDOING = 130.0
"""Seconds for the other host to undo its part."""
JOINING = 1.0
"""Seconds that one request to wait for the copy's end takes at most: between two of them the
other host may be asked something else, and its events count anew."""
SOONER = 0.2
"""Part of the time since the copy began that it takes at most: at first lanes are opened."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
"""Seconds between two attempts to connect again: each pause is twice the one before."""
LAST = 10.0
"""Seconds for a connection that has no more to do to end."""


class There(Protocol):
    """The other host."""

    host: str
    client: CopyClient

    def ask(self, op: str, **args: Any) -> dict[str, Any]:
        """Its answer to a request.  PyploopError."""

    def revive(self) -> None:
        """Try once to have a connection to it.  ConnectError."""


class FarEnd:
    """How the copy goes at the other host.  `job` asks it, in a thread."""

    def __init__(self, there: There, lane: Lane, cancel: Callable[[], None], retry: float) -> None:
        self._there, self._client = there, there.client
        self._lane, self._cancel, self._retry = lane, cancel, retry
        self._stopped = False
        self.committed = False
        """A receiver here has completed its target."""
        self._cancelled = False
        self._begin = time.monotonic()
        self.job: Job[dict[str, Any]] = Job(self._wait)

    def _wait(self) -> dict[str, Any]:
        try:
            while True:
                answer = self._joined()
                if answer["done"]:
                    return dict(answer.get("result", {}))
                if answer.get("waits") and self.committed:
                    # Only the answer to END was lost.
                    self._there.ask("broken", timeout=JOINING, number=0, ends=[], committed=True)
        except PyploopError as e:
            if not e.peer_failed and not self._stopped:
                self._cancelled = True
                self._cancel()
            raise

    def _joined(self) -> dict[str, Any]:
        """Wait for a while.  When the connection is lost, for another one, too."""
        timeout = min(JOINING, SOONER * (time.monotonic() - self._begin))
        try:
            return self._client.call("join", math.inf, lambda: self._stopped, timeout=timeout)
        except ConnectError as e:
            if not self._retry or self._stopped or isinstance(e, LostThereError):
                raise
            # The thread that bridges the data may have made another connection already.
            if not revived(self._there, self._retry, lambda: self._stopped):
                raise
            return {"done": False}

    @property
    def is_done(self) -> bool:
        """It has ended well there."""
        return self.job.over.is_set() and self.job.failure is None

    def result(self) -> dict[str, Any]:
        """After the end here: what the other host has to say.  It may still run a command of
        the user's.  (When it is dead, the connection ends.)"""
        return self.job.join()

    def cause_of(self, error: PyploopError) -> PyploopError | None:
        """The failure there that `error` follows from; None: it does not."""
        follows = error.peer_failed or self._cancelled
        if not follows:
            return None
        if not self.job.over.wait(LAST):
            self._lane.cut()  # it may wait for a half of the lane that nobody serves any more
        self.job.over.wait(UNDOING)
        failure = self.job.failure
        if not isinstance(failure, PyploopError):
            return None
        if not failure.peer_failed:
            return failure
        # Both ends say that the other one has gone: it was what is between them.
        printed = self._lane.printed()
        return ConnectError(
            f"the connection to {self._client.host} for the data was lost"
            + (f" ({printed})" if printed else "")
        )

    def stop(self) -> None:
        """Ask no more."""
        self._stopped = True
        self.job.end(LAST)


def revived(there: There, retry: float, gone: Callable[[], bool]) -> bool:
    """Try so many seconds to have a connection to the agent.  False: `gone` says that it is not
    needed any more.  ConnectError: there is none; LostThereError: the agent has ended."""
    until, pause = time.monotonic() + retry, FIRST_PAUSE
    while not gone():
        try:
            there.revive()
            return True
        except LostThereError:
            raise
        except ConnectError as e:
            if time.monotonic() >= until:
                raise none_within(there.host, retry, e) from e
        rest(min(pause, until - time.monotonic()), gone)
        pause = min(2 * pause, LONGEST_PAUSE)
    return False


def none_within(host: str, retry: float, last: PyploopError) -> ConnectError:
    return ConnectError(
        f"the connection to {host} was lost, and no other one came about within {retry:g} s "
        f"(--retry): {last}"
    )


def rest(seconds: float, gone: Callable[[], bool]) -> None:
    """Sleep, at most until `gone` is true."""
    until = time.monotonic() + seconds
    while not gone() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, TICK))
