# SPDX-License-Identifier: Apache-2.0
"""Gratuitous ARP (RFC 5227, "ARP Announcement") and unsolicited neighbour advertisements
(RFC 4861, 7.2.6) for all addresses of a network namespace.

A container keeps its addresses when it moves, so the switches and neighbours must learn
that they are now on another port or host.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pyploop.system import network

_GETLINK, _GETADDR, _DELNEIGH, _GETNEIGH = 18, 22, 29, 30  # RTM_*
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix, flags, scope, index
_NEIGHBOUR = struct.Struct("=B3xiHBB")  # struct ndmsg: family, index, state, flags, type
_HARDWARE, _NAME = 1, 3  # IFLA_ADDRESS, IFLA_IFNAME
_PEER, _LOCAL = 1, 2  # IFA_ADDRESS, IFA_LOCAL
_DESTINATION, _UNANSWERED = 1, 0x21  # NDA_DST, NUD_INCOMPLETE | NUD_FAILED
_ETHERNET = 1  # ARPHRD_ETHER
_UP, _RUNNING, _CARRIER = 0x1, 0x40, 0x10000  # IFF_UP, IFF_RUNNING, IFF_LOWER_UP
_UNUSABLE = 0x48  # IFA_F_TENTATIVE | IFA_F_DADFAILED: not ours yet, or not at all
_ARP, _IPV6 = 0x0806, 0x86DD
CARRIER = 0.03
"""Seconds, at most, to wait for the carrier of a link that is up."""
RUNNING = 1.0
"""Seconds, at most, until the kernel uses a link that has its carrier.  What is sent before
is lost, and TCP sends it again after so long."""
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


def addresses(namespace: str, *, resumed: bool = False) -> list[Address]:
    """Announce what there is in a network namespace (/proc/PID/ns/net).  resumed: its link was
    down until now, and its processes do not run yet.  OSError."""
    with Announcer(namespace) as announcer:
        if resumed:
            announcer.wait_for_links()
            announcer.forget_unanswered()
        return announcer.send()


class Announcer:
    """For a network namespace.  It is made before the container is suspended for its sake,
    because entering the namespace takes longer than the rest."""

    def __init__(self, namespace: str) -> None:
        """OSError."""
        self._asked = network.netlink(namespace, network.ROUTE)
        try:
            self._out = network.socket_in(namespace, socket.AF_PACKET, socket.SOCK_RAW, 0)
        except BaseException:
            self._asked.close()
            raise

    def wait_for_links(self, carrier: float = CARRIER) -> None:
        """After a link was set up: until the kernel uses it.  It drops what is sent before,
        and a restored socket sends again only after a second.  carrier: seconds for links
        that may have none.  OSError."""
        began = time.monotonic()
        while True:
            idle = [f for f, _, _ in _links(self._asked).values() if not f & _RUNNING]
            most = RUNNING if any(f & _CARRIER for f in idle) else carrier
            if not idle or time.monotonic() >= began + most:
                return
            time.sleep(LOOK)

    def forget_unanswered(self) -> None:
        """After a link was set up, and before the processes run: forget the neighbours that
        did not answer while it was down.  A socket that was dumped, or restored, may have
        asked for one.  The kernel asks three times, a second apart.  Until the next time it
        would keep what is sent, and drop it after the third.  OSError."""
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _NEIGHBOUR.pack(family, 0, 0, 0, 0)
            # All of the answer is read before the next request is sent.
            for body in list(network.dump(self._asked, _GETNEIGH, request)):
                _, index, state, flags, kind = _NEIGHBOUR.unpack_from(body)
                known = dict(network.attributes(body[_NEIGHBOUR.size :]))
                if state & _UNANSWERED and _DESTINATION in known:
                    entry = _NEIGHBOUR.pack(family, index, state, flags, kind)
                    entry += network.attribute(_DESTINATION, known[_DESTINATION])
                    with contextlib.suppress(FileNotFoundError):
                        network.ask(self._asked, _DELNEIGH, entry)

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
    for body in network.dump(asked, _GETLINK, network.LINK.pack(0, 0, 0, 0, 0)):
        _, kind, index, flags, _ = network.LINK.unpack_from(body)
        known = dict(network.attributes(body[network.LINK.size :]))
        if kind == _ETHERNET and flags & _UP and len(known.get(_HARDWARE, b"")) == 6:
            links[index] = flags, known[_NAME].rstrip(b"\0").decode(), known[_HARDWARE]
    return links


def _addresses(asked: socket.socket) -> Iterator[Address]:
    links = _links(asked)
    for body in network.dump(asked, _GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0)):
        _, _, flags, _, index = _ADDRESS.unpack_from(body)
        known = dict(network.attributes(body[_ADDRESS.size :]))
        ip = known.get(_LOCAL, known.get(_PEER))
        if index in links and ip and not flags & _UNUSABLE:
            yield Address(*links[index][1:], ip)


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
