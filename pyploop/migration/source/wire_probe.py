# SPDX-License-Identifier: Apache-2.0
"""How many bytes of memory images per second the connection to an agent takes, by a short
probe: a few MiB go the same way as such images, and the agent forgets them; and how busy the
agent's host is.  Nothing is changed on either host."""

from __future__ import annotations

import os
import time

from pyploop.errors import MigrateError, ReadError, WriteError
from pyploop.migration import deadlines
from pyploop.migration.source.agent_client import Remote
from pyploop.units import MIB
from pyploop.wire import channels

CAPABILITY = "probe"
SIZES = (MIB, 4 * MIB, 16 * MIB, channels.PROBE)
"""Bytes of each try.  The first ones also open the window of TCP."""
SECONDS = 1.0
"""No try is made that would end after so long."""
NAME = "probe"


def measure(remote: Remote) -> float:
    """Bytes per second, by the fastest try; 0 when the agent does not know how, or did not
    read them in time."""
    if CAPABILITY not in remote.capabilities:
        return 0.0
    rate = spent = 0.0
    remote.complete_lanes()
    try:
        round_trip = min(_round_trip(remote) for _ in range(3))
        for size in SIZES:
            if rate and spent + size / rate > SECONDS:
                break
            seconds = _seconds(remote, size, round_trip)
            rate = max(rate, size / seconds)
            spent += seconds
    except (MigrateError, ReadError, WriteError, OSError):
        if not remote.alive():
            raise
    return rate


def busy(remote: Remote) -> float:
    """How many times longer work takes on the target than if it were idle; 1 when its agent
    does not say."""
    if CAPABILITY not in remote.capabilities:
        return 1.0
    return float(remote.call("busy", deadlines.REQUEST)["busy"])


def _round_trip(remote: Remote) -> float:
    start = time.monotonic()
    remote.call("clock", deadlines.REQUEST)
    return time.monotonic() - start


def _seconds(remote: Remote, size: int, round_trip: float) -> float:
    """Until the agent has read `size` bytes, without the time for its answer."""
    args, out = remote.open_images(deadlines.PROBING)
    # Bytes that nothing on the way can compress or leave out.
    with out, open(os.memfd_create("pyploop-probe"), "wb", buffering=0) as file:
        piece = os.urandom(MIB)
        for _ in range(size // MIB):
            file.write(piece)
        remote.call("probe", deadlines.REQUEST, **args, size=size)
        start = time.monotonic()
        out.file(NAME, f"/proc/self/fd/{file.fileno()}")
        out.end()
        remote.call("probed", deadlines.PROBING)
        return max(time.monotonic() - start - round_trip, 1e-4)
