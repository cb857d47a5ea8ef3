# SPDX-License-Identifier: Apache-2.0
"""Another network namespace, as it is seen through a socket that was made in it."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

from pyploop.system import kernel

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_REQUEST_ACK = 0x5  # NLM_F_REQUEST | NLM_F_ACK
_ERROR, _DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE
ROUTE = 0
"""NETLINK_ROUTE, a protocol of `netlink`."""
LINK = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, change."""
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
ANSWER = 2.0
"""Seconds for the kernel to answer."""


def socket_in(namespace: str, family: int, kind: int, protocol: int) -> socket.socket:
    """A socket of the network namespace that the file `namespace` stands for
    (/proc/PID/ns/net).  A socket stays in the namespace that it was made in.  OSError."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def make() -> None:
        try:
            fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                kernel.enter_network(fd, namespace)
            finally:
                os.close(fd)
            made.append(socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol))
        except OSError as e:
            failed.append(e)

    # A thread of its own, for a thread's namespace cannot be put back for sure.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    made[0].settimeout(ANSWER)
    return made[0]


def netlink(namespace: str, protocol: int) -> socket.socket:
    """protocol: a number of linux/netlink.h, as NETLINK_SOCK_DIAG."""
    return socket_in(namespace, socket.AF_NETLINK, socket.SOCK_RAW, protocol)


def dump(sock: socket.socket, kind: int, request: bytes) -> Iterator[bytes]:
    """The bodies of the kernel's answers to one request for all that there is.  OSError."""
    sock.send(_HEADER.pack(_HEADER.size + len(request), kind, _REQUEST_DUMP, 1, 0) + request)
    while True:
        data = sock.recv(1 << 18)
        at = 0
        while at + _HEADER.size <= len(data):
            length, answer, _, _, _ = _HEADER.unpack_from(data, at)
            body = data[at + _HEADER.size : at + length]
            if answer == _DONE:
                return
            if answer == _ERROR:
                number = -struct.unpack_from("=i", body)[0]
                raise OSError(number, os.strerror(number))
            yield body
            at += (max(length, _HEADER.size) + 3) & ~3


def ask(sock: socket.socket, kind: int, request: bytes) -> None:
    """Ask for a change, and wait until the kernel has made it.  OSError."""
    sock.send(_HEADER.pack(_HEADER.size + len(request), kind, _REQUEST_ACK, 1, 0) + request)
    answer = sock.recv(1 << 16)
    number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
    if number:
        raise OSError(number, os.strerror(number))


def attribute(kind: int, value: bytes) -> bytes:
    """As it stands in a request, with its padding."""
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Of an answer, behind its fixed part."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += (max(length, _ATTRIBUTE.size) + 3) & ~3
