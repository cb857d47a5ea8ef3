# SPDX-License-Identifier: Apache-2.0
"""What a container of Podman consists of on this host, from `podman container inspect`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.podman.command import Podman


@dataclass(frozen=True)
class Volume:
    """A named volume."""

    name: str
    path: str
    """The folder of this host that holds its files."""


@dataclass(frozen=True)
class Found:
    """One container of this host."""

    id: str
    name: str
    status: str
    bundle: str
    """The folder with config.json (`userdata`)."""
    merged: str
    """The root, as the container sees it, while it is mounted."""
    upper: str
    """What the container has changed of its image."""
    namespace: str
    """The file of its network namespace; empty when it has none of its own."""
    log: str
    """The file of its output; empty: the output is not in a file."""
    conmon: int
    """Its monitor's pid, 0 when it does not run."""
    volumes: tuple[Volume, ...]
    binds: tuple[str, ...]
    """Paths of this host that the user binds into it."""
    raw: dict[str, Any]
    """All that was printed."""
    infra: str = ""
    """The ID of its pod's infra container, when the pod moves as one."""
    together: tuple[str, ...] = ()
    """The IDs of the containers that move with it."""
    elsewhere: tuple[str, ...] = ()
    """Folders of volumes and binds that one of those brings."""


def lies_in(path: str, places: Sequence[str]) -> bool:
    """Whether a bind mount lies in one of the places that migrate.toml names."""
    return any(path.startswith(f"{top.rstrip('/')}/") for top in places)


def find(podman: Podman, name: str) -> Found | None:
    """None: there is no such container."""
    raw = podman.inspected("container", name)
    if raw is None:
        return None
    try:
        return _found(raw)
    except (KeyError, TypeError, ValueError) as e:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"podman container inspect {name} does not print what is expected of it: {e!r}",
        ) from e


def _found(raw: dict[str, Any]) -> Found:
    mounts = raw.get("Mounts") or []
    log = raw["HostConfig"].get("LogConfig") or {}
    data = (raw.get("GraphDriver") or {}).get("Data") or {}
    bundle = raw.get("OCIConfigPath") or ""
    upper = str(data.get("UpperDir") or "")
    return Found(
        id=str(raw["Id"]),
        name=str(raw["Name"]),
        status=str(raw["State"]["Status"]),
        bundle=os.path.dirname(bundle) or str(raw["StaticDir"]),
        # The folder beside the upper one; it is named only while it is mounted.
        merged=str(data.get("MergedDir") or (f"{os.path.dirname(upper)}/merged" if upper else "")),
        upper=upper,
        namespace=str((raw.get("NetworkSettings") or {}).get("SandboxKey") or ""),
        log=str(log.get("Path") or "") if log.get("Type") in ("k8s-file", "json-file") else "",
        conmon=int(raw["State"].get("ConmonPid") or 0),
        # One may be mounted in several places.
        volumes=tuple(
            dict.fromkeys(Volume(m["Name"], m["Source"]) for m in mounts if m["Type"] == "volume")
        ),
        binds=tuple(dict.fromkeys(m["Source"] for m in mounts if m["Type"] == "bind")),
        raw=raw,
    )
