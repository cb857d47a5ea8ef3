# SPDX-License-Identifier: Apache-2.0
"""Gratuitous ARP (RFC 5227, "ARP Announcement") and unsolicited neighbour advertisements
(RFC 4861, 7.2.6) for all addresses of a network namespace.

A container keeps its addresses when it moves, so the switches and neighbours must learn
that they are now on another port or host.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pyploop.system import network

_ROUTE, _GETLINK, _GETADDR = 0, 18, 22  # NETLINK_ROUTE, RTM_GETLINK, RTM_GETADDR
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix, flags, scope, index
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_HARDWARE, _NAME = 1, 3  # IFLA_ADDRESS, IFLA_IFNAME
_PEER, _LOCAL = 1, 2  # IFA_ADDRESS, IFA_LOCAL
_ETHERNET, _UP, _RUNNING = 1, 1, 0x40  # ARPHRD_ETHER, IFF_UP, IFF_RUNNING
_UNUSABLE = 0x48  # IFA_F_TENTATIVE | IFA_F_DADFAILED: not ours yet, or not at all
_ARP, _IPV6 = 0x0806, 0x86DD
RUNNING = 0.03
"""Seconds, at most, to wait for the carrier of a link that is up."""
LOOK = 0.0005
"""Seconds between two looks."""
_ALL = b"\xff" * 6
_ALL_NODES_MAC = bytes.fromhex("333300000001")
_ALL_NODES = socket.inet_pton(socket.AF_INET6, "ff02::1")
_ICMPV6, _ADVERTISEMENT, _OVERRIDE = 58, 136, 0x20000000


@dataclass(frozen=True)
class Address:
    """One address of an Ethernet link that is up."""

    link: str
    mac: bytes
    ip: bytes
    """4 or 16 bytes."""


def addresses(namespace: str) -> list[Address]:
    """Announce what there is in a network namespace (/proc/PID/ns/net).  OSError."""
    with Announcer(namespace) as announcer:
        return announcer.send()


class Announcer:
    """For a network namespace.  It is made before the container is suspended for its sake,
    because entering the namespace takes longer than the rest."""

    def __init__(self, namespace: str) -> None:
        """OSError."""
        self._asked = network.netlink(namespace, _ROUTE)
        try:
            self._out = network.socket_in(namespace, socket.AF_PACKET, socket.SOCK_RAW, 0)
        except BaseException:
            self._asked.close()
            raise

    def wait_for_links(self, most: float = RUNNING) -> None:
        """After a link was set up: until the kernel has seen its carrier.  It drops what is
        sent before, and a restored socket sends again only after a second.  OSError."""
        deadline = time.monotonic() + most
        while time.monotonic() < deadline:
            if all(flags & _RUNNING for flags, _, _ in _links(self._asked).values()):
                return
            time.sleep(LOOK)

    def send(self) -> list[Address]:
        """OSError."""
        found = list(_addresses(self._asked))
        for address in found:
            frame = arp(address) if len(address.ip) == 4 else advertisement(address)
            self._out.sendto(frame, (address.link, 0))
        return found

    def close(self) -> None:
        self._asked.close()
        self._out.close()

    def __enter__(self) -> Announcer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _links(asked: socket.socket) -> dict[int, tuple[int, str, bytes]]:
    """Index -> (flags, name, MAC) of the Ethernet links that are up."""
    links = {}
    for body in network.dump(asked, _GETLINK, _LINK.pack(0, 0, 0, 0, 0)):
        _, kind, index, flags, _ = _LINK.unpack_from(body)
        known = dict(_attributes(body[_LINK.size :]))
        if kind == _ETHERNET and flags & _UP and len(known.get(_HARDWARE, b"")) == 6:
            links[index] = flags, known[_NAME].rstrip(b"\0").decode(), known[_HARDWARE]
    return links


def _addresses(asked: socket.socket) -> Iterator[Address]:
    links = _links(asked)
    for body in network.dump(asked, _GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0)):
        _, _, flags, _, index = _ADDRESS.unpack_from(body)
        known = dict(_attributes(body[_ADDRESS.size :]))
        ip = known.get(_LOCAL, known.get(_PEER))
        if index in links and ip and not flags & _UNUSABLE:
            yield Address(*links[index][1:], ip)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += (max(length, _ATTRIBUTE.size) + 3) & ~3


def arp(address: Address) -> bytes:
    """A whole Ethernet frame."""
    head = _ALL + address.mac + struct.pack("!H", _ARP)
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    return head + body + address.mac + address.ip + bytes(6) + address.ip


def advertisement(address: Address) -> bytes:
    """A whole Ethernet frame."""
    option = struct.pack("!BB", 2, 1) + address.mac  # target link-layer address
    icmp = struct.pack("!BBHI", _ADVERTISEMENT, 0, 0, _OVERRIDE) + address.ip + option
    pseudo = address.ip + _ALL_NODES + struct.pack("!II", len(icmp), _ICMPV6)
    icmp = icmp[:2] + struct.pack("!H", _checksum(pseudo + icmp)) + icmp[4:]
    ip = struct.pack("!IHBB", 6 << 28, len(icmp), _ICMPV6, 255) + address.ip + _ALL_NODES
    return _ALL_NODES_MAC + address.mac + struct.pack("!H", _IPV6) + ip + icmp


def _checksum(data: bytes) -> int:
    """RFC 1071; of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
