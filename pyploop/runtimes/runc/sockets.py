# SPDX-License-Identifier: Apache-2.0
"""Options of a container's TCP and UDP sockets that CRIU (4.2) does not restore, and
multicast groups that it does not join again."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from ipaddress import IPv6Address
from pathlib import Path

from pyploop.runtimes.runc import members
from pyploop.system import kernel

_DATAGRAM, _STREAM = socket.SOCK_DGRAM, socket.SOCK_STREAM
_IP_RECVERR, _SO_TIMESTAMP = 11, 29  # linux/in.h, asm-generic/socket.h
_OPTIONS = (
    ("IP_MULTICAST_TTL", _DATAGRAM, socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1),
    ("IP_MULTICAST_LOOP", _DATAGRAM, socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1),
    ("IP_RECVERR", _DATAGRAM, socket.IPPROTO_IP, _IP_RECVERR, 0),
    ("SO_TIMESTAMP", _DATAGRAM, socket.SOL_SOCKET, _SO_TIMESTAMP, 0),
    ("TCP_DEFER_ACCEPT", _STREAM, socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 0),
    ("TCP_USER_TIMEOUT", _STREAM, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0),
    ("TCP_FASTOPEN", _STREAM, socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 0),
)
"""(name, type of socket, level, number, value of a new socket)."""
_EVERYBODYS = {"224.0.0.1", "ff01::1", "ff02::1", "ff01::2", "ff02::2", "ff05::2"}
"""Multicast groups that the kernel joins by itself."""


def settings(pids: Sequence[int]) -> list[str]:
    """The options that would be lost, each as a line for the user.  Takes some ten
    microseconds for each socket."""
    found: dict[str, set[int]] = {}
    for pid in pids:
        for one in _sockets(pid):
            with one:
                for name, kind, level, number, usual in _OPTIONS:
                    if one.type != kind:
                        continue
                    with contextlib.suppress(OSError):
                        if (value := one.getsockopt(level, number)) != usual:
                            found.setdefault(f"{name} ({value})", set()).add(pid)
    return [
        f"the socket option {what} of process {members.named(sorted(p))}"
        for what, p in found.items()
    ]


def _sockets(pid: int) -> Iterator[socket.socket]:
    """Duplicates of a process's TCP and UDP sockets.  The caller closes each."""
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    continue
                one = socket.socket(fileno=kernel.take_descriptor(pidfd, int(name)))
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    yield one
                else:
                    one.close()
        finally:
            os.close(pidfd)


def groups(pid: int, proc: str = "/proc") -> list[str]:
    """Multicast groups that were joined in the process's network namespace, unless that is
    this process's own.  One line for the user, or none."""
    try:
        if os.readlink(f"{proc}/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            return []
        four = Path(f"{proc}/{pid}/net/igmp").read_text().splitlines()
        lines = [line.split()[0] for line in four if line.startswith("\t\t")]
        found = {socket.inet_ntoa(bytes.fromhex(x)[::-1]) for x in lines}
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            six = Path(f"{proc}/{pid}/net/igmp6").read_text().splitlines()
            found |= {str(IPv6Address(bytes.fromhex(line.split()[2]))) for line in six}
    except (OSError, ValueError, IndexError):
        return []
    # The kernel joins a group ff02::1:ff… for each address of its own.
    joined = sorted(g for g in found - _EVERYBODYS if not g.startswith("ff02::1:ff"))
    return [f"membership in multicast groups ({', '.join(joined)})"] if joined else []
