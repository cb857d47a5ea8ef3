# SPDX-License-Identifier: Apache-2.0
"""What is under way on a container's link, and how its addresses are announced, seen
across a pair of network namespaces."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support import needs, run

from pyploop.runtimes.runc import announce
from pyploop.runtimes.runc.announce import Address
from pyploop.runtimes.runc.connections import Connections, own_network
from pyploop.system import network

MAC = bytes.fromhex("020000000042")
_SERVER = """
import socket, sys
servers = {
    "10.78.0.2": socket.create_server(("10.78.0.2", 5000)),
    "fd00::2": socket.create_server(("fd00::2", 5000), family=socket.AF_INET6),
}
print("listens", flush=True)
accepted = []
for order in sys.stdin:
    if order.startswith("accept "):
        accepted.append(servers[order.split()[1]].accept()[0])
    else:
        accepted[-1].sendall(b"x" * int(order))
    print("done", flush=True)
"""


class Server:
    """A process in a network namespace of its own, at 10.78.0.2 and fd00::2, which accepts
    connections and answers as it is told to.  The other end of its link is the device
    `peer0` of the namespace `here`."""

    def __init__(self, pid: int, process: subprocess.Popen[str], here: str) -> None:
        self.pid, self.here = pid, here
        self._process = process

    def order(self, words: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"


def _enter(holder: subprocess.Popen[str]) -> list[str]:
    return ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "--"]


@contextlib.contextmanager
def _namespace() -> Iterator[subprocess.Popen[str]]:
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo up; exec sleep 600"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


@pytest.fixture
def server() -> Iterator[Server]:
    needs("root", "ip", "nsenter", "unshare")
    with _namespace() as here, _namespace() as there:
        link = ["link0", "address", MAC.hex(":"), "netns", str(there.pid)]
        run(*_enter(here), "ip", "link", "add", "peer0", "type", "veth", "peer", "name", *link)
        for holder, name, end in ((here, "peer0", 1), (there, "link0", 2)):
            ip = [*_enter(holder), "ip"]
            run(*ip, "address", "add", f"10.78.0.{end}/24", "dev", name)
            run(*ip, "-6", "address", "add", f"fd00::{end}/64", "dev", name, "nodad")
            run(*ip, "link", "set", name, "up")
        process = subprocess.Popen(
            [*_enter(there), sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listens\n"
            yield Server(process.pid, process, f"/proc/{here.pid}/ns/net")
        finally:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def _client(server: Server, ip: str = "10.78.0.2") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with network.socket_in(server.here, family, socket.SOCK_STREAM, 0) as client:
        client.connect((ip, 5000))
        yield client


def _peer(server: Server, *words: str) -> None:
    run("nsenter", f"--net={server.here}", "--", "ip", *words)


def test_a_connection_counts_until_it_is_accepted(server: Server) -> None:
    with Connections(server.pid) as connections:
        assert connections.unaccepted() == 0
        with _client(server), _client(server, "fd00::2"):
            assert connections.unaccepted() == 2
            server.order("accept 10.78.0.2")
            assert connections.unaccepted() == 1
            server.order("accept fd00::2")
            assert connections.unaccepted() == 0


@pytest.mark.parametrize("ip", ["10.78.0.2", "fd00::2"])
def test_what_is_sent_counts_until_the_peer_has_acknowledged_it(server: Server, ip: str) -> None:
    with Connections(server.pid) as connections, _client(server, ip) as client:
        server.order(f"accept {ip}")
        server.order("100")
        assert client.recv(100, socket.MSG_WAITALL) == b"x" * 100
        assert connections.acknowledged(most=30.0) == 0
        _peer(server, "link", "set", "peer0", "down")
        server.order("100")
        assert connections.unacknowledged() == 100
        # A peer that does not answer: after a retransmission, nobody waits for it any more.
        assert connections.acknowledged(most=30.0) == 0


def test_a_process_without_a_network_of_its_own_is_known(server: Server) -> None:
    assert own_network(server.pid)
    assert not own_network(os.getpid())


def test_a_socket_is_made_elsewhere_and_this_thread_stays_here(server: Server) -> None:
    mine = os.readlink("/proc/thread-self/ns/net")
    with network.socket_in(server.here, socket.AF_INET, socket.SOCK_STREAM, 0) as there:
        there.bind(("10.78.0.1", 0))  # an address that is only there
    assert os.readlink("/proc/thread-self/ns/net") == mine
    with pytest.raises(FileNotFoundError):
        network.socket_in("/proc/0/ns/net", socket.AF_INET, socket.SOCK_STREAM, 0)


def test_every_address_is_announced_to_the_other_end_of_the_link(server: Server) -> None:
    everything = socket.htons(0x0003)  # ETH_P_ALL
    with network.socket_in(server.here, socket.AF_PACKET, socket.SOCK_RAW, everything) as sniffer:
        sniffer.bind(("peer0", 0x0003))
        sent = announce.addresses(f"/proc/{server.pid}/ns/net")
        assert {a.ip for a in sent} >= {
            socket.inet_pton(socket.AF_INET, "10.78.0.2"),
            socket.inet_pton(socket.AF_INET6, "fd00::2"),
        }
        assert {(a.link, a.mac) for a in sent} == {("link0", MAC)}
        awaited = {announce.arp(a) if len(a.ip) == 4 else announce.advertisement(a) for a in sent}
        sniffer.settimeout(30.0)
        while awaited:
            awaited.discard(sniffer.recv(2048))


def test_a_neighbour_that_had_another_hardware_address_learns_the_new_one(
    server: Server,
) -> None:
    for ip in ("10.78.0.2", "fd00::2"):
        # An entry as it is of a container that was somewhere else a moment ago.
        old = ["lladdr", "02:00:00:00:00:01", "nud", "stale"]
        _peer(server, "neighbour", "replace", ip, "dev", "peer0", *old)
    announce.addresses(f"/proc/{server.pid}/ns/net")
    for ip in ("10.78.0.2", "fd00::2"):
        shown = run("nsenter", f"--net={server.here}", "--", "ip", "neighbour", "show", ip)
        assert f"lladdr {MAC.hex(':')}" in str(shown)


@pytest.mark.parametrize("ip", ["10.78.0.1", "fd00::1"])
def test_a_neighbour_that_did_not_answer_while_the_link_was_down_is_forgotten(
    server: Server, ip: str
) -> None:
    namespace = f"/proc/{server.pid}/ns/net"
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET

    def known() -> str:
        return run("nsenter", f"--net={namespace}", "--", "ip", "neighbour", "show", ip).strip()

    with (
        announce.Announcer(namespace) as announcer,
        network.socket_in(namespace, family, socket.SOCK_DGRAM, 0) as out,
    ):
        out.sendto(b"x", (ip, 9))
        announcer.forget_unanswered()
        assert f"lladdr {_mac_of_peer(server)}" in known()  # one that answers is kept
        _peer(server, "link", "set", "peer0", "down")
        run("nsenter", f"--net={namespace}", "--", "ip", "neighbour", "flush", "dev", "link0")
        out.sendto(b"x", (ip, 9))
        assert known().endswith("INCOMPLETE")
        _peer(server, "link", "set", "peer0", "up")
        announcer.wait_for_links(carrier=30.0)
        announcer.forget_unanswered()
        assert known() == ""


def _mac_of_peer(server: Server) -> str:
    shown = run("nsenter", f"--net={server.here}", "--", "ip", "-o", "link", "show", "peer0")
    return str(shown).split("link/ether ")[1].split()[0]


def test_the_frames_are_those_of_the_standards() -> None:
    four = Address("link0", MAC, socket.inet_pton(socket.AF_INET, "10.78.0.2"))
    assert announce.arp(four).hex() == (
        "ffffffffffff" + MAC.hex() + "0806"
        "0001080006040001" + MAC.hex() + "0a4e0002" + "000000000000" + "0a4e0002"
    )
    six = Address("link0", MAC, socket.inet_pton(socket.AF_INET6, "fe80::42"))
    frame = announce.advertisement(six)
    assert frame[:14] == bytes.fromhex("333300000001") + MAC + b"\x86\xdd"
    size, following, hops = struct.unpack_from("!HBB", frame, 18)
    assert (size, following, hops) == (len(frame) - 54, 58, 255)
    # With the pseudo header, a right checksum makes the sum all ones.
    pseudo = frame[22:54] + struct.pack("!II", size, 58)
    total = sum(struct.unpack(f"!{(len(pseudo) + size) // 2}H", pseudo + frame[54:]))
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF
    assert frame[54:56] == b"\x88\x00" and frame[58:62] == b"\x20\x00\x00\x00"
    assert frame[62:78] == six.ip and frame[78:] == b"\x02\x01" + MAC


@pytest.mark.parametrize("server", ["127.0.0.1", "::"])
def test_a_connection_is_local_when_both_ends_are_in_the_namespace(server: str) -> None:
    """A server of both families has its peer's address in another form."""
    needs("unshare")
    code = f"""
import socket, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
six = {server!r} == "::"
s = socket.create_server(({server!r}, 5000), family=socket.AF_INET6 if six else socket.AF_INET,
    dualstack_ipv6=six)
print("ready", flush=True)
sys.stdin.readline()
c = socket.create_connection(("127.0.0.1", 5000))
a = s.accept()[0]
c.setblocking(False)
try:
    while True: c.send(bytes(1 << 16))
except BlockingIOError: pass
print("full", flush=True)
sys.stdin.readline()
"""
    words = ["unshare", "--net", sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as made:
        assert made.stdin is not None and made.stdout is not None
        assert made.stdout.readline() == "ready\n"
        with Connections(made.pid) as connections:
            assert not connections.local(), "nothing is connected"
            made.stdin.write("\n")
            made.stdin.flush()
            assert made.stdout.readline() == "full\n"
            connections.thawed()
            assert connections.local()
            assert connections.unacknowledged() == 0, "nobody waits for a frozen peer"
        made.stdin.close()
