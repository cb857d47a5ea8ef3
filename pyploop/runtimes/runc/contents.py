# SPDX-License-Identifier: Apache-2.0
"""Where a runc container's files lie: its root, and everything that is mounted in it.  Each
is copied, or is on the target already; the configuration says which.

Whatever is refused here would make the restore fail, or would give the container an empty
folder without an error.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.system import mount_table

PSEUDO = frozenset(
    [
        "proc",
        "sysfs",
        "tmpfs",
        "devpts",
        "mqueue",
        "cgroup",
        "cgroup2",
        "devtmpfs",
        "securityfs",
        "debugfs",
        "tracefs",
        "pstore",
        "fusectl",
        "binfmt_misc",
        "configfs",
    ]
)
"""File systems that runc makes anew on the target.  CRIU copies the contents of a tmpfs,
and refuses the others when they have something of the container."""
_DELETED = "//deleted"
MOST_LINKS = 40
"""Symbolic links on the way of one path: the kernel's limit."""


def is_bind(mount: Mapping[str, Any]) -> bool:
    """Whether runc takes an entry of config.json's mounts for a bind mount."""
    options = mount.get("options") or ()
    return mount.get("type") == "bind" or "bind" in options or "rbind" in options


def kind_of(path: str) -> list[int]:
    """What must be at the same path on the target: [type of file], for a device also its
    number.  OSError."""
    st = os.stat(path)
    kind = stat.S_IFMT(st.st_mode)
    return [kind, st.st_rdev] if stat.S_ISCHR(kind) or stat.S_ISBLK(kind) else [kind]


@dataclass(frozen=True)
class Place:
    """A folder that is migrated: a disk's mount point, or a tree."""

    path: str
    mount: mount_table.Entry | None
    """The mount on which it lies.  None: the disk of a stopped container is not mounted."""


class Places:
    """All folders of a container on this host that are migrated."""

    def __init__(self, disks: Sequence[str], trees: Sequence[str]) -> None:
        """disks: their mount points."""
        found = [Place(p, mount_table.at(p)) for p in disks]
        found += [Place(p, mount_table.holding(p)) for p in trees]
        self.places = sorted(found, key=lambda p: -len(p.path))

    def canonical(self, path: str) -> str | None:
        """The path without links, beginning as the configuration writes the place.  None: it
        is not migrated, or lies on something that is mounted in between."""
        real = os.path.realpath(path)
        for place in self.places:
            top = os.path.realpath(place.path)
            if mount_table.within(real, top):
                if place.mount is not None:
                    try:
                        if mount_table.number_of(real) != place.mount.number:
                            return None
                    except FileNotFoundError:
                        pass
                    except OSError:
                        return None
                return place.path + real[len(top) :]
        return None

    def holds(self, entry: mount_table.Entry) -> bool:
        """Whether a mount, of any mount namespace, shows a part of these places.  That may be
        a file without a name."""
        for place in self.places:
            if place.mount is None or place.mount.dev != entry.dev:
                continue
            top = mount_table.path_in(place.mount, os.path.realpath(place.path))
            # Everything on a disk is migrated, of the host's file system only the tree.
            if place.mount.point == os.path.realpath(place.path) or mount_table.within(
                entry.root, top
            ):
                return True
        return False


@dataclass(frozen=True)
class Sources:
    """What the paths of config.json are on the source."""

    paths: dict[str, str]
    """Path in config.json -> as the configuration of this host writes it."""
    kinds: list[list[int]]
    """`kind_of` each path of `external`, in order."""


def check_config(
    config: Mapping[str, Any], bundle: str, places: Places, external: Sequence[str]
) -> Sources:
    """MigrateError(15) when the root or the source of a mount is neither migrated nor
    external.  It says what to write into migrate.toml."""
    paths: dict[str, str] = {}
    written = (config.get("root") or {}).get("path")
    if not isinstance(written, str):
        raise MigrateError(VzExitCode.BAD_CONFIG, f"{bundle}/config.json has no root.path")
    root = os.path.join(bundle, written)
    found = places.canonical(root)
    if found is None:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"the container's root {root} lies on no disk and in no tree of the configuration, and "
            f'would not be migrated: add [[container.NAME.tree]] path = "{root}", or a disk',
            path=root,
        )
    paths[written] = found
    for mount in config.get("mounts") or ():
        where, kind = mount.get("destination"), mount.get("type")
        source = mount.get("source")
        if not is_bind(mount):
            if kind not in PSEUDO:
                raise MigrateError(
                    VzExitCode.BAD_CONFIG,
                    f"{where} of config.json is a {kind} of {source}, which is not migrated: add "
                    "a [[container.NAME.disk]] with its image, and bind the disk's mount point",
                )
            continue
        path = os.path.join(bundle, str(source))
        found = places.canonical(path)
        if found is not None:
            if places_mounted(places, found) and not os.path.exists(path):
                leads = (
                    f": it is a dead link to {os.readlink(path)}" if os.path.islink(path) else ""
                )
                raise MigrateError(
                    VzExitCode.BAD_CONFIG,
                    f"{path}, which config.json binds to {where}, does not exist{leads}",
                    path=path,
                )
            paths[str(source)] = found
        elif os.path.normpath(path) in external:
            paths[str(source)] = os.path.normpath(path)
        else:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{path}, which config.json binds to {where}, lies on no disk and in no tree of "
                "the configuration, and would not be migrated: add [[container.NAME.tree]] path = "
                f'"{path}" (a folder), or external = ["{path}"] when it is on the target already',
                path=path,
            )
    kinds = [_kind(path) for path in external]
    _check_devices(config, kinds)
    return Sources(paths, kinds)


def _check_devices(config: Mapping[str, Any], kinds: Sequence[Sequence[int]]) -> None:
    """MigrateError(15) when the container has a disk of this host, whose contents are not
    migrated."""
    for device in (config.get("linux") or {}).get("devices") or ():
        if device.get("type") != "b":
            continue
        major, minor = int(device.get("major") or 0), int(device.get("minor") or 0)
        if [stat.S_IFBLK, os.makedev(major, minor)] not in kinds:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{device.get('path')} in linux.devices of config.json is the block device "
                f"{major}:{minor} of this host, which is not migrated: bind the mount point of a "
                "[[container.NAME.disk]] instead, or add the device's path on this host to "
                "external, if the target has the same contents under that number",
            )


def places_mounted(places: Places, path: str) -> bool:
    """Whether the place of this path is mounted, so that its files are visible."""
    return any(mount_table.within(path, p.path) and p.mount is not None for p in places.places)


def _kind(path: str) -> list[int]:
    try:
        return kind_of(path)
    except OSError as e:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"cannot use the external path {path}: {_why_not(path, e)}",
            path=path,
        ) from e


def _why_not(path: str, error: OSError) -> str:
    """What ls shows is there for a reader, even if it leads nowhere."""
    if os.path.islink(path):
        return f"it is a dead link to {os.readlink(path)} ({error.strerror})"
    return str(error.strerror)


# ---- a container that runs


def check_root(pid: int, root: str) -> None:
    """MigrateError(15) unless `root` is the root of the process, or holds it: the process
    may have changed its root."""
    try:
        wanted = os.stat(root)
        fd = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"cannot examine the container's root {e.filename}: {e.strerror}",
            path=e.filename,
        ) from e
    try:
        while True:
            st = os.fstat(fd)
            if (st.st_dev, st.st_ino) == (wanted.st_dev, wanted.st_ino):
                return
            above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            up = os.fstat(above)
            os.close(fd)
            fd = above
            if (up.st_dev, up.st_ino) == (st.st_dev, st.st_ino):
                break
    finally:
        os.close(fd)
    raise MigrateError(
        VzExitCode.BAD_CONFIG,
        f"the root of the container (process {pid}) is not {root}, which config.json names: "
        "something is mounted there, or the container was started with another root; restart it",
        path=root,
    )


def check_all_mounted(
    pids: Sequence[int],
    config: Mapping[str, Any],
    bundle: str,
    places: Places,
    external: Sequence[str],
) -> None:
    """Do `check_mounted` for each mount namespace of these processes."""
    outside = Places((), external)
    host = frozenset(e.dev for e in mount_table.read() if e.fstype == "tmpfs")
    seen = set()
    for pid in pids:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            table = mount_table.read(Path(f"/proc/{pid}/mountinfo"))
        except OSError:  # the process has ended
            continue
        seen.add(namespace)
        check_mounted(table, as_seen(config, bundle, f"/proc/{pid}/root"), places, outside, host)


def as_seen(config: Mapping[str, Any], bundle: str, root: str) -> dict[str, Any]:
    """The configuration, with the destinations of binds as a mount table shows them, and
    their sources as absolute paths."""

    def seen(mount: Mapping[str, Any]) -> Mapping[str, Any]:
        source = os.path.join(bundle, str(mount.get("source")))
        point = without_links(root, str(mount.get("destination")))
        return {**mount, "source": source, "destination": point}

    found = [seen(m) if is_bind(m) else m for m in config.get("mounts") or ()]
    return {**config, "mounts": found}


def without_links(root: str, path: str) -> str:
    """Where a path within a root leads: the path by which the processes know that place."""
    at, words, links = "", path.split("/")[::-1], 0
    while words:
        word = words.pop()
        if word == "..":
            at = at.rpartition("/")[0]
        elif word not in ("", "."):
            try:
                link = os.readlink(f"{root}{at}/{word}")
            except OSError:  # no link
                at = f"{at}/{word}"
                continue
            links += 1
            if links > MOST_LINKS:
                break
            at = "" if link.startswith("/") else at
            words += link.split("/")[::-1]
    return at or "/"


def check_mounted(
    table: Sequence[mount_table.Entry],
    config: Mapping[str, Any],
    places: Places,
    outside: Places,
    host: frozenset[tuple[int, int]] = frozenset(),
) -> None:
    """MigrateError(15) when something is mounted in the container that is not migrated.

    table: as its processes see it.  config: as `as_seen` returns it.  outside: the
    external paths.  host: devices of the host's tmpfs.
    """
    binds = [
        os.path.normpath(str(m.get("destination")))
        for m in config.get("mounts") or ()
        if is_bind(m)
    ]
    for mount in config.get("mounts") or ():
        if is_bind(mount):
            _check_same(table, os.path.normpath(str(mount.get("destination"))), mount, places)
    for entry in table:
        deleted = entry.root.endswith(_DELETED)
        if (entry.fstype in PSEUDO and entry.dev not in host) or (
            places.holds(entry) and not deleted
        ):
            continue
        if any(mount_table.within(entry.point, p) and outside.holds(entry) for p in binds):
            continue
        why = "the bound file or folder was replaced" if deleted else "it is not migrated"
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{entry.source} ({entry.fstype}, {entry.root}) is mounted on {entry.point} in the "
            f"container: {why}; unmount it there, or restart the container",
            path=entry.point,
        )


def _check_same(
    table: Sequence[mount_table.Entry], point: str, mount: Mapping[str, Any], places: Places
) -> None:
    """MigrateError(15) when the path that config.json binds leads to something else now."""
    source = os.path.realpath(str(mount["source"]))
    there = [e for e in table if e.point == point]
    lies = mount_table.holding(source)
    if lies is None or not there or not any(places.holds(e) for e in there):
        return
    now = mount_table.path_in(lies, source)
    if not any((e.dev, e.root) == (lies.dev, now) for e in there):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{there[-1].root} is mounted on {point} in the container, but {source} of config.json "
            f"leads to {now} now: restart the container",
            path=source,
        )


# ---- on the target


def check_external(external: Sequence[str], kinds: Sequence[Sequence[int]]) -> None:
    """MigrateError(15) when an external path does not exist on this host, or is something
    else than at the source.  kinds: of the same paths at the source."""
    for path, theirs in zip(external, kinds, strict=False):
        try:
            ours = kind_of(path)
        except OSError as e:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"cannot use the external path {path} on this host: {_why_not(path, e)}",
                path=path,
            ) from e
        if ours != list(theirs):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the external path {path} is {_name(ours)} on this host, but {_name(theirs)} on "
                "the source",
                path=path,
            )


_NAMES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a pipe",
}


def _name(kind: Sequence[int]) -> str:
    if len(kind) > 1:
        return f"the device {os.major(kind[1])}:{os.minor(kind[1])}"
    return _NAMES.get(kind[0], "something else")
