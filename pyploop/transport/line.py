# SPDX-License-Identifier: Apache-2.0
"""A channel's place in its connection, for channels that the native core moves."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Protocol

from pyploop._core import Gate, Intake
from pyploop.errors import ProtocolError, PyploopError, ReadError

LONGEST_MS = (1 << 32) - 1


def milliseconds(seconds: float) -> int:
    """For the core: 0 is no limit."""
    return min(int(seconds * 1000) or int(seconds > 0), LONGEST_MS)


def why_unread(e: OSError, silence: float) -> PyploopError:
    """Why nothing more is read from a connection, by an Intake's error."""
    what = {
        errno.ECANCELED: ReadError("the connection was closed on this host"),
        errno.ETIMEDOUT: ReadError(f"the peer sent nothing for {silence:g} s, not even a ping"),
        errno.ENODATA: ReadError("the peer closed the connection"),
        errno.EDQUOT: ProtocolError(
            "agent protocol: the peer sent more than the credit of a channel of memory images"
        ),
        errno.EPROTO: ProtocolError(
            "agent protocol: the peer sent data after the end of a channel of memory images"
        ),
    }
    return what.get(e.errno or 0) or ReadError.of("the connection to the peer broke", e)


class Connection(Protocol):
    """What a channel needs of its connection (mux.Mux)."""

    failure: PyploopError | None

    def end(self, cause: PyploopError) -> None: ...
    def write(self, parts: list[bytes]) -> None: ...
    def forget(self, number: int) -> None: ...


@dataclass(frozen=True)
class Line:
    """A channel's place in its connection."""

    connection: Connection
    gate: Gate
    intake: Intake
    number: int
    window: int
    """Bytes that may be under way."""
    silence: float
    """Seconds within which the peer must take a whole frame."""
