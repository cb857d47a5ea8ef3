# SPDX-License-Identifier: Apache-2.0
"""Networks of Podman: whether the target's are those that the container has, and the kernel's
settings in the container's network namespace, which a restore does not set."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pyploop.errors import VzExitCode
from pyploop.runtimes.podman.command import Podman
from pyploop.runtimes.podman.movable import refuse
from pyploop.system.commands import run

TIMEOUT = 30.0


def sent(podman: Podman, names: Iterable[str]) -> dict[str, Any]:
    """For the source facts: name -> driver, subnets, internal."""
    found = {}
    for name in names:
        known = podman.inspected("network", name) or {}
        subnets = [str(s.get("subnet")) for s in known.get("subnets") or ()]
        internal = bool(known.get("internal"))
        found[name] = {"driver": known.get("driver"), "subnets": subnets, "internal": internal}
    return found


def check(podman: Podman, name: str, theirs: Any, status: Any) -> None:
    """theirs: as of `sent`; an older source does not say.  status: the container's links in this
    network.  MigrateError(15) unless this host's is such a network, with the addresses free."""
    told: Mapping[str, Any] = theirs if isinstance(theirs, dict) else {}
    ours = podman.inspected("network", name)
    if ours is None:
        refuse(f"Podman has no network {name} on this host", _create(name, told))
    again = f"podman network rm {name}; {_create(name, told)}"
    if told and (ours.get("driver"), bool(ours.get("internal"))) != (
        told.get("driver"),
        bool(told.get("internal")),
    ):
        refuse(
            f"the network {name} of this host is of another kind than on the source (driver "
            f"{ours.get('driver')}, internal {str(bool(ours.get('internal'))).lower()})",
            again,
        )
    subnets = [ipaddress.ip_network(s["subnet"]) for s in ours.get("subnets") or ()]
    addresses = set(_addresses(status))
    for address in addresses:
        if not any(address in s for s in subnets):
            refuse(
                f"the container has the address {address}, which is none of the network {name} on "
                f"this host ({', '.join(map(str, subnets)) or 'no subnet'})",
                again,
            )
    _check_free(podman, name, addresses)


def _create(name: str, told: Mapping[str, Any]) -> str:
    words = ["podman network create"]
    if told.get("driver"):
        words.append(f"--driver {str(told['driver'])[:40]}")
    words += [f"--subnet {str(s)[:50]}" for s in (told.get("subnets") or ())[:8]]
    if told.get("internal"):
        words.append("--internal")
    return f"{' '.join(words)} {name}"


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _addresses(status: Any) -> Iterator[Address]:
    try:
        for link in (status.get("interfaces") or {}).values():
            for one in link.get("subnets") or ():
                yield ipaddress.ip_interface(str(one["ipnet"])).ip
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        refuse(f"the source's description of the container's addresses is not one: {e!r}")


def _check_free(podman: Podman, name: str, addresses: set[Address]) -> None:
    listed = podman.run("ps", "-q", "--no-trunc", f"--filter=network={name}")
    for other in listed.split():
        known = podman.inspected("container", other) or {}
        networks = (known.get("NetworkSettings") or {}).get("Networks") or {}
        link = networks.get(name) or {}
        for key in ("IPAddress", "GlobalIPv6Address"):
            if link.get(key) and ipaddress.ip_address(link[key]) in addresses:
                refuse(
                    f"the container {known.get('Name')} of this host has the address {link[key]} "
                    f"in the network {name}, which the container has on the source",
                    f"podman stop {known.get('Name')}, or give one of them another address (--ip)",
                )


# ---- the kernel's settings


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Those of a config.json that belong to its network namespace."""
    every = (config.get("linux") or {}).get("sysctl") or {}
    return {name: str(value) for name, value in every.items() if name.startswith("net.")}


def set_all(namespace: str, wanted: Mapping[str, str]) -> None:
    """MigrateError(7).  wanted: as of `settings`, of a config.json that the policy allows."""
    for name, value in wanted.items():
        file = "/proc/sys/" + (name if "/" in name else name.replace(".", "/"))
        script = ["sh", "-c", 'printf %s "$2" >"$1"', "sh", file, value]
        run(["nsenter", f"--net={namespace}", *script], VzExitCode.RESTORE_FAILED, TIMEOUT)
