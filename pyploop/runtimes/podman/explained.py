# SPDX-License-Identifier: Apache-2.0
"""What a container or a pod of Podman has, and what a migration does with each part: the lines of
`pyploop migrate --explain`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyploop.errors import MigrateError
from pyploop.runtimes.config import HostConfig, within
from pyploop.runtimes.oci import bundles
from pyploop.runtimes.podman import pod as pods
from pyploop.runtimes.podman import systemd
from pyploop.runtimes.podman.command import Podman
from pyploop.runtimes.podman.found import Found, find, lies_in
from pyploop.runtimes.policy import Policy

_HOW = "while it runs; the last changes while it is suspended"


def lines(host: HostConfig, name: str) -> tuple[list[str], list[str]]:
    """(each part and what becomes of it; what migrate.toml needs).  MigrateError(15)."""
    podman = Podman(host.podman, host.command_timeout)
    if found := find(podman, name):
        parts = [*_container(host, podman, found), *_network(found)]
        return parts, _toml(host, [found])
    pod = pods.look(podman, name)
    if pod is None:
        return [], []
    parts = [f"{len(pod.members)} containers: they are suspended together, and keep their IDs"]
    parts.append("the pod and its infra container: made again on the target, with other IDs")
    parts += _network(pod.infra)
    members = [m for n in pod.members if (m := find(podman, n)) is not None]
    for member in members:
        parts += [f"{member.name}: {line}" for line in _container(host, podman, member)]
    return parts, _toml(host, members)


def _container(host: HostConfig, podman: Podman, found: Found) -> Iterator[str]:
    raw = found.raw
    image = str(raw.get("ImageName") or "without a name")
    yield (
        f"image {image} ({str(raw.get('Image'))[:12]}): the layers that the target lacks go there "
        f"before anything else"
    )
    if found.upper:
        yield f"changes of the image, {found.upper}: copied {_HOW}"
    for volume in found.volumes:
        yield f"volume {volume.name}, {volume.path}: copied {_HOW}"
    for path in found.binds:
        yield f"bind {path}: {_bind(host, path) or 'nothing says what becomes of it'}"
    secrets = (raw.get("Config") or {}).get("Secrets") or ()
    for secret in secrets:
        yield f"secret {secret.get('Name')}: not copied; the target must have it"
    units = systemd.find(podman.timeout, found.id, found.name)
    for unit in units:
        what = f"does not move: {unit.why}" if unit.why else "installed on the target"
        yield f"systemd unit {unit.name}: {what}; disabled here when the container has moved"
    if found.log:
        yield f"output so far, {found.log}: copied"
    else:
        kind = (raw["HostConfig"].get("LogConfig") or {}).get("Type")
        yield f"output so far: stays here, with the log driver {kind}"
    yield "name, ID and options of podman run: the target's Podman gets the same"


def _bind(host: HostConfig, path: str) -> str:
    """What becomes of it, as migrate.toml says; empty: nothing is said."""
    if lies_in(path, host.podman_binds):
        return f"copied {_HOW} ([podman] binds)"
    if path in map(os.path.normpath, host.podman_external):
        return "not copied; the target must have it ([podman] external)"
    return ""


def _network(found: Found) -> Iterator[str]:
    networks = (found.raw.get("NetworkSettings") or {}).get("Networks") or {}
    for name, link in networks.items():
        keys = ("IPAddress", "GlobalIPv6Address", "MacAddress")
        has = ", ".join(str(link[k]) for k in keys if link.get(k)) or "no address"
        yield (
            f"network {name} ({has}): the same addresses in the target's network of that name, or "
            "as --network says"
        )
    bindings = (found.raw.get("HostConfig") or {}).get("PortBindings") or {}
    for inside, outside in bindings.items():
        for one in outside or ():
            where = ":".join(filter(None, (one.get("HostIp"), str(one.get("HostPort")))))
            yield (
                f"published port {where} to {inside}: published by the target, where it must be "
                "free, or as --publish says"
            )


# ---- for migrate.toml


def _toml(host: HostConfig, every: Sequence[Found]) -> list[str]:
    binds = [b for found in every for b in found.binds]
    unknown = [b for b in dict.fromkeys(binds) if not _bind(host, b)]
    moves = [os.path.dirname(b) for b in unknown if _may_move(b)]
    stays = [b for b in unknown if not _may_move(b)]
    return [
        *_podman(host, moves, stays),
        *_policy(host.policy, [c for found in every if (c := _config(found)) is not None]),
    ]


def _may_move(path: str) -> bool:
    """A folder, but none at the top of the tree or of the kernel."""
    places = ("/dev", "/proc", "/sys", "/run", "/etc", "/usr")
    nested = os.path.dirname(path) != "/"
    return nested and os.path.isdir(path) and not any(within(path, p) for p in places)


def _podman(host: HostConfig, moves: Sequence[str], stays: Sequence[str]) -> Iterator[str]:
    if not moves and not stays:
        return
    yield "For /etc/pyploop/migrate.toml on both hosts (what lies below binds moves; what is in"
    yield "external must be on both hosts):"
    yield "[podman]"
    for key, now, more in (
        ("binds", host.podman_binds, moves),
        ("external", host.podman_external, stays),
    ):
        if now or more:
            yield f"{key} = {json.dumps([*dict.fromkeys((*now, *more))])}"


def _config(found: Found) -> dict[str, Any] | None:
    with contextlib.suppress(MigrateError):
        return bundles.read(found.bundle)
    return None


def _policy(ours: Policy, configs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What containers like these need beyond this host's policy."""
    capabilities: list[str] = []
    sysctls: list[str] = []
    devices: list[str] = []
    for config in configs:
        for names in ((config.get("process") or {}).get("capabilities") or {}).values():
            capabilities += names or ()
        linux = config.get("linux") or {}
        sysctls += (s for s in linux.get("sysctl") or () if not ours.allows_sysctl(s))
        devices += (str(d.get("path")) for d in linux.get("devices") or ())
    wanted = {
        "capabilities": (ours.capabilities, capabilities),
        "devices": (ours.devices, devices),
        "sysctls": (ours.sysctls, sysctls),
    }
    needed = {
        key: [*dict.fromkeys((*known, *sorted(more)))]
        for key, (known, more) in wanted.items()
        if {*more} - {*known}
    }
    if needed:
        yield "For /etc/pyploop/migrate.toml on the target, if it is to allow that:"
        yield "[policy]"
        for key, values in needed.items():
            yield f"{key} = {json.dumps(values)}"


def trust(address: str) -> list[str]:
    """The lines without which a target takes no container.  address: this host's."""
    return [
        "For /etc/pyploop/migrate.toml on the target, which must trust this host:",
        "[trust]",
        f"live = {json.dumps([address])}",
    ]
