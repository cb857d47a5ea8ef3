# SPDX-License-Identifier: Apache-2.0
"""The hellos, at the agent."""

from __future__ import annotations

import time
from collections.abc import Callable

from pyploop import __version__
from pyploop.errors import ProtocolError
from pyploop.system import descriptors
from pyploop.transport import deadlines
from pyploop.wire import mux as wire

LONGEST_LINE = 128


def greet(rfd: int, wfd: int, *, hint: str, peer: str, other: Callable[[bytes], None]) -> bytes:
    """Exchange hellos.  Returns the bytes that came after the peer's.  ProtocolError when the
    versions do not fit; the peer sees that from our hello.

    hint: for a person who has started the agent by hand.  peer: what the other end is, for
    messages.  other: called with the first line, which may be that of another connection;
    then it raises."""
    descriptors.write_all(wfd, wire.hello(__version__), "cannot say hello")
    line = first_line(rfd, "waiting for a hello")
    other(line)
    came = wire.find_hello(line)
    if came is None:
        raise ProtocolError("agent protocol: the peer sent no hello", hint=hint)
    if why := wire.mismatch(came, __version__):
        raise ProtocolError(f"this agent cannot work with the pyploop of {peer}: {why}")
    return b""


def first_line(rfd: int, what: str) -> bytes:
    """The first line with its end, or the first LONGEST_LINE bytes of a longer one."""
    deadline = time.monotonic() + deadlines.HELLO
    data = b""
    while not data.endswith(b"\n") and len(data) <= LONGEST_LINE:
        # Byte by byte: what follows belongs to the frames.
        data += descriptors.read_exactly(rfd, 1, lambda: deadline, what)
    return data
