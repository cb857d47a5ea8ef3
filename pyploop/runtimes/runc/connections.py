# SPDX-License-Identifier: Apache-2.0
"""The TCP connections of a container, as the kernel lists them (sock_diag).

Between the freeze and the dump, the link is taken down.  What is under way then is lost:
the last answer, which the restored socket repeats only after its first retransmission time
(1 s), or a connection that no process has accepted, with which CRIU refuses the dump.  So
the link goes down when the peers have acknowledged all, and no connection waits.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Self

from pyploop.system import network

ACKNOWLEDGED = 0.05
"""Seconds, at most, to wait in the freeze for what the peers have yet to acknowledge."""
LOOK = 0.001
"""Seconds between two looks."""

_SOCK_DIAG, _BY_FAMILY = 4, 20  # NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY
_ESTABLISHED, _FIN_WAIT1, _CLOSE_WAIT, _LAST_ACK, _LISTEN, _CLOSING = 1, 4, 8, 9, 10, 11
_SENDING = (_ESTABLISHED, _FIN_WAIT1, _CLOSE_WAIT, _LAST_ACK, _CLOSING)
_STATES = sum(1 << state for state in (*_SENDING, _LISTEN))
_REQUEST = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2: family, protocol, -, states
_ANSWER = struct.Struct("=BBBB48xIII")
"""struct inet_diag_msg: family, state, timer, retransmissions, expires, both queues."""


@dataclass(frozen=True)
class Pending:
    """What would be lost, or would end the dump, if the link went down now."""

    unacknowledged: int = 0
    """Bytes that were sent to peers that answer."""
    unaccepted: int = 0
    """Connections that a server has not accepted yet."""


class Connections:
    """Of the network namespace of a process."""

    def __init__(self, pid: int) -> None:
        """OSError."""
        self._netlink = network.netlink(f"/proc/{pid}/ns/net", _SOCK_DIAG)

    def pending(self) -> Pending:
        """OSError."""
        bytes_, waiting = 0, 0
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _STATES)
            for body in network.dump(self._netlink, _BY_FAMILY, request):
                _, state, _, again, _, received, sent = _ANSWER.unpack_from(body)
                if state == _LISTEN:
                    waiting += received  # the length of its queue
                elif not again:  # else the peer does not answer anyway
                    bytes_ += sent
        return Pending(bytes_, waiting)

    def acknowledged(self, most: float = ACKNOWLEDGED) -> Pending:
        """Wait until the peers have all that was sent, `most` seconds at most.  Returns what
        was pending at the end.  OSError."""
        deadline = time.monotonic() + most
        while (pending := self.pending()).unacknowledged and time.monotonic() < deadline:
            time.sleep(LOOK)
        return pending

    def close(self) -> None:
        self._netlink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def own_network(pid: int) -> bool:
    """Whether the process has another network namespace than this one.  OSError."""
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
