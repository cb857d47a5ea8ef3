# SPDX-License-Identifier: Apache-2.0
"""A container that runc knows and migrate.toml does not: what migrate.toml would say.

    root, and binds of folders, on a file system of their own on a loop device   a disk
    the same elsewhere                                                           a tree
    binds of files, sockets and devices, read-only ones, and of the system's     external
    network namespace by path                                                    netns
    the other ends of the container's veth interfaces                            link_down, link_up

It says the same as a [container.NAME] with these keys (`table`), and is read as that is.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyploop.errors import MigrateError, SysfsError, VzExitCode
from pyploop.runtimes.config import within
from pyploop.runtimes.oci import bundles
from pyploop.runtimes.runc import contents
from pyploop.system import mount_table, network, sysblock

SYSTEM = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys"),
    *("/usr", "/var/run", "/var/lib/dpkg"),
)
"""Folders of the host itself.  What a container binds from there is not moved: it must be on the
target already."""
TOPS = {
    *("/", "/home", "/media", "/mnt", "/opt", "/root", "/srv", "/tmp", "/var", "/var/cache"),
    *("/var/lib", "/var/log", "/var/tmp"),
}
"""Folders that belong to no single container.  They themselves are not moved."""
_GETLINK, _IFLA_LINK = 18, 5  # RTM_GETLINK; IFLA_LINK
_LINK = network.LINK


def knows(runc_root: str, name: str) -> bool:
    """Whether runc has a container of this name."""
    return (Path(runc_root) / name / "state.json").exists()


def table(runc_root: str, name: str) -> dict[str, Any]:
    """The keys of [container.NAME].  MigrateError(10): runc does not say where its bundle is;
    (15): config.json cannot be read."""
    bundle = _bundle(runc_root, name)
    config = bundles.read(bundle)
    if (config.get("annotations") or {}).get("io.container.manager") == "libpod":
        # As one of runc's it would lose its image, and Podman would not know that it has gone.
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{name} is a container of Podman",
            hint=f"pyploop migrate HOST podman:NAME (podman ps --filter id={name[:12]} names it)",
        )
    found: dict[str, Any] = {"bundle": bundle}
    network_path = _network(config)
    if network_path:
        found |= {"netns": network_path, **link_commands(network_path)}
    group = (config.get("linux") or {}).get("cgroupsPath")
    if isinstance(group, str) and group:
        found["cgroup"] = group
    found |= _places(config, bundle)
    _check_alone(runc_root, name, [tree["path"] for tree in found.get("tree", ())])
    return found


def _check_alone(runc_root: str, name: str, trees: Sequence[str]) -> None:
    """MigrateError(15) when another container of runc's uses a tree, too: it would be removed
    here afterwards."""
    if use := first_use(trees, used(runc_root, {name})):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{use.folder} of {name} is used by the container {use.container}, too ({use.path}), "
            "and would be removed here after the migration",
            path=use.folder,
            hint=f"write [container.{name}] into migrate.toml, and the folder into its "
            "external, if the target has it already",
        )


class Use(NamedTuple):
    """One folder that another container uses."""

    folder: str
    container: str
    path: str
    """What that container uses: the folder, or one in it or above it."""


def first_use(folders: Iterable[str], others: Iterable[tuple[str, str]]) -> Use | None:
    """The first of the folders in which another container has a part.  others: (container, path
    that is bound into it); it is not asked without a folder."""
    real = {os.path.realpath(f): f for f in folders}
    if not real:
        return None
    for container, path in others:
        there = os.path.realpath(path)
        for folder, written in real.items():
            if _shares(there, folder):
                return Use(written, container, path)
    return None


def _shares(path: str, folder: str) -> bool:
    """Whether what is bound into a container has a part in the folder.  A container that has the
    whole host, to look after it, does not count.  Both paths without links."""
    return within(path, folder) or (within(folder, path) and path not in TOPS)


def used(runc_root: str, without: Collection[str]) -> Iterator[tuple[str, str]]:
    """(container, path): root and binds of each container that runc knows, without those of these
    names."""
    with contextlib.suppress(OSError):  # runc has never run here
        for other in sorted({p.name for p in Path(runc_root).iterdir()} - {*without}):
            try:
                config = json.loads((Path(runc_root) / other / "state.json").read_bytes())["config"]
                paths = [
                    config.get("rootfs"),
                    *(m.get("source") for m in config.get("mounts") or ()),
                ]
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                continue  # another folder, or gone
            yield from ((other, p) for p in paths if isinstance(p, str) and p.startswith("/"))


def link_commands(namespace: str) -> dict[str, list[str]]:
    """The keys for the link of a container with this network namespace; none when it has not
    exactly one."""
    links = _links(namespace)
    if len(links) != 1:
        return {}
    words = ["ip", "link", "set", links[0]]
    return {"link_down": [*words, "down"], "link_up": [*words, "up"]}


def _bundle(runc_root: str, name: str) -> str:
    path = Path(runc_root) / name / "state.json"
    try:
        labels = json.loads(path.read_bytes())["config"]["labels"]
        bundle = next(x.partition("=")[2] for x in labels if x.startswith("bundle="))
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as e:
        raise MigrateError(
            VzExitCode.NO_CONTAINER,
            f"{path} does not say where the bundle of {name} is ({e})",
            path=str(path),
            hint="write [container.NAME] with bundle into migrate.toml",
        ) from e
    return str(bundle)


def _network(config: Mapping[str, Any]) -> str:
    """The path of its network namespace; empty: runc makes one."""
    for namespace in (config.get("linux") or {}).get("namespaces") or ():
        if namespace.get("type") == "network":
            return str(namespace.get("path") or "")
    return ""


def _links(namespace: str) -> list[str]:
    """The names, on this host, of the other ends of the interfaces in the namespace."""
    found = []
    with contextlib.suppress(OSError), network.netlink(namespace, network.ROUTE) as asking:
        for body in network.dump(asking, _GETLINK, _LINK.pack(0, 0, 0, 0, 0)):
            own = _LINK.unpack_from(body)[2]
            for kind, value in network.attributes(body[_LINK.size :]):
                if kind == _IFLA_LINK and (peer := struct.unpack_from("=i", value)[0]) != own:
                    with contextlib.suppress(OSError):
                        found.append(socket.if_indextoname(peer))
    return found


def _places(config: Mapping[str, Any], bundle: str) -> dict[str, Any]:
    root = os.path.normpath(os.path.join(bundle, str((config.get("root") or {}).get("path"))))
    disks: list[dict[str, str]] = []
    trees: list[str] = []
    external: list[str] = []
    sources = {root: False}
    for mount in config.get("mounts") or ():
        if contents.is_bind(mount):
            path = os.path.normpath(os.path.join(bundle, str(mount.get("source"))))
            sources[path] = sources.get(path, True) and "ro" in (mount.get("options") or ())
    for path, read_only in sources.items():
        known = [*(d["mount"] for d in disks), *trees, *external]
        if any(within(path, one) for one in known):
            continue
        disk = _disk(path)
        if disk is not None:
            disks.append(disk)
        elif _movable(path) and not read_only:
            trees = [t for t in trees if not within(t, path)] + [path]
        else:
            external.append(path)
    found: dict[str, Any] = {}
    if external:
        found["external"] = external
    if disks:
        found["disk"] = disks
    if trees:
        found["tree"] = [{"path": path} for path in trees]
    return found


def _movable(path: str) -> bool:
    ours = path in TOPS or any(within(path, one) for one in SYSTEM)
    return os.path.isdir(path) and not ours


def _disk(path: str) -> dict[str, str] | None:
    """The disk on which a path lies.  None: it lies on the host's own file systems."""
    mounted = mount_table.holding(path)
    device = mounted.device() if mounted is not None else None
    if mounted is None or device is None:
        return None
    try:
        image = sysblock.backing_file(sysblock.find(device).disk)
    except SysfsError:
        return None
    return {"image": image, "mount": mounted.point, "fstype": mounted.fstype}
