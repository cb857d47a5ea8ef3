# SPDX-License-Identifier: Apache-2.0
"""How a lane finds its agent, for remote copies and migrations.

A lane is an ssh connection of its own, so the program that it starts is another process than
the agent.  That process hands the two descriptors of its connection to the agent, and the
agent's native core then reads and writes ssh's own pipes.  It knows the agent by a token,
which has come over both connections:

    agent    listens on a name that is made from the token, and waits for one lane
    lane     reads the token from its stdin, connects there, and sends token and descriptors

Invariant: both ends hand nothing to, and take nothing from, a process of another user.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import math
import os
import socket
import struct
import time
from collections.abc import Iterator

from pyploop.errors import ConnectError, ProtocolError, ReadError
from pyploop.system import descriptors
from pyploop.wire import mux as wire

COMING = 60.0
"""Seconds for a lane to come.  After that its token is worth nothing."""
HANDING_OVER = 10.0
"""Seconds for a process that has connected to hand over what it has."""
LOOK = 0.5
"""Seconds between two looks whether a lane is still waited for."""
_CREDENTIALS = struct.Struct("3i")


class LaneError(ProtocolError):
    """The connection is one for a lane."""

    def __init__(self, token: str) -> None:
        super().__init__("the connection is one for a lane")
        self.token = token

    @classmethod
    def check(cls, line: bytes) -> None:
        """Raise if this is the first line of such a connection: an agent's command serves
        them, too, so an ssh key that is bound to it needs no other one."""
        if token := wire.find_lane(line):
            raise cls(token)


class Awaited:
    """A lane that may come once.  Call `close` on every path."""

    def __init__(self) -> None:
        self.token = os.urandom(16).hex()
        self._until = time.monotonic() + COMING
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(_address(self.token))
            self._listener.listen(4)
        except BaseException:
            self._listener.close()
            raise

    def take(self) -> Lane:
        """Wait for the lane.  ReadError: it has not come, or is not waited for any more."""
        try:
            if lane := self._next():
                return lane
        finally:
            self._listener.close()
        if self._closed:
            raise ReadError("a lane is not waited for any more")
        raise ReadError(f"a lane has not come within {COMING:g} s").follows()

    def _next(self) -> Lane | None:
        while not self._closed and (left := self._until - time.monotonic()) > 0:
            self._listener.settimeout(min(left, LOOK))
            try:
                connection = self._listener.accept()[0]
            except TimeoutError:
                continue
            if lane := self._handed_over(connection):
                return lane
        return None

    def close(self) -> None:
        """From any thread: wait no longer."""
        self._closed = True

    def _handed_over(self, connection: socket.socket) -> Lane | None:
        """None: it was somebody else."""
        fds: list[int] = []
        try:
            if peer_uid(connection) == os.geteuid():
                connection.settimeout(HANDING_OVER)
                flags = socket.MSG_CMSG_CLOEXEC
                data, fds, _, _ = socket.recv_fds(connection, len(self.token) + 1, 2, flags)
                if len(fds) == 2 and hmac.compare_digest(data, self.token.encode()):
                    lane = Lane(fds[0], fds[1], connection)
                    fds = []
                    return lane
        except OSError:
            pass
        for fd in fds:
            os.close(fd)
        connection.close()
        return None


class Door(Awaited):
    """Connections that may come one after the other, as long as it is open."""

    def __init__(self) -> None:
        super().__init__()
        self._until = math.inf

    def each(self) -> Iterator[Lane]:
        """Until it is closed."""
        with self._listener:
            while lane := self._next():
                yield lane


class Lane:
    """A lane, at the agent.  rfd, wfd: what comes from the peer, and what goes there."""

    def __init__(self, rfd: int, wfd: int, connection: socket.socket) -> None:
        self.rfd, self.wfd, self._connection = rfd, wfd, connection
        self._closed = False

    def close(self) -> None:
        """End it: its process there ends, and ssh with it.  May be called again."""
        if self._closed:
            return
        self._closed = True
        os.close(self.rfd)
        os.close(self.wfd)
        self._connection.close()

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def peer_uid(connection: socket.socket) -> int:
    """The user of the process at the other end."""
    size = _CREDENTIALS.size
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(_CREDENTIALS.unpack(packed)[1])


def _address(token: str) -> str:
    """An abstract name: it needs no folder, and ends with its socket.  All users see these
    names, so it does not tell the token."""
    return f"\0pyploop-lane-{hashlib.sha256(token.encode()).hexdigest()[:32]}"


def hand_over(token: str, rfd: int, wfd: int) -> None:
    """In the process of a lane: hand both descriptors to the agent that knows the token, and
    wait until the lane ends.  They are closed.  ConnectError: there is no such agent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
        agent.settimeout(HANDING_OVER)
        try:
            agent.connect(_address(token))
            if peer_uid(agent) != os.geteuid():
                raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            # Before the descriptors: what follows on them is the agent's.
            descriptors.write_all(wfd, wire.LANE_READY, "cannot answer")
            socket.send_fds(agent, [token.encode()], [rfd, wfd])
        except OSError as e:
            raise ConnectError.of(
                "no pyploop agent of this user waits for this lane (each token is good for "
                f"one lane, within {COMING:g} s)",
                e,
            ) from e
        # Else the connection would stay open when the agent has closed its copies.
        os.close(rfd)
        os.close(wfd)
        agent.settimeout(None)
        with contextlib.suppress(OSError):
            agent.recv(1)


def token_of(line: bytes) -> str:
    """The token of a lane's first line; ProtocolError: it is another line."""
    if token := wire.find_lane(line):
        return token
    raise ProtocolError(
        "copy-lane: the peer sent no token",
        hint="do not run `pyploop copy-lane` by hand: `pyploop copy` on the other host starts it",
    )
