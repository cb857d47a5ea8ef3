# SPDX-License-Identifier: Apache-2.0
"""How many bytes per second the connection to an agent takes, by a short probe: a few MiB
that the agent reads and forgets; and how busy the agent's host is.  Nothing is changed on
either host."""

from __future__ import annotations

import contextlib
import os
import socket
import time

from pyploop.errors import MigrateError
from pyploop.migration import deadlines
from pyploop.migration.source.agent_client import Remote
from pyploop.system.jobs import Job
from pyploop.units import KIB, MIB
from pyploop.wire import channels

CAPABILITY = "probe"
SIZES = (MIB, 4 * MIB, 16 * MIB, channels.PROBE)
"""Bytes of each try.  The first ones also open the window of TCP."""
SECONDS = 0.4
"""After so long no other try is made."""
PIECE = 256 * KIB


def measure(remote: Remote) -> float:
    """Bytes per second, by the fastest try; 0 when the agent does not know how, or did not
    read them in time."""
    if CAPABILITY not in remote.capabilities:
        return 0.0
    rate = spent = 0.0
    try:
        round_trip = min(_round_trip(remote) for _ in range(3))
        for size in SIZES:
            seconds = _seconds(remote, size, round_trip)
            rate = max(rate, size / seconds)
            spent += seconds
            if spent > SECONDS:
                break
    except (MigrateError, OSError):
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
    """Until the agent has read `size` bytes, without the time for its answer: a byte in the
    same channel.  OSError when that does not come in time."""
    number, fd = remote.open_channel()
    with socket.socket(fileno=fd) as sock:
        remote.call("probe", deadlines.REQUEST, channel=number, size=size)
        # Bytes that nothing on the way can compress.
        piece = memoryview(os.urandom(PIECE))

        def send() -> None:
            for left in range(size, 0, -PIECE):
                sock.sendall(piece[: min(left, PIECE)])

        sock.settimeout(deadlines.PROBING)
        job = Job(send)
        try:
            start = time.monotonic()
            job.start()
            if not sock.recv(1):
                raise ConnectionError("the agent has not read all bytes of a probe")
            return max(time.monotonic() - start - round_trip, 1e-4)
        finally:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # a send that waits ends with an error
            job.end()
