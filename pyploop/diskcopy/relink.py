# SPDX-License-Identifier: Apache-2.0
"""A stream that has failed goes on over another one (d1.Feature.RESUME).

Both ends keep what they know: the sender what it has sent since the last answer, the
receiver how much of each stream has arrived.  The program that opens the connections makes a
new one and tells the sender what the receiver has (`Relink`); then exactly the rest goes
again.  Tracking goes on meanwhile, and nothing is frozen.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pyploop._core import Fault, Pump
from pyploop.errors import ConnectError, PyploopError
from pyploop.system.worker import run_cancellable

GONE = (errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED)
"""With these a stream fails that leads nowhere any more."""


class LinkLost(ConnectError):
    """The connection to the peer has failed, and nothing else has."""


@dataclass(frozen=True)
class Again:
    """What the copy goes on with."""

    rfd: int = -1
    wfd: int = -1
    """What comes from the peer, and what goes there (non-blocking at the sender)."""
    ends: Sequence[tuple[int, int]] = ()
    """Sender: lanes, and the bytes of their streams that the receiver has; lane 0 is the
    stream that was."""
    committed: bool = False
    """Sender: the receiver has had END, and its target is complete.  There is no stream."""


class Relink(Protocol):
    """Of one end, the one that opens connections or the other."""

    def begin(self, disconnect: Callable[[], None]) -> None:
        """The copy can go on after a failure from now on.  disconnect: from any thread,
        makes its stream fail."""

    def again(
        self, why: PyploopError, ends: Sequence[tuple[int, int]], gone: Callable[[], bool]
    ) -> Again:
        """The stream has failed: wait for another one.  ends: what the receiver has; nothing
        at the sender.  gone: the copy was cancelled meanwhile.  Raises the failure of the
        other end; or ConnectError, when none comes about in time."""

    def over(self) -> None:
        """The copy uses the new stream, and what was opened before it may be closed."""


def is_lost(fault: Fault) -> bool:
    """The sending pump's stream has failed, and not the source, or the user's patience."""
    return fault.stage == "write" and fault.errno in GONE


def attempt(
    work: Callable[[], object], pump: Pump, tick: Callable[[], None] | None = None
) -> Fault | None:
    """As run_cancellable, but a Fault is returned, and has not cancelled the pump: it may go
    on."""

    def tried() -> Fault | None:
        try:
            work()
        except Fault as fault:
            return fault
        return None

    return run_cancellable(tried, pump.cancel, tick)
