# SPDX-License-Identifier: Apache-2.0
"""--network and --publish of a container of Podman: what may be said, and what it changes."""

from __future__ import annotations

import os
import socket

import pytest

from pyploop.errors import MigrateError
from pyploop.runtimes.config import ContainerConfig, HostConfig
from pyploop.runtimes.podman import wanted
from pyploop.runtimes.podman.exported import Exported
from pyploop.runtimes.registry import make_runtime

MAC = "02:00:00:00:00:01"
MADE = Exported(
    {"id": "a" * 64, "newNetworks": {"lan": {}}, "newPortMappings": [{"host_port": 1}]},
    {"lan": {"interfaces": {"eth0": {"mac_address": MAC, "subnets": [{"ipnet": "10.7.0.9/24"}]}}}},
)


def test_another_network_keeps_the_link_s_name_and_hardware_address() -> None:
    want = wanted.parse(["other:ip=10.8.0.1"], ["8080:80", "[::1]:53:53/udp"])
    made = want.put_into(MADE)
    assert want.lost(MADE) == ["10.7.0.9"]
    assert made.config["newNetworks"] == {
        "other": {"interface_name": "eth0", "aliases": ["a" * 12], "static_ips": ["10.8.0.1"]}
    }
    link = {"mac_address": MAC, "subnets": [{"ipnet": "10.8.0.1/32"}]}
    assert made.network == {"other": {"interfaces": {"eth0": link}}}
    ports = made.config["newPortMappings"]
    assert [(p["host_ip"], p["host_port"], p["protocol"]) for p in ports] == [
        ("", 8080, "tcp"),
        ("::1", 53, "udp"),
    ]


def test_without_them_nothing_changes() -> None:
    assert wanted.NOTHING.put_into(MADE) == MADE
    assert not wanted.NOTHING.lost(MADE)
    assert not wanted.parse(["other:ip=10.7.0.9"], []).lost(MADE)  # the address is kept


@pytest.mark.parametrize("network", ["--all", "a/b", "", "lan:ip=10.7.0", "lan:x=1", "lan:mac=1"])
def test_a_network_that_podman_could_take_for_something_else_is_an_error(network: str) -> None:
    with pytest.raises(MigrateError) as failed:
        wanted.parse([network], [])
    assert failed.value.exit_code == 1


@pytest.mark.parametrize("port", ["80", "0:80", "x:80", "8080:80/icmp", "1.2.3:1:2", "1:70000"])
def test_a_port_that_is_none_is_an_error(port: str) -> None:
    with pytest.raises(MigrateError, match="--publish"):
        wanted.parse([], [port])


def test_as_many_networks_as_before_must_be_named() -> None:
    with pytest.raises(MigrateError, match="names 2 networks instead of 1"):
        wanted.parse(["one", "two"], []).put_into(MADE)


@pytest.mark.parametrize(
    ("family", "kind", "address"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1"),
        (socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1"),
        (socket.AF_INET6, socket.SOCK_STREAM, "::1"),
    ],
)
def test_a_socket_that_is_bound_to_a_lost_address_is_named(
    family: socket.AddressFamily, kind: socket.SocketKind, address: str
) -> None:
    with socket.socket(family, kind) as sock:
        sock.bind((address, 0))
        if kind is socket.SOCK_STREAM:
            sock.listen()
        wanted.check_sockets(os.getpid(), ["192.0.2.1"])
        with pytest.raises(MigrateError, match=rf"is bound to {address} \(port \d+\)"):
            wanted.check_sockets(os.getpid(), [address])


def test_other_runtimes_refuse_them() -> None:
    host = HostConfig(
        containers={"web": ContainerConfig("web", bundle="/srv/web", trees=("/srv/web/root",))}
    )
    runtime = make_runtime(host, "runc", "web")
    runtime.rewire([], [])
    with pytest.raises(MigrateError, match="for containers of Podman: web is run by runc"):
        runtime.rewire(["lan"], [])
