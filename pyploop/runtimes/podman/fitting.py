# SPDX-License-Identifier: Apache-2.0
"""Whether a container of another host's Podman fits this host.  All of it is checked before
anything is made here."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Facts
from pyploop.runtimes.checks import Checks
from pyploop.runtimes.config import within
from pyploop.runtimes.podman import image, networks, systemd
from pyploop.runtimes.podman.command import Podman
from pyploop.runtimes.podman.container import ID
from pyploop.runtimes.podman.exported import MAC, NAME, Exported
from pyploop.runtimes.podman.host import PodmanHost, number_of
from pyploop.runtimes.podman.movable import refuse

JOURNAL = "/run/systemd/journal/socket"
_PATH = re.compile(r"(/[^/\x00-\x1f]+)+")


@dataclass(frozen=True)
class Coming:
    """What the source says of the container, checked as far as its form goes."""

    id: str
    host: Mapping[str, Any]
    """Its Podman (host.PodmanHost)."""
    exported: Exported
    image: image.Image
    root: str
    """Its root, as the source's config.json names it."""
    volumes: Mapping[str, str]
    """Name -> path on the source."""
    binds: list[str]
    """Folders of the source that move to the same place here."""
    owned: list[str]
    """Sources of binds that each Podman makes itself."""
    external: list[str]
    units: list[systemd.Unit]
    """systemd units that start it."""
    known: dict[str, Any]
    """The source's networks (networks.sent)."""
    readdressed: bool
    """It loses an address, and with it its TCP connections."""

    @property
    def removes_itself(self) -> bool:
        """Podman removes it when its processes end (--rm)."""
        annotations = self.exported.config["spec"].get("annotations") or {}
        return annotations.get("io.podman.annotations.autoremove") == "TRUE"

    @property
    def networks(self) -> dict[str, Any]:
        return dict(self.exported.config.get("newNetworks") or {})

    @property
    def addresses(self) -> list[str]:
        """Hardware addresses of its links."""
        found = [link.mac for link in self.exported.links]
        if not all(MAC.fullmatch(a) for a in found):
            refuse("the source announces a link of the container without a hardware address")
        return found


def coming(facts: Facts) -> Coming:
    """MigrateError(15) for what no pyploop sends."""
    told = facts.get("podman")
    try:
        assert isinstance(told, dict)
        exported = Exported(dict(told["config"]), dict(told["network"]))
        found = Coming(
            id=str(exported.config["id"]),
            host=dict(told["host"]),
            exported=exported,
            image=image.parse(str(exported.config["rootfsImageID"]), told["image"]),
            root=_path(told["root"]),
            volumes={_name(k): _path(v) for k, v in dict(told["volumes"]).items()},
            binds=[_path(p) for p in told["binds"]],
            owned=[_path(p) for p in told["owned"]],
            external=[_path(p) for p in facts.get("external") or ()],
            units=systemd.coming(
                told.get("units") or (),
                str(exported.config["id"]),
                str(exported.config["name"]),
            ),
            known=dict(told.get("networks") or {}),
            readdressed=bool(told.get("readdressed")),
        )
        addresses = found.addresses
        _check_form(exported.config)
        assert ID.fullmatch(found.id) and ID.fullmatch(found.image.id) and addresses is not None
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as e:
        refuse(f"the source's description of the container is not one: {e!r}")
    return found


def _check_form(config: Mapping[str, Any]) -> None:
    """What `check` reads of it.  The names become words of Podman's commands."""
    if not isinstance(config["spec"], dict):
        raise TypeError("spec is not an object")
    for network in dict(config.get("newNetworks") or {}):
        _name(network)
    for mapping in ports(config):
        for key, most in (("host_port", 65535), ("container_port", 65535), ("range", 65535)):
            if not 0 <= int(mapping.get(key) or 0) <= most:
                raise ValueError(f"{key} is {str(mapping[key])[:40]}")
        for key in ("host_ip", "protocol"):
            if not re.fullmatch(r"[0-9A-Fa-z.:,]{0,64}", mapping.get(key) or ""):
                raise ValueError(f"{key} is {str(mapping[key])[:80]!r}")
    for secret in _secrets(config):
        _name(secret.get("name"))


def ports(config: Mapping[str, Any]) -> list[Any]:
    """Published ports, as Podman describes them."""
    return list(config.get("newPortMappings") or config.get("portMappings") or ())


def _secrets(config: Mapping[str, Any]) -> list[Any]:
    return [*(config.get("secrets") or ()), *dict(config.get("secret_env") or {}).values()]


def _path(value: Any) -> str:
    if not isinstance(value, str) or not _PATH.fullmatch(value) or os.path.normpath(value) != value:
        raise ValueError(f"{str(value)[:80]!r} is not a plain path")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"{str(value)[:80]!r} is not a name of Podman's")
    return value


def check(
    podman: Podman, name: str, here: PodmanHost, it: Coming, checks: Checks, *, live: bool
) -> None:
    """Each that fails is added to `checks`: what is here already, and what is missing."""
    config = it.exported.config
    with checks.named("podman-description"):
        if config.get("name") != name:
            refuse(f"the source describes the container {str(config.get('name'))[:80]!r}")
    with checks.named("exists"):
        _check_absent(podman, (name, it.id))
    _check_host(here, it, checks)
    with checks.named("podman-volume"):
        check_volumes(podman, it)
    with checks.named("podman-systemd"):
        systemd.check(it.units)
    for network in sorted(it.networks):
        with checks.named("podman-network"):
            status = it.exported.network.get(network)
            networks.check(podman, network, it.known.get(network), status or {})
    with checks.named("podman-log"):
        _check_log(config)
    with checks.named("podman-nft"):
        if it.networks and live and shutil.which("nft") is None:
            refuse(
                "this host has no nft, which keeps the container's new link silent",
                "install nftables",
            )
    _check_secrets(podman, config, checks)
    _check_ports(config, checks)


def _check_absent(podman: Podman, names: Sequence[str]) -> None:
    for known in names:
        if podman.says_yes("container", "exists", known):
            raise MigrateError(
                VzExitCode.EXISTS,
                f"Podman has a container {known[:64]} on this host already",
                hint="rename or remove it",
            )


def check_volumes(podman: Podman, it: Coming) -> None:
    """MigrateError(9) when one of its volumes is here: it would get the container's files."""
    for volume in it.volumes:
        if podman.says_yes("volume", "exists", volume):
            raise MigrateError(
                VzExitCode.EXISTS,
                f"Podman has a volume {volume} on this host already",
                hint=f"remove it (podman volume rm {volume}), or give it another name",
            )


def _check_log(config: Mapping[str, Any]) -> None:
    if config.get("logDriver") == "journald" and not os.path.exists(JOURNAL):
        refuse(
            f"the container's output goes to journald, and this host has no {JOURNAL}",
            "start systemd-journald on this host, or run the container with another --log-driver",
        )


def _check_host(here: PodmanHost, it: Coming, checks: Checks) -> None:
    theirs = str(it.host.get("version") or "")
    with checks.named("podman-version"):
        if here.number < number_of(theirs):
            refuse(
                f"Podman {here.version} on this host is older than {theirs[:40]} on the source",
                "install that version or a newer one",
            )
    for key, check, what in (
        ("graph_root", "podman-storage", "stores containers in"),
        ("run_root", "podman-storage", "keeps its state in"),
        ("volumes", "podman-storage", "stores volumes in"),
        ("cgroups", "podman-cgroups", "uses cgroups of version"),
        ("manager", "podman-cgroups", "lets cgroups be made by"),
    ):
        ours, other = getattr(here, key), str(it.host.get(key) or "")[:200]
        with checks.named(check):
            if ours != other:
                refuse(
                    f"Podman {what} {ours} on this host, and {other} on the source",
                    "use the same on both hosts (/etc/containers/storage.conf, containers.conf)",
                )
    with checks.named("podman-storage"):
        # What comes is renamed into its place.
        if it.volumes and not within(here.volumes, here.graph_root):
            refuse(
                f"{here.volumes} does not lie in {here.graph_root} on this host",
                "set volume_path in /etc/containers/containers.conf",
            )
        if it.volumes and os.path.ismount(here.volumes):
            refuse(
                f"{here.volumes} and {here.graph_root} are not on one file system on this host",
                f"unmount {here.volumes}",
            )


def _check_secrets(podman: Podman, config: Mapping[str, Any], checks: Checks) -> None:
    for secret in _secrets(config):
        name = str(secret.get("name") or "")
        with checks.named("podman-secret"):
            if not name or podman.tried("secret", "inspect", name)[0]:
                refuse(
                    f"Podman has no secret {name[:80]} on this host",
                    f"create it (podman secret create {name[:80]} FILE)",
                )


def _check_ports(config: Mapping[str, Any], checks: Checks) -> None:
    """Published ports are free."""
    for mapping in ports(config):
        first, count = int(mapping.get("host_port") or 0), int(mapping.get("range") or 1)
        address = str(mapping.get("host_ip") or "0.0.0.0")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for protocol in str(mapping.get("protocol") or "tcp").split(","):
            kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
            with checks.named("podman-port"):
                for port in range(first, first + min(count, 1024)):
                    _check_port(family, kind, address, port, protocol)


def _check_port(family: int, kind: int, address: str, port: int, protocol: str) -> None:
    with socket.socket(family, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address, port))
        except OSError as e:
            refuse(
                f"the container publishes the {protocol} port {port} on {address}, which this host "
                f"cannot give it: {e.strerror}",
                "stop the program that uses it there (ss -lnp), or give the host the address",
            )
