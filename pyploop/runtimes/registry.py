# SPDX-License-Identifier: Apache-2.0
"""Which runtime a container belongs to."""

from __future__ import annotations

from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Runtime, config, found_config
from pyploop.runtimes.config import CTID, NAME, HostConfig

RUNTIMES = ("vzctl", "runc", "podman", "podman-pod", "command")
PREFIX = "podman:"
"""Before a container's name: it is one of Podman's."""
REFUSED = {"docker:": "Docker", "lxc:": "LXC"}
"""The same of engines whose containers cannot be migrated."""


def split(name: str | None, container: str) -> tuple[str | None, str]:
    """(runtime, container) of what a user writes: `podman:NAME` names the runtime, too."""
    if container.startswith(PREFIX) and name in (None, "podman"):
        return "podman", container.removeprefix(PREFIX)
    return name, container


def completed(host: HostConfig, name: str | None, container: str) -> HostConfig:
    """The configuration, with a container of runc's that is not in it.  MigrateError."""
    if name not in (None, "runc") or container in host.containers or not NAME.fullmatch(container):
        return host
    from pyploop.runtimes.runc import discovered

    if not discovered.knows(host.runc_root, container):
        return host
    return found_config.with_container(host, container, discovered.table(host.runc_root, container))


def accepted(host: HostConfig, container: str, told: Any) -> HostConfig:
    """On the target: the configuration with a container of runc's as the source has found it.
    MigrateError(15) when it may not be placed here."""
    from pyploop.runtimes.runc import discovered

    return found_config.accepted(host, container, told, discovered.link_commands)


def make_runtime(host: HostConfig, name: str | None, container: str) -> Runtime:
    """The runtime `name`, or that of the configuration for this container.  A number that
    is not in the configuration is a container of vzctl, and `podman:NAME` one of Podman."""
    for prefix, engine in REFUSED.items() if name is None else ():
        if container.startswith(prefix):
            raise MigrateError(
                VzExitCode.USAGE,
                f"containers of {engine} cannot be migrated: the page Docker and LXC "
                "(docs/internals/docker-lxc.md) says why",
                hint="run the container by Podman (podman:NAME) or by runc",
            )
    name, container = split(name, container)
    if name is None:
        known = host.containers.get(container)
        if known is None and not CTID.fullmatch(container):
            file = host.path or config.DEFAULT
            raise MigrateError(
                VzExitCode.NO_CONTAINER,
                f"this host has no container {container}: runc does not know it, and {file} does "
                "not describe it",
                path=file,
                hint=f"`runc list` shows runc's. If it is one of Podman (`podman ps`), write "
                f"{PREFIX}{container}",
            )
        name = known.runtime if known else "vzctl"
    if name == "runc":
        from pyploop.runtimes.runc.runtime import Runc

        return Runc(host, container)
    if name == "podman":
        from pyploop.runtimes.podman.pod_runtime import PodRuntime
        from pyploop.runtimes.podman.runtime import PodmanRuntime

        if not NAME.fullmatch(container):
            raise MigrateError(
                VzExitCode.USAGE, f"{container[:80]!r} is not the name of a container of Podman"
            )
        one = PodmanRuntime(host, container)
        return PodRuntime(host, container) if one.is_pod() else one
    if name == "podman-pod":
        from pyploop.runtimes.podman.pod_runtime import PodRuntime

        if not NAME.fullmatch(container):
            raise MigrateError(
                VzExitCode.USAGE, f"{container[:80]!r} is not the name of a pod of Podman"
            )
        return PodRuntime(host, container)
    if name == "vzctl":
        from pyploop.runtimes.vzctl.runtime import Vzctl

        return Vzctl(host, container)
    if name == "command":
        from pyploop.runtimes.command import CommandRuntime

        return CommandRuntime(host, container)
    raise MigrateError(
        VzExitCode.USAGE, f"unknown runtime {name!r}: choose one of {', '.join(RUNTIMES)}"
    )
