# SPDX-License-Identifier: Apache-2.0
"""The first line of a connection to `pyploop agent`, which says what it is for: a migration,
one of its lanes, or the pages of an earlier one.  An ssh key that is bound to the agent's
command needs no other command for these.

Kept apart from the agent, whose modules a lane does not need: there may be many lanes.
"""

from __future__ import annotations

from pyploop.transport import greeting
from pyploop.transport.lane_handover import LaneError
from pyploop.wire import mux as wire

HINT = "do not run `pyploop agent` by hand: `pyploop migrate` on the source starts it"


class WantedError(Exception):
    """The source wants this connection for the pages of a migration."""

    def __init__(self, migration: str) -> None:
        super().__init__(migration)
        self.migration = migration


def greet(rfd: int, wfd: int) -> bytes:
    """As greeting.greet.  WantedError: the connection is one for pages.  LaneError: for a
    lane."""

    def other(line: bytes) -> None:
        LaneError.check(line)
        if migration := wire.find_pages(line):
            raise WantedError(migration)

    return greeting.greet(rfd, wfd, hint=HINT, peer="the source", other=other)
