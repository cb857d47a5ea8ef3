# SPDX-License-Identifier: Apache-2.0
"""Containers that are not in migrate.toml: what was found out about one counts as if it were
there.  Also the way back: what a container's configuration is as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import config
from pyploop.runtimes.config import ContainerConfig, HostConfig, within

_PLAIN = ContainerConfig("")


def with_container(host: HostConfig, name: str, keys: dict[str, Any]) -> HostConfig:
    """The configuration with one more [container.NAME].  keys: as in the file.
    MigrateError(1) when they cannot be its keys."""
    made = config.parse_container(name, keys, "what was found", host.policy)
    more = replace(
        host,
        containers={**host.containers, name: made},
        found={**host.found, name: keys},
    )
    config.check_foreign(more)
    return more


NETWORKS = "/run/netns"
"""Where `ip netns` has network namespaces."""


def accepted(
    host: HostConfig, name: str, told: Any, links: Callable[[str], dict[str, Any]]
) -> HostConfig:
    """The same on the target, with what a source has found that is trusted with memory.
    MigrateError(15) unless all that would be made here lies in [trust] places.  links: the
    commands for the container's link, of a network namespace of this host."""
    known = {"bundle", "netns", "external", "disk", "tree"}
    keys = {k: v for k, v in told.items() if k in known} if isinstance(told, dict) else {}
    netns = keys.get("netns")
    if isinstance(netns, str):
        if not within(netns, NETWORKS) and not within(netns, f"/var{NETWORKS}"):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the source has the network namespace {netns[:200]}, which is not in {NETWORKS}",
                hint="add a [container.NAME] with netns on this host",
            )
        keys |= links(netns)
    made = with_container(host, name, keys)
    for what, path in made.containers[name].paths():
        if not any(within(path, place) for place in host.trusted_places):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the {what} {path[:200]} of {name} lies in no folder of [trust] places in "
                f"{host.path or config.DEFAULT} on this host",
                path=host.path or config.DEFAULT,
                hint="add the folder above it there, or a [container.NAME] "
                "(`pyploop migrate --explain` on the source prints it)",
            )
    return made


def keys_of(c: ContainerConfig) -> dict[str, Any]:
    """The keys of [container.NAME], without those that have their defaults.  Not `commands` and
    `policy`."""
    names = (
        *("runtime", "bundle", "cgroup", "netns", "link_down", "link_up", "options"),
        *("criu_options", "stop_timeout", "external"),
    )
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(c, name)
        if value != getattr(_PLAIN, name):
            found[name] = list(value) if isinstance(value, tuple) else value
    disks = [
        {"image": d.image, "mount": d.mount, "fstype": d.fstype, "options": d.options}
        for d in c.disks
    ]
    if disks:
        found["disk"] = disks
    if c.trees:
        found["tree"] = [{"path": path} for path in c.trees]
    return found


def toml(name: str, keys: Mapping[str, Any]) -> list[str]:
    """The lines for migrate.toml."""
    title = name if name.replace("-", "").replace("_", "").isalnum() else json.dumps(name)
    lines, later = [f"[container.{title}]"], []
    for key, value in keys.items():
        if key in ("disk", "tree"):
            for one in value:
                later += ["", f"[[container.{title}.{key}]]"]
                later += [f"{k} = {json.dumps(v)}" for k, v in one.items()]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    return lines + later
