# SPDX-License-Identifier: Apache-2.0
"""A pod of Podman on this host, and what it shares.

A pod's infra container has the namespaces that the others join: network, ipc, uts.  It runs
nothing but a program that waits.  So it is made anew on the target, with the same options, and
the other containers are restored into its namespaces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.config import NAME
from pyploop.runtimes.podman.command import Podman
from pyploop.runtimes.podman.exported import MAC, Exported
from pyploop.runtimes.podman.found import Found, find
from pyploop.runtimes.podman.movable import refuse
from pyploop.system.commands import run

PAUSE = "localhost/podman-pause"
"""The image of infra containers, which each Podman makes itself."""
SHARED = {"net", "ipc", "uts"}
"""Namespaces that the containers of a pod may share."""
_ALIAS = re.compile(r"[0-9a-f]{12}")
"""Podman's own alias of a container in a network: the beginning of its ID."""
_TIMEOUT = 10.0
_NO_LINK: dict[str, Any] = {}


@dataclass(frozen=True)
class Pod:
    """One pod of this host."""

    id: str
    name: str
    infra: Found
    members: tuple[str, ...]
    """Names of its other containers."""
    ids: tuple[str, ...]
    """Their IDs."""
    raw: Mapping[str, Any]
    """What `podman pod inspect` printed."""

    @property
    def shared(self) -> list[str]:
        return sorted(self.raw.get("SharedNamespaces") or ())

    @property
    def pid(self) -> int:
        """Of the infra container's first process."""
        return int(self.infra.raw["State"].get("Pid") or 0)


def look(podman: Podman, name: str) -> Pod | None:
    """None: there is no such pod.  MigrateError(15) for one without an infra container."""
    raw = podman.inspected("pod", name)
    if raw is None:
        return None
    infra_id = str(raw.get("InfraContainerID") or "")
    infra = find(podman, infra_id) if infra_id else None
    if infra is None:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"the pod {name} has no infra container, and cannot be migrated",
            hint="migrate its containers one by one, or create the pod with --infra",
        )
    others = [c for c in raw.get("Containers") or () if c.get("Id") != infra_id]
    names, ids = (tuple(str(c[key]) for c in others) for key in ("Name", "Id"))
    return Pod(str(raw["Id"]), str(raw["Name"]), infra, names, ids, raw)


# ---- on the source


def check(pod: Pod, config: Mapping[str, Any]) -> None:
    """MigrateError(15) when a pod like this one cannot be made on the target.  config: Podman's
    description of the infra container."""
    raw, host = pod.raw, pod.infra.raw.get("HostConfig") or {}
    if not pod.members:
        refuse(f"the pod {pod.name} has no containers", "create it there: podman pod create")
    if other := sorted({*pod.shared} - SHARED):
        refuse(
            f"the containers of the pod {pod.name} share the namespaces {', '.join(other)}, which "
            "cannot be restored",
            "create the pod with --share net,ipc,uts",
        )
    if not str(pod.infra.raw.get("ImageName") or "").startswith(f"{PAUSE}:"):
        refuse(
            f"the pod {pod.name} has an infra container of its own image, and its processes "
            "would not be migrated",
            "create the pod without --infra-image",
        )
    if host.get("NetworkMode") == "host":
        refuse(
            f"the pod {pod.name} uses the network of this host, and cannot be migrated",
            "create the pod without --network host",
        )
    if odd := _odd(pod, config):
        refuse(
            f"the pod {pod.name} has options that are not made again on the target: "
            f"{', '.join(odd)}",
            "create the pod without them, and give them to its containers",
        )
    if not raw.get("CreateCgroup"):
        refuse(f"the pod {pod.name} has no cgroup", "create the pod without --share-parent=false")


_SYSCTLS = {"net.ipv4.ping_group_range": "0 0"}
"""Podman's own."""
_TAKEN = {
    *("Id", "Name", "Created", "CreateCommand", "ExitPolicy", "State", "Hostname", "Labels"),
    *("CreateCgroup", "CgroupParent", "CgroupPath", "CreateInfra", "InfraContainerID"),
    *("InfraConfig", "SharedNamespaces", "NumContainers", "Containers", "Namespace"),
    *("LockNumber", "RestartPolicy"),
}
_TAKEN_INFRA = {
    *("PortBindings", "StaticIP", "StaticMAC", "DNSServer", "DNSSearch", "DNSOption"),
    *("NoManageHosts", "HostAdd", "Networks"),
}
"""What `words` makes again, of what `podman pod inspect` prints."""
_USUAL = {"pid_ns": "private", "userns": "host", "uts_ns": "private"}
_PLAIN = ("Binds", "Tmpfs", "VolumesFrom", "SecurityOpt", "Devices", "Privileged", "UsernsMode")
"""Of the infra container: what must be empty."""


def _odd(pod: Pod, config: Mapping[str, Any]) -> list[str]:
    """Names of options that `words` does not make again.  A newer Podman may have more."""
    infra = pod.raw.get("InfraConfig") or {}
    found = [k for k, v in pod.raw.items() if v and k not in _TAKEN]
    found += [k for k, v in infra.items() if v and k not in _TAKEN_INFRA and _USUAL.get(k) != v]
    host = pod.infra.raw.get("HostConfig") or {}
    found += [key for key in _PLAIN if host.get(key)]
    linux = (config.get("spec") or {}).get("linux") or {}
    sysctls = linux.get("sysctl") or {}
    found += [k for k, v in sysctls.items() if _SYSCTLS.get(k) != v]
    if pod.raw.get("RestartPolicy") not in (None, "", "no"):
        found.append("RestartPolicy")
    if str(pod.raw.get("CgroupParent") or "") not in ("/libpod_parent", "machine.slice"):
        found.append("CgroupParent")
    return list(dict.fromkeys(found))


def check_ipc(pod: Pod) -> None:
    """MigrateError(8) when the shared ipc namespace has something that outlives its processes:
    it belongs to the infra container, which is made anew."""
    if "ipc" not in pod.shared or not pod.pid:
        return
    tables = [f"/proc/sysvipc/{kind}" for kind in ("shm", "sem", "msg")]
    words = ["nsenter", f"--ipc=/proc/{pod.pid}/ns/ipc", "cat", *tables]
    lines = run(words, VzExitCode.DUMP_FAILED, _TIMEOUT).splitlines()
    objects = [line for line in lines if line.split()[:1] != ["key"]]
    if objects:
        raise MigrateError(
            VzExitCode.DUMP_FAILED,
            f"the containers of the pod {pod.name} share {len(objects)} System V IPC objects, "
            "which CRIU cannot restore into a namespace that is there already",
            hint="create the pod with --share net,uts: then each container has its own",
        )


def told(pod: Pod, exported: Exported) -> dict[str, Any]:
    """For the source facts: how a pod like this one is made."""
    raw, infra = pod.raw, pod.infra.raw
    host, config = infra.get("HostConfig") or {}, infra.get("Config") or {}
    networks = {}
    for name, wanted in (exported.config.get("newNetworks") or {}).items():
        links = ((exported.network.get(name) or {}).get("interfaces") or {}).items()
        interface, link = next(iter(links), ("", _NO_LINK))
        aliases = [a for a in (wanted or {}).get("aliases") or () if not _ALIAS.fullmatch(a)]
        networks[name] = {
            "interface": interface,
            "mac": link.get("mac_address") or "",
            "ips": [str(s.get("ipnet")).partition("/")[0] for s in link.get("subnets") or ()],
            "aliases": aliases,
        }
    hostname = str(config.get("Hostname") or "")
    return {
        "name": pod.name,
        "infra": pod.infra.name,
        "shared": pod.shared,
        "hostname": "" if hostname == pod.name else hostname,
        "labels": dict(raw.get("Labels") or {}),
        "exit": str(raw.get("ExitPolicy") or ""),
        "networks": networks,
        "dns": list(host.get("Dns") or ()),
        "dns_options": list(host.get("DnsOptions") or ()),
        "dns_search": list(host.get("DnsSearch") or ()),
        "hosts": list(host.get("ExtraHosts") or ()),
        "no_hosts": bool((raw.get("InfraConfig") or {}).get("NoManageHosts")),
        "shm": int(host.get("ShmSize") or 0),
    }


# ---- on the target

_ADDRESS = re.compile(r"[0-9a-f.:]{2,45}")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,253}")


def words(told: Mapping[str, Any], ports: Any) -> list[str]:
    """The options of `podman pod create`.  told: as of `told`.  ports: as Podman describes them.
    ValueError, KeyError or TypeError for what no pyploop sends."""
    made = [
        f"--name={_checked(NAME, told['name'])}",
        f"--infra-name={_checked(NAME, told['infra'])}",
        f"--share={','.join(_kinds(told['shared'])) or 'none'}",
    ]
    if told["hostname"]:
        made.append(f"--hostname={_checked(_WORD, told['hostname'])}")
    if told["exit"]:
        made.append(f"--exit-policy={_checked(_WORD, told['exit'])}")
    made += [f"--label={_line(k)}={_line(v)}" for k, v in dict(told["labels"]).items()]
    for key, option in (("dns", "dns"), ("dns_options", "dns-opt"), ("dns_search", "dns-search")):
        made += [f"--{option}={_line(v)}" for v in told[key]]
    made += [f"--add-host={_line(v)}" for v in told["hosts"]]
    made += ["--no-hosts"] if told["no_hosts"] else []
    if "net" in told["shared"]:
        made += _networks(dict(told["networks"]))
        made += [f"--publish={_port(p)}" for p in ports or ()]
    return made


def _checked(form: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ValueError(f"{str(value)[:80]!r}")
    return value


def _line(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise ValueError(f"{str(value)[:80]!r}")
    return value


def _kinds(value: Any) -> list[str]:
    kinds = [str(v) for v in value]
    if not {*kinds} <= SHARED:
        raise ValueError(f"{kinds}")
    return kinds


def _networks(networks: dict[str, Any]) -> list[str]:
    if not networks:
        return ["--network=none"]
    made = []
    for name, link in networks.items():
        options = [f"mac={_checked(MAC, link['mac'])}"] if link["mac"] else []
        for address in link["ips"]:
            kind = "ip6" if ":" in _checked(_ADDRESS, address) else "ip"
            options.append(f"{kind}={address}")
        if link["interface"]:
            options.append(f"interface_name={_checked(_WORD, link['interface'])}")
        options += [f"alias={_checked(_WORD, a)}" for a in link["aliases"]]
        made.append(f"--network={_checked(_WORD, name)}:{','.join(options)}".rstrip(":"))
    return made


def _port(mapping: Mapping[str, Any]) -> str:
    count = max(int(mapping.get("range") or 1), 1) - 1
    host, inner = int(mapping["host_port"]), int(mapping["container_port"])
    span = [f"{p}-{p + count}" if count else str(p) for p in (host, inner)]
    address = str(mapping.get("host_ip") or "")
    if address:
        address = f"[{address}]:" if ":" in _checked(_ADDRESS, address) else f"{address}:"
    protocol = _checked(re.compile(r"tcp|udp|sctp"), mapping.get("protocol") or "tcp")
    return f"{address}{span[0]}:{span[1]}/{protocol}"


def bare(found: Found, pod: Pod, elsewhere: tuple[str, ...]) -> Found:
    """A container of the pod without what another one brings."""
    return replace(
        found,
        infra=pod.infra.id,
        together=pod.ids,
        elsewhere=tuple(
            e for e in elsewhere if e in (*(v.path for v in found.volumes), *found.binds)
        ),
        volumes=tuple(v for v in found.volumes if v.path not in elsewhere),
        binds=tuple(b for b in found.binds if b not in elsewhere),
    )
