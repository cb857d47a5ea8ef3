# SPDX-License-Identifier: Apache-2.0
"""Other networks and other published ports for a container on the target (`--network`,
`--publish`), and what that does to its sockets."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.podman.exported import MAC, NAME, Exported

T = TypeVar("T")
_LISTENS = "0A"
"""A TCP socket's state in /proc/PID/net/tcp."""


@dataclass(frozen=True)
class Network:
    """A network on the target."""

    name: str
    addresses: tuple[str, ...] = ()
    """Empty: one that is free there."""
    mac: str = ""
    """Empty: as here."""


def parse_network(text: str) -> Network:
    """NAME[:ip=ADDRESS][,mac=ADDRESS], as for `podman run --network`.  ValueError."""
    name, _, options = text.partition(":")
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a network")
    found = Network(name)
    for option in options.split(",") if options else ():
        key, _, value = option.partition("=")
        if key == "ip":
            address = str(ipaddress.ip_address(value))
            found = replace(found, addresses=(*found.addresses, address))
        elif key == "mac" and MAC.fullmatch(value.lower()):
            found = replace(found, mac=value.lower())
        else:
            raise ValueError(f"{option!r} is neither ip=ADDRESS nor mac=ADDRESS")
    return found


def parse_port(text: str) -> dict[str, Any]:
    """[ADDRESS:]HOST:CONTAINER[/tcp|/udp|/sctp], as Podman describes it.  ValueError."""
    ports, _, protocol = text.partition("/")
    address, _, host = ports.rpartition(":")[0].rpartition(":")
    numbers = [host, ports.rpartition(":")[2]]
    if not all(n.isascii() and n.isdecimal() and 0 < int(n) < 65536 for n in numbers):
        raise ValueError(f"{text!r} is not [ADDRESS:]HOST:CONTAINER with two port numbers")
    if protocol not in ("", "tcp", "udp", "sctp"):
        raise ValueError(f"{protocol!r} is not tcp, udp or sctp")
    if address:
        address = str(ipaddress.ip_address(address.strip("[]")))
    return {
        "host_ip": address,
        "host_port": int(numbers[0]),
        "container_port": int(numbers[1]),
        "range": 1,
        "protocol": protocol or "tcp",
    }


@dataclass(frozen=True)
class Wanted:
    """What the user wants instead of what the container has; empty: nothing else."""

    networks: tuple[Network, ...] = ()
    ports: tuple[Mapping[str, Any], ...] = ()

    def lost(self, exported: Exported) -> list[str]:
        """Addresses that the container has here, and will not have there."""
        if not self.networks:
            return []
        kept = {address for network in self.networks for address in network.addresses}
        return sorted({a for link in exported.links for a in link.addresses} - kept)

    def put_into(self, exported: Exported) -> Exported:
        """The description of the container with it.  MigrateError(15)."""
        if self.networks:
            exported = _with_networks(exported, self.networks)
        if not self.ports:
            return exported
        config = {k: v for k, v in exported.config.items() if k != "portMappings"}
        return Exported({**config, "newPortMappings": [*map(dict, self.ports)]}, exported.network)


NOTHING = Wanted()


def parse(networks: Sequence[str], ports: Sequence[str]) -> Wanted:
    """MigrateError(1)."""
    found = Wanted(
        tuple(_parsed("--network", parse_network, networks)),
        tuple(_parsed("--publish", parse_port, ports)),
    )
    if len({n.name for n in found.networks}) < len(found.networks):
        raise MigrateError(VzExitCode.USAGE, "--network names a network twice")
    return found


def _parsed(option: str, parse_one: Callable[[str], T], texts: Sequence[str]) -> Iterator[T]:
    for text in texts:
        try:
            yield parse_one(text)
        except ValueError as e:
            raise MigrateError(VzExitCode.USAGE, f"{option} {text}: {e}") from e


def _with_networks(exported: Exported, networks: Sequence[Network]) -> Exported:
    before = exported.links
    if len(before) != len(networks):
        raise _refusal(
            f"--network names {len(networks)} networks instead of {len(before)}, which the "
            "container has here"
        )
    made, status = {}, {}
    for network, link in zip(networks, before, strict=True):
        made[network.name] = {
            "interface_name": link.name,
            "aliases": [str(exported.config["id"])[:12]],
            **({"static_ips": list(network.addresses)} if network.addresses else {}),
            **({"static_mac": network.mac} if network.mac else {}),
        }
        subnets = [{"ipnet": f"{a}/{128 if ':' in a else 32}"} for a in network.addresses]
        # Podman takes the addresses of a restored container from here.
        mac = network.mac or link.mac
        status[network.name] = {"interfaces": {link.name: {"mac_address": mac, "subnets": subnets}}}
    return Exported({**exported.config, "newNetworks": made}, status)


# ---- its sockets


def check_sockets(init: int, gone: Sequence[str]) -> None:
    """MigrateError(15) when a socket of the container is bound to an address that it loses: it
    could not be restored.  A TCP connection ends instead.  init: its first process."""
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        try:
            lines = Path(f"/proc/{init}/net/{kind}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_ = line.split()
            address, port = _address(local)
            if address in gone and (kind.startswith("udp") or state == _LISTENS):
                raise _refusal(
                    f"a {kind} socket of the container is bound to {address} (port {port}), which "
                    "it would not have on the target",
                    "let the program listen on all addresses, or keep the address (--network "
                    f"NAME:ip={address})",
                )


def _address(local: str) -> tuple[str, int]:
    """Of a socket in /proc/PID/net: words of the machine's byte order, in hexadecimal."""
    words, _, port = local.partition(":")
    raw = b"".join(bytes.fromhex(words[n : n + 8])[::-1] for n in range(0, len(words), 8))
    found = ipaddress.ip_address(raw)
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found), int(port, 16)


def _refusal(text: str, hint: str = "") -> MigrateError:
    return MigrateError(VzExitCode.BAD_CONFIG, text, hint=hint or None)
