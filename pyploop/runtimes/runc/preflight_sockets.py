# SPDX-License-Identifier: Apache-2.0
"""Sockets that CRIU (4.2) cannot dump."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyploop.runtimes.runc.preflight_files import Descriptor, Problem
from pyploop.system import kernel, network

_VSOCK, _MPTCP = 40, 262
_DUMPED = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET}
_PROTOCOLS = {
    *(socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_UDPLITE),
    *(socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6),
}
_SO_DOMAIN = 39  # asm-generic/socket.h
_SIOCGSKNS = 0x894C  # linux/sockios.h
_LINKS, _NEIGHBOURS = 1, 4  # RTMGRP_LINK, RTMGRP_NEIGH
AGAIN = 0.1
"""Seconds until a second look at data that wait: a process may be about to read them."""
_SOCK_DIAG, _BY_FAMILY = 4, 20  # NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY
_REQUEST = struct.Struct("=BBHIIIII")
"""struct unix_diag_req: family, protocol, -, states, inode, what to show, cookie."""
_SHOW_PEER, _SHOW_ICONS = 4, 8  # UDIAG_SHOW_PEER, UDIAG_SHOW_ICONS
_PEER, _ICONS, _SHUTDOWN = 2, 3, 6  # UNIX_DIAG_PEER, UNIX_DIAG_ICONS, UNIX_DIAG_SHUTDOWN
_MESSAGE = struct.Struct("=BBBxIII")
"""struct unix_diag_msg: family, type, state, inode, cookie."""


def of(
    files: Sequence[Descriptor], pids: Sequence[int], ext_unix: bool, cuts_link: bool
) -> Iterator[Problem]:
    """files: all descriptors of these processes.  ext_unix: CRIU may dump a Unix socket whose
    other end is outside.  cuts_link: the link goes down before the dump."""
    networks = {_inode(f"/proc/{pid}/ns/net") for pid in pids}
    listening = _subscribers(pids) if cuts_link else set()
    sockets = [f for f in files if f.link.startswith("socket:")]
    unread: list[Descriptor] = []
    unix = {}
    for one in sockets:
        with contextlib.suppress(OSError), _taken(one) as copy:
            family, protocol = copy.family, copy.proto
            if family in _DUMPED and _network_of(copy) not in networks:
                text = f"{one} is a socket that was made outside the container"
                yield Problem("outside-socket", text)
            elif family == socket.AF_NETLINK and one.stat.st_ino in listening:
                text = f"{one} is a netlink socket that gets changes of links or neighbours"
                yield Problem("netlink-link-events", text)
            elif family == socket.AF_UNIX:
                unix[one.stat.st_ino] = one
            elif family == socket.AF_NETLINK and _readable(copy):
                unread.append(one)
            elif family == _VSOCK:
                yield Problem("vsock", f"{one} is a vsock")
            elif family not in _DUMPED:
                yield Problem("socket-family", f"{one} is a socket of the family {int(family)}")
            elif protocol == _MPTCP:
                yield Problem("mptcp", f"{one} is a socket of MPTCP")
            elif (
                family in (socket.AF_INET, socket.AF_INET6)
                and copy.type != socket.SOCK_RAW
                and protocol not in _PROTOCOLS
            ):
                yield Problem("socket-protocol", f"{one} is a socket of the protocol {protocol}")
    yield from _still_unread(unread)
    if unix and not ext_unix:
        yield from _outside(unix, pids)


def _taken(one: Descriptor) -> socket.socket:
    """A duplicate of the socket.  OSError."""
    pidfd = os.pidfd_open(one.pid)
    try:
        fd = kernel.take_descriptor(pidfd, one.number)
    finally:
        os.close(pidfd)
    try:
        return socket.socket(fileno=fd)
    except OSError:  # its family has no getsockname(2), which Python asks
        asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        with contextlib.closing(asking):
            family = asking.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
            return socket.socket(family, socket.SOCK_RAW, 0, fileno=os.dup(fd))


def _inode(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.stat(path).st_ino
    return 0


def _network_of(copy: socket.socket) -> int:
    """The inode of its network namespace.  OSError."""
    fd = fcntl.ioctl(copy.fileno(), _SIOCGSKNS)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _subscribers(pids: Sequence[int]) -> set[int]:
    """Inodes of the NETLINK_ROUTE sockets that get an event when a link goes down."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/netlink").read_text().splitlines()[1:]:
                words = line.split()
                if words[1] == "0" and int(words[3], 16) & (_LINKS | _NEIGHBOURS):
                    found.add(int(words[-1]))
    return found


def _readable(copy: socket.socket) -> bool:
    poll = select.poll()
    poll.register(copy, select.POLLIN)
    return bool(poll.poll(0))


def _still_unread(files: Sequence[Descriptor]) -> Iterator[Problem]:
    if files:
        time.sleep(AGAIN)
    for one in files:
        with contextlib.suppress(OSError), _taken(one) as copy:
            if _readable(copy):
                text = f"{one} is a netlink socket with data that it does not read"
                yield Problem("netlink-data", text)


@dataclass
class _Unix:
    """The Unix sockets of some network namespaces, as the kernel lists them."""

    peers: dict[int, int] = field(default_factory=dict)
    """Inode -> that of the other end; 0: it is closed, or not accepted yet."""
    open: set[int] = field(default_factory=set)
    """Those of which neither end is shut down."""
    waiting: dict[int, list[int]] = field(default_factory=dict)
    """A listening one -> those that wait to be accepted."""

    def read(self, pid: int) -> None:
        """Add those of the process's network.  OSError."""
        with network.netlink(f"/proc/{pid}/ns/net", _SOCK_DIAG) as asking:
            request = _REQUEST.pack(
                socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_PEER | _SHOW_ICONS, 0, 0
            )
            for body in network.dump(asking, _BY_FAMILY, request):
                inode = _MESSAGE.unpack_from(body)[3]
                for kind, value in network.attributes(body[_MESSAGE.size :]):
                    if kind == _PEER:
                        self.peers[inode] = struct.unpack_from("=I", value)[0]
                    elif kind == _ICONS:
                        self.waiting[inode] = [n for (n,) in struct.iter_unpack("=I", value)]
                    elif kind == _SHUTDOWN and not value[0]:
                        self.open.add(inode)


def _outside(unix: dict[int, Descriptor], pids: Sequence[int]) -> Iterator[Problem]:
    """unix: inode -> a descriptor, of all Unix sockets of the container."""
    table = _Unix()
    seen = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # a kernel without unix_diag
            namespace = os.readlink(f"/proc/{pid}/ns/net")
            if namespace not in seen:
                seen.add(namespace)
                table.read(pid)
    accepted_here = {n for inode in unix for n in table.waiting.get(inode, ())}
    for inode, one in unix.items():
        peer = table.peers.get(inode)
        waits = peer == 0 and inode in table.open and inode not in accepted_here
        if (peer and peer not in unix) or waits:
            text = f"{one} is a Unix socket whose other end is outside the container"
            yield Problem("outside-socket", text)
