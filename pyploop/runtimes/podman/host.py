# SPDX-License-Identifier: Apache-2.0
"""What `podman info` says of a host, as far as a container depends on it."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.checks import Checks, naming
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

    def folders_of(self, container: str) -> tuple[str, str]:
        """Where Podman keeps its own files for a container, by its ID: while it runs; always."""
        tops = (self.run_root, self.graph_root)
        run, graph = (f"{top}/overlay-containers/{container}" for top in tops)
        return run, graph

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


def look(podman: Podman, checks: Checks) -> PodmanHost:
    """Each check of this host that fails is added.  ChecksFailedError when Podman does not
    answer."""
    with naming("podman"):
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
    for name, (text, hint) in _unfit(found).items():
        with checks.named(name):
            raise MigrateError(VzExitCode.BAD_CONFIG, text, hint=hint)
    return found


def _unfit(found: PodmanHost) -> dict[str, tuple[str, str]]:
    """Check -> what was found, and what to do."""
    unfit = {}
    if found.rootless:
        unfit["podman-rootless"] = (
            "this is a rootless Podman, whose containers CRIU cannot restore",
            "make it a container of root (sudo podman)",
        )
    if found.number < OLDEST:
        unfit["podman-version"] = (
            f"Podman {found.version or 'of an unknown version'} is too old",
            f"install {OLDEST[0]}.{OLDEST[1]} or newer",
        )
    if found.driver != "overlay":
        unfit["podman-storage"] = (
            f"Podman stores its containers with the driver {found.driver}, which cannot be "
            "migrated",
            'set driver = "overlay" in /etc/containers/storage.conf, and make the containers again',
        )
    if not found.runc:
        unfit["podman-runtime"] = (
            "this host has no runc, with which Podman restores",
            "install runc",
        )
    return unfit
