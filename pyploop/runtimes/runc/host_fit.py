# SPDX-License-Identifier: Apache-2.0
"""Whether config.json fits a host: its namespaces, kernel settings and CPUs.

Without these checks the restore would fail, with the container suspended, or would restore
something else without an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.runc.leftovers import cpus_of
from pyploop.system.commands import run

TIMEOUT = 30.0
_CPUS, _NODES = "/sys/devices/system/cpu/online", "/sys/devices/system/node/online"


def check_source(config: Mapping[str, Any]) -> None:
    """MigrateError(15) when config.json has what only this host can give."""
    if (config.get("process") or {}).get("terminal"):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            "config.json has process.terminal: the container's terminal belongs to a program of "
            "this host, and cannot be migrated (docs/internals/criu.md)",
            hint="start the container without a terminal (podman run without --tty)",
        )
    for namespace in (config.get("linux") or {}).get("namespaces") or ():
        if namespace.get("path") and namespace.get("type") != "network":
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the container shares the {namespace.get('type')} namespace "
                f"{namespace['path']} with other processes of this host, and cannot leave it",
            )


def check_target(config: Mapping[str, Any], live: bool) -> None:
    """config: fitted to this host.  MigrateError(15)."""
    linux = config.get("linux") or {}
    for namespace in linux.get("namespaces") or ():
        path = namespace.get("path")
        if path and not os.path.exists(path):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the {namespace.get('type')} namespace {path} does not exist on this host: create "
                "it first",
                path=path,
            )
        if path and path.startswith("/proc/"):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the {namespace.get('type')} namespace {path} belongs to some process of this "
                "host: write netns in the container's configuration on this host",
                path=path,
            )
        if path and live and namespace.get("type") == "network":
            _check_settings(path, linux.get("sysctl") or {})
    cpu = (linux.get("resources") or {}).get("cpu") or {}
    for key, file in (("cpus", _CPUS), ("mems", _NODES)):
        text = str(cpu.get(key) or "")
        wanted, there = cpus_of(text), _online(file)
        if text and not isinstance(wanted, set):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"linux.resources.cpu.{key} of config.json is {text[:80]!r}, not a list of numbers",
            )
        if isinstance(wanted, set) and there is not None and not wanted <= there:
            missing = ", ".join(map(str, sorted(wanted - there)))
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"linux.resources.cpu.{key} of config.json has {missing}, which this host does not "
                "have online",
            )


def _online(file: str) -> set[int] | None:
    try:
        found = cpus_of(Path(file).read_text())
    except OSError:
        return None
    return found if isinstance(found, set) else None


def _check_settings(namespace: str, settings: Mapping[str, Any]) -> None:
    """MigrateError(15) unless the network namespace, which this host made, has the settings.
    A start sets them; a restore does not."""
    for name, value in settings.items():
        if not name.startswith("net."):
            continue
        file = "/proc/sys/" + (name if "/" in name else name.replace(".", "/"))
        now = run(
            ["nsenter", f"--net={namespace}", "cat", "--", file], VzExitCode.BAD_CONFIG, TIMEOUT
        )
        if now.split() != str(value).split():
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{name} is {now.strip()} in {namespace} on this host, but {value} in config.json: "
                f"set it (nsenter --net={namespace} sysctl -w {name}='{value}')",
                path=namespace,
            )
