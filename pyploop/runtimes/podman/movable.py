# SPDX-License-Identifier: Apache-2.0
"""Whether a container of Podman can be migrated, as far as its own host can tell, and which
paths of its host it uses.  Each refusal says what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.checks import Checks
from pyploop.runtimes.config import ContainerConfig, within
from pyploop.runtimes.podman.command import Podman
from pyploop.runtimes.podman.found import Found
from pyploop.runtimes.podman.host import PodmanHost
from pyploop.runtimes.runc import contents


def refuse(text: str, hint: str = "") -> NoReturn:
    raise MigrateError(VzExitCode.BAD_CONFIG, text, hint=hint or None)


def check(podman: Podman, found: Found, here: PodmanHost, checks: Checks) -> None:
    """Each that fails is added to `checks`."""
    raw, name = found.raw, found.name
    host = raw.get("HostConfig") or {}
    with checks.named("podman-pod"):
        if (pod := raw.get("Pod")) and not found.together:
            known = podman.inspected("pod", str(pod)) or {}
            refuse(
                f"{name} belongs to the pod {known.get('Name') or str(pod)[:12]}, whose containers "
                "share namespaces and move together",
                f"migrate the pod: pyploop migrate HOST podman:{known.get('Name') or 'POD'}",
            )
    with checks.named("podman-runtime"):
        if raw.get("OCIRuntime") != "runc":
            refuse(
                f"{name} is run by {raw.get('OCIRuntime')}, which cannot be migrated",
                "create it again with podman --runtime runc",
            )
    with checks.named("podman-root"):
        _check_root(found, here)
    with checks.named("podman-dependencies"):
        deps = [d for d in raw.get("Dependencies") or () if d != found.infra]
        if deps and (found.infra or not raw.get("Pod")):
            refuse(
                f"{name} depends on other containers ({', '.join(d[:12] for d in deps)})",
                "run it without --network, --pid or --ipc container:, and without --requires",
            )
    with checks.named("podman-privileged"):
        if host.get("Privileged"):
            refuse(
                f"{name} is privileged, and has the devices of this host",
                "run it without --privileged",
            )
    with checks.named("network-namespace"):
        if host.get("NetworkMode") == "host":
            refuse(
                f"{name} uses the network of this host, and cannot be migrated",
                "run it without --network host",
            )
    with checks.named("podman-users"):
        if host.get("UsernsMode") or raw.get("IDMappings") or host.get("IDMappings"):
            refuse(
                f"{name} has a user namespace, which cannot be migrated yet",
                "run it without --userns, --uidmap, --gidmap and --subuidname",
            )
    with checks.named("podman-systemd"):
        if unit := ((raw.get("Config") or {}).get("Labels") or {}).get("PODMAN_SYSTEMD_UNIT"):
            refuse(
                f"{name} is run by the systemd unit {unit}, which would make it again on this host",
                "create the container without the unit",
            )
    for volume in found.volumes:
        with checks.named("podman-volume"):
            _check_volume(podman, volume.name, found)


def check_removal(found: Found, *, live: bool, stays: bool) -> None:
    """MigrateError(15) when Podman would remove the container (--rm) before that is wanted: its
    processes end before the last pass unless the migration is live, and in any case at its end.
    stays: it is to be kept here."""
    if not (found.raw.get("HostConfig") or {}).get("AutoRemove"):
        return
    if found.raw.get("Pod"):
        refuse(
            f"{found.name} removes itself (--rm), and belongs to a pod",
            "run the containers of the pod without --rm",
        )
    if live and not stays:
        return
    refuse(
        f"{found.name} is removed by Podman when its processes end here (--rm)"
        + (", and could not stay" if live else ", before all of it has moved"),
        "migrate it with --live and -r yes, or run it without --rm",
    )


def _check_root(found: Found, here: PodmanHost) -> None:
    if not found.upper:
        refuse(
            f"{found.name} has no root of its own that Podman stores",
            "run it from an image, without --rootfs",
        )
    if not within(found.upper, here.graph_root):
        refuse(
            f"{found.upper} lies outside of Podman's storage {here.graph_root}",
            "migrate with the storage in which the container was made (storage.conf)",
        )


def _check_volume(podman: Podman, name: str, found: Found) -> None:
    volume = podman.inspected("volume", name)
    if volume is None:
        refuse(
            f"the volume {name} of {found.name} does not exist any more",
            "create the container again",
        )
    if volume.get("Driver") != "local" or volume.get("Options"):
        refuse(
            f"the volume {name} is not a plain folder of this host (driver {volume.get('Driver')}, "
            f"options {volume.get('Options') or 'none'}), and cannot be migrated",
            "give the container a volume of the driver local without options",
        )
    path = str(volume.get("Mountpoint") or "")
    if os.path.ismount(path):
        refuse(
            f"something is mounted on {path}, the folder of the volume {name}, and Podman could "
            "not remove the volume here after the migration",
            f"stop the container, unmount {path}, and copy the files into the volume; or bind a "
            "folder of that file system (podman run --volume FOLDER:..., [podman] binds)",
        )
    users = podman.run("ps", "-a", "--no-trunc", f"--filter=volume={name}", "--format={{.ID}}")
    if others := [u for u in users.split() if u not in (found.id, *found.together)]:
        refuse(
            f"the volume {name} is used by the container {others[0][:12]} too, which would lose it",
            "give each container a volume of its own",
        )


def check_namespaces(config: Mapping[str, Any], name: str) -> None:
    """MigrateError(15) when one that each container must have is the host's."""
    found = {n.get("type") for n in (config.get("linux") or {}).get("namespaces") or ()}
    if shared := [f"--{kind} host" for kind in ("pid", "ipc", "uts") if kind not in found]:
        words = ", ".join(shared)
        refuse(
            f"{name} shares namespaces with this host ({words}), and cannot leave them",
            f"run it without {words}",
        )


def check_mounts(config: Mapping[str, Any], name: str) -> None:
    """MigrateError(15) for a mount whose files lie in a folder that only Podman knows."""
    for mount in config.get("mounts") or ():
        if mount.get("type") == "overlay":
            refuse(
                f"an overlay is mounted on {mount.get('destination')} in {name} (a volume with :O, "
                "or an image), and would not be migrated",
                "run it with a plain volume there",
            )


def check_exported(config: Mapping[str, Any], found: Found) -> None:
    """The description is that of this container, and of one that can move."""
    if config.get("id") != found.id or config.get("name") != found.name:
        refuse(f"podman exported another container than {found.name}")
    if (config.get("pod") and not found.together) or config.get("Dependencies"):
        refuse(f"{found.name} depends on other containers")


# ---- paths of the host


def owned(config: Mapping[str, Any], found: Found, here: PodmanHost) -> list[str]:
    """Sources of binds that Podman makes itself, on each host its own: /etc/hosts, /dev/shm, …"""
    tops: tuple[str, ...] = (
        found.bundle,
        *here.folders_of(found.id),
        "/run/podman-init",
        *found.elsewhere,
    )
    if found.infra:
        tops += here.folders_of(found.infra)
    return [s for s in _bound(config) if any(within(s, top) for top in tops)]


def _bound(config: Mapping[str, Any]) -> list[str]:
    mounts = config.get("mounts") or ()
    return [os.path.normpath(str(m.get("source"))) for m in mounts if contents.is_bind(m)]


_HELPERS = ("catatonit",)
"""Programs of the host that Podman binds into a container (--init)."""


def external(
    config: Mapping[str, Any],
    found: Found,
    here: PodmanHost,
    ours: ContainerConfig,
    allowed: Sequence[str],
) -> tuple[list[str], list[str]]:
    """(paths that the target must have, because they are bound and are not moved; paths of which
    nobody has said what becomes of them).  allowed: those that [podman] external names."""
    known = [*owned(config, found, here), *ours.trees]
    named, other = [], []
    for source in _bound(config):
        if any(within(source, place) for place in known):
            continue
        if source in (os.path.normpath(a) for a in allowed) or (
            os.path.basename(source) in _HELPERS
        ):
            named.append(source)
        else:
            other.append(source)
    return named, other


def check_bind(source: str, name: str) -> NoReturn:
    above = os.path.dirname(source)
    ready = f'write external = ["{source}"] into [podman] of migrate.toml on both hosts'
    if within(source, "/sys/fs/cgroup"):
        cure = "run it with --systemd=false"
    elif not os.path.isdir(source) or above == "/" or source.startswith(("/dev/", "/sys/")):
        cure = f"if the target has it already, {ready}; else bind a folder below another one"
    else:
        cure = (
            f'write binds = ["{above}"] into [podman] of migrate.toml on both hosts, if it is to '
            f"move; if the target has it already, {ready}"
        )
    refuse(f"{source} of this host is bound into {name}, and would not be migrated", cure)
