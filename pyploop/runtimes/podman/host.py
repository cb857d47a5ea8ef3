# SPDX-License-Identifier: Apache-2.0
"""What `podman info` says of a host, as far as a container depends on it."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.podman.command import Podman

OLDEST = (4, 0)


@dataclass(frozen=True)
class PodmanHost:
    """The places and ways of one host's Podman."""

    version: str
    graph_root: str
    run_root: str
    volumes: str
    driver: str
    cgroups: str
    """v1 or v2."""
    manager: str
    """cgroupfs or systemd: who makes the cgroups."""
    rootless: bool
    conmon: str
    runc: str
    """Its programs, the second for containers that run by runc."""

    def told(self) -> dict[str, Any]:
        """For the source facts."""
        return asdict(self)

    @property
    def number(self) -> tuple[int, ...]:
        """(major, minor)."""
        return number_of(self.version)


def number_of(version: str) -> tuple[int, ...]:
    """(major, minor); () when it names none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else ()


def _runc(host: dict[str, Any]) -> str:
    runtime = host.get("ociRuntime") or {}
    if runtime.get("name") == "runc":
        return str(runtime.get("path") or "")
    return shutil.which("runc") or ""


def look(podman: Podman) -> PodmanHost:
    """MigrateError(15) when there is no usable Podman here."""
    info = podman.info()
    host, store = info.get("host") or {}, info.get("store") or {}
    found = PodmanHost(
        str((info.get("version") or {}).get("Version") or ""),
        str(store.get("graphRoot") or ""),
        str(store.get("runRoot") or ""),
        str(store.get("volumePath") or ""),
        str(store.get("graphDriverName") or ""),
        str(host.get("cgroupVersion") or ""),
        str(host.get("cgroupManager") or ""),
        bool((host.get("security") or {}).get("rootless")),
        str((host.get("conmon") or {}).get("path") or ""),
        _runc(host),
    )
    if found.rootless:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            "this is a rootless Podman, whose containers CRIU cannot restore: only containers of "
            "root (sudo podman) can be migrated",
        )
    if found.number < OLDEST:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"Podman {found.version or 'of an unknown version'} is too old: "
            f"{OLDEST[0]}.{OLDEST[1]} or newer is needed",
        )
    if found.driver != "overlay":
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"Podman stores its containers with the driver {found.driver}, and only overlay can "
            "be migrated",
        )
    if not found.runc:
        raise MigrateError(
            VzExitCode.BAD_CONFIG, "this host has no runc, with which Podman restores: install runc"
        )
    return found
