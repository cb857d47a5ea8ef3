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
from typing import Self

from pyploop.runtimes.runc.local_packets import End, end_of, within
from pyploop.system import network

ACKNOWLEDGED = 0.05
"""Seconds, at most, to wait in the freeze for what the peers have yet to acknowledge."""
LOOK = 0.001
"""Seconds between two looks."""

_SOCK_DIAG = 4  # NETLINK_SOCK_DIAG
_TCP, _BY_FAMILY = 18, 20  # TCPDIAG_GETSOCK: of both families; SOCK_DIAG_BY_FAMILY
_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT = 1, 4, 5, 8
_LAST_ACK, _LISTEN, _CLOSING = 9, 10, 11
_SENDING = sum(
    1 << state for state in (_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT, _LAST_ACK, _CLOSING)
)
"""And those that may have a peer which sends."""
_OF_TCP = struct.Struct("=BBBB48xII")
"""struct inet_diag_req: family, lengths of addresses, extensions, states, bytecode."""
_OF_FAMILY = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2: family, protocol, -, states
_ENDS = struct.Struct("!4xHH16s16s")
"""The same: both ports, both addresses."""
_ANSWER = struct.Struct("=BBBB48xIII")
"""struct inet_diag_msg: family, state, timer, retransmissions, expires, both queues."""


class Connections:
    """Of the network namespace of a process."""

    def __init__(self, pid: int) -> None:
        """OSError."""
        self._netlink = network.netlink(f"/proc/{pid}/ns/net", _SOCK_DIAG)
        self._local: bool | None = None

    def unaccepted(self) -> int:
        """How many connections the servers have not accepted yet.  They would end the dump.
        OSError."""
        waiting = 0
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _OF_FAMILY.pack(family, socket.IPPROTO_TCP, 0, 1 << _LISTEN)
            for body in network.dump(self._netlink, _BY_FAMILY, request):
                waiting += _ANSWER.unpack_from(body)[5]  # the length of its queue
        return waiting

    def unacknowledged(self) -> int:
        """Bytes that were sent to peers that answer.  They would be lost if the link went down
        now.  Those within the container do not count: its processes are frozen.  OSError."""
        sockets: list[tuple[tuple[End, End], int]] = []
        # The kernel walks through the connections of the whole host, which takes a millisecond
        # even if there is none.  So it is asked once, for both families.
        for body in network.dump(self._netlink, _TCP, _OF_TCP.pack(0, 0, 0, 0, _SENDING, 0)):
            family, _, _, again, _, _, sent = _ANSWER.unpack_from(body)
            port, peer_port, own, peer = _ENDS.unpack_from(body)
            size = 4 if family == socket.AF_INET else 16
            ends = end_of(own[:size], port), end_of(peer[:size], peer_port)
            sockets.append((ends, 0 if again else sent))  # again: the peer does not answer anyway
        local = within(ends for ends, _ in sockets)
        self._local = bool(local)
        return sum(sent for ends, sent in sockets if ends not in local)

    def local(self) -> bool:
        """Whether there are connections whose both ends are here.  Of the last look, if the
        container was frozen since.  OSError."""
        if self._local is None:
            self.unacknowledged()
        return bool(self._local)

    def thawed(self) -> None:
        """What was seen before may be otherwise now."""
        self._local = None

    def acknowledged(self, most: float = ACKNOWLEDGED) -> int:
        """Wait until the peers have all that was sent, `most` seconds at most.  Returns what
        they did not have at the end.  OSError."""
        deadline = time.monotonic() + most
        while (bytes_ := self.unacknowledged()) and time.monotonic() < deadline:
            time.sleep(LOOK)
        return bytes_

    def close(self) -> None:
        self._netlink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def own_network(pid: int) -> bool:
    """Whether the process has another network namespace than this one.  OSError."""
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
