# SPDX-License-Identifier: Apache-2.0
"""/etc/pyploop/migrate.toml: how containers look on this host (docs/reference/migrate-toml.md).

Each host has its own file, and nothing of it is sent.  So a peer can never name a path
or a command that is not written here.
"""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from dataclasses import dataclass, field, replace
from typing import Any

from pyploop.errors import MigrateError, OpenError, ParameterError, VzExitCode
from pyploop.runtimes import policy as policies
from pyploop.runtimes.lazy_policy import WANTED, Wanted
from pyploop.runtimes.policy import Policy
from pyploop.system import mount_options, private_folder

DEFAULT = "/etc/pyploop/migrate.toml"


@dataclass(frozen=True)
class DiskConfig:
    """A disk of a container: its image file, and where and how it is mounted."""

    image: str
    mount: str
    fstype: str = "ext4"
    options: str = "rw"


@dataclass(frozen=True)
class ContainerConfig:
    """One [container.NAME].  A command is a list of words; no shell reads it."""

    name: str
    runtime: str = "runc"
    bundle: str = ""
    cgroup: str = ""
    netns: str = ""
    link_up: tuple[str, ...] = ()
    link_down: tuple[str, ...] = ()
    options: tuple[str, ...] = ("--tcp-established", "--file-locks")
    stop_timeout: float = 30.0
    disks: tuple[DiskConfig, ...] = ()
    trees: tuple[str, ...] = ()
    """Directories that are moved as they are."""
    criu_options: tuple[str, ...] = ()
    """Lines for CRIU's own configuration."""
    external: tuple[str, ...] = ()
    """Paths of the host that the container mounts.  They are not copied: the other host has
    them already."""
    commands: dict[str, tuple[str, ...]] = field(default_factory=dict)
    policy: Policy = policies.PLAIN

    def foreign(self) -> list[str]:
        """Folders whose contents the container decides."""
        return [*(d.mount for d in self.disks), *self.trees]

    def paths(self) -> list[tuple[str, str]]:
        """(what it is, path) of each path of this container in the file."""
        found = [("disk mounted on", d.mount) for d in self.disks]
        found += [("disk", d.image) for d in self.disks] + [("tree", t) for t in self.trees]
        return found + ([("bundle", self.bundle)] if self.bundle else [])


@dataclass(frozen=True)
class HostConfig:
    """The whole file, with defaults for what it leaves out."""

    path: str | None = None
    digest: str = ""
    """SHA-256 of the file."""
    state_dir: str = "/var/lib/pyploop/migrate"
    lock_dir: str = "/run/pyploop/lock"
    images_dir: str = "/dev/shm"
    migrations: int = 2
    ssh: tuple[str, ...] = ("ssh",)
    agent: tuple[str, ...] = ("pyploop", "agent")
    command_timeout: float = 120.0
    runc: str = "runc"
    runc_root: str = "/run/runc"
    criu: str = "criu"
    podman: str = "podman"
    podman_binds: tuple[str, ...] = ()
    """Folders below which the bind mounts of Podman's containers move."""
    podman_external: tuple[str, ...] = ()
    """Paths that Podman's containers bind, and that both hosts have."""
    vz_etc: str = "/etc/vz"
    vzctl: str = "vzctl"
    vzlist: str = "vzlist"
    vzcptcheck: str = "vzcptcheck"
    ploop: str = "ploop"
    rsync: str = "rsync"
    lazy_restore: Wanted = "auto"
    """Whether memory that comes to this host is loaded lazily; auto: as the source asks."""
    containers: dict[str, ContainerConfig] = field(default_factory=dict)
    policy: Policy = policies.PLAIN
    """It also counts for containers that are not in `containers`."""
    trusted_live: tuple[str, ...] = ()
    """Sources whose memory images are restored here."""
    trusted_places: tuple[str, ...] = ()
    """Folders in which such a source may place containers that are not in `containers`."""
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Keys of containers that are not in the file (found_config.py)."""

    def policy_of(self, name: str) -> Policy:
        known = self.containers.get(name)
        return known.policy if known else self.policy

    def container(self, name: str) -> ContainerConfig:
        """MigrateError(10) when this host knows no such container."""
        try:
            return self.containers[name]
        except KeyError:
            why = f"{self.path} has no [container.{name}]" if self.path else f"no {DEFAULT}"
            raise MigrateError(
                VzExitCode.NO_CONTAINER,
                f"the container {name} is not configured on this host: {why}",
                path=self.path or DEFAULT,
                hint="`pyploop migrate --explain HOST CT` on the host that runs it prints what to "
                "write there. Or, for runc on a target, let the source choose a place: pyploop "
                "trust SOURCE --places FOLDER",
            ) from None


_TOP = {
    "state_dir": str,
    "lock_dir": str,
    "images_dir": str,
    "migrations": int,
    "command_timeout": float,
    "lazy_restore": str,
}
_SECTIONS: dict[str, dict[str, tuple[str, type]]] = {
    "remote": {"ssh": ("ssh", tuple), "agent": ("agent", tuple)},
    "runc": {"command": ("runc", str), "root": ("runc_root", str), "criu": ("criu", str)},
    "podman": {
        "command": ("podman", str),
        "binds": ("podman_binds", tuple),
        "external": ("podman_external", tuple),
    },
    "rsync": {"command": ("rsync", str)},
    "vzctl": {
        "etc": ("vz_etc", str),
        "command": ("vzctl", str),
        "vzlist": ("vzlist", str),
        "vzcptcheck": ("vzcptcheck", str),
        "ploop": ("ploop", str),
    },
}
_CONTAINER: dict[str, type] = {
    "runtime": str,
    "bundle": str,
    "cgroup": str,
    "netns": str,
    "link_up": tuple,
    "link_down": tuple,
    "options": tuple,
    "stop_timeout": float,
    "external": tuple,
    "criu_options": tuple,
}
_DISK: dict[str, type] = {"image": str, "mount": str, "fstype": str, "options": str}
COMMANDS = (
    "status",
    "suspend",
    "resume",
    "pre_dump",
    "dump",
    "undump",
    "resume_restored",
    "kill",
    "abandon",
    "start",
    "stop",
)
_TREE = re.compile(r"(/[^/%\x00-\x1f]*[^/%\x00-\x20])+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
CTID = re.compile(r"[1-9][0-9]{0,9}")
"""A number of vzctl's.  str.isdecimal() takes the digits of any script, and a zero in
front would make another file name for the same container."""


def load(path: str | None) -> HostConfig:
    """Read the configuration.  Without `path`: the usual file, or the defaults when there
    is none.  MigrateError(1) names what is wrong in it, or which other user could
    change it: its commands are run as root.

    `HostConfig.path` is absolute: a later process, in another working folder, reads
    the same file to undo a migration."""
    file = path or DEFAULT
    try:
        real, text = private_folder.read_trusted(file)
    except OpenError as e:
        raise MigrateError(VzExitCode.USAGE, str(e), path=file) from e
    except FileNotFoundError:
        if path is None:
            return HostConfig()
        raise MigrateError(VzExitCode.USAGE, f"--config {path}: no such file", path=path) from None
    except OSError as e:
        raise MigrateError(
            VzExitCode.USAGE, f"cannot read the configuration {file}: {e.strerror}", path=file
        ) from e
    try:
        parsed = parse(tomllib.loads(text.decode()), real)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise MigrateError(VzExitCode.USAGE, f"{file} is not valid TOML: {e}", path=file) from None
    except MigrateError as e:
        e.path = real
        raise
    return replace(parsed, digest=hashlib.sha256(text).hexdigest())


def parse(table: dict[str, Any], path: str) -> HostConfig:
    """The parsed file.  Every key must be known, and its value of the right type.

    path: for the messages."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key in _TOP:
            values[key] = _typed(value, _TOP[key], f"{path}: {key}")
        elif key in _SECTIONS:
            for name, v in _table(value, f"{path}: [{key}]").items():
                if name not in _SECTIONS[key]:
                    raise _bad(f"{path}: unknown key {name!r} in [{key}]")
                field_name, kind = _SECTIONS[key][name]
                values[field_name] = _typed(v, kind, f"{path}: {key}.{name}")
        elif key == "trust":
            where = f"{path}: [trust]"
            trust = dict(_table(value, where))
            if "places" in trust:
                places = _typed(trust.pop("places"), tuple, f"{where} places")
                values["trusted_places"] = _paths(places, f"{where} places")
            values["trusted_live"] = policies.parse_trust(trust, where)
        elif key not in ("container", "policy"):
            raise _bad(f"{path}: unknown key {key!r}")
    if values.get("lazy_restore", HostConfig.lazy_restore) not in WANTED:
        raise _bad(f"{path}: lazy_restore is {', '.join(WANTED)}")
    where = f"{path}: [policy]"
    policy = policies.parse(_table(table.get("policy", {}), where), policies.PLAIN, where)
    containers = {
        name: parse_container(name, _table(t, f"{path}: [container.{name}]"), path, policy)
        for name, t in _table(table.get("container", {}), f"{path}: [container]").items()
    }
    made = HostConfig(path=path, containers=containers, policy=policy, **values)
    check_foreign(made)
    return made


def parse_container(name: str, table: dict[str, Any], path: str, policy: Policy) -> ContainerConfig:
    """One [container.NAME].  path: for the messages."""
    where = f"{path}: [container.{name}]"
    if not NAME.fullmatch(name):
        raise _bad(
            f"{where}: a container's name has at most 64 letters, digits, '.', '_' and '-', "
            "and begins with a letter or a digit"
        )
    values: dict[str, Any] = {}
    disks: list[DiskConfig] = []
    trees: tuple[str, ...] = ()
    commands: dict[str, tuple[str, ...]] = {}
    for key, value in table.items():
        if key == "disk":
            disks = [_disk(d, where) for d in (value if isinstance(value, list) else [value])]
        elif key == "tree":
            trees = _trees(value if isinstance(value, list) else [value], where)
        elif key == "commands":
            for word, argv in _table(value, f"{where}.commands").items():
                if word not in COMMANDS:
                    raise _bad(
                        f"{where}.commands: unknown command {word!r}; these are known: "
                        + ", ".join(COMMANDS),
                    )
                commands[word] = _typed(argv, tuple, f"{where}.commands.{word}")
        elif key == "policy":
            policy = policies.parse(_table(value, f"{where}.policy"), policy, f"{where}.policy")
        elif key in _CONTAINER:
            values[key] = _typed(value, _CONTAINER[key], f"{where}.{key}")
        else:
            raise _bad(f"{where}: unknown key {key!r}")
    values["external"] = _paths(values.get("external", ()), f"{where}.external")
    made = ContainerConfig(
        name, disks=tuple(disks), trees=trees, commands=commands, policy=policy, **values
    )
    _check_apart(made, where)
    return made


def _paths(values: tuple[str, ...], where: str) -> tuple[str, ...]:
    if not all(v.startswith("/") for v in values):
        raise _bad(f"{where} must be a list of absolute paths")
    return tuple(os.path.normpath(v).replace("//", "/") for v in values)


def _check_apart(c: ContainerConfig, where: str) -> None:
    """A disk's image, its mount point and the bundle lie in no tree, and no tree lies on a
    disk: it would be copied twice, or not at all.  No disk is mounted inside another:
    that one could be mounted later, and hide it."""
    for number, disk in enumerate(c.disks):
        for other in c.disks[:number]:
            if within(disk.mount, other.mount) or within(other.mount, disk.mount):
                raise _bad(
                    f"{where}: the disks mounted on {other.mount} and {disk.mount} overlap: mount "
                    "them side by side, and let config.json bind one into the other"
                )
            if os.path.normpath(disk.image) == os.path.normpath(other.image):
                raise _bad(f"{where}: two disks have the same image, {disk.image}")
    for tree in c.trees:
        for disk in c.disks:
            if within(disk.image, tree):
                raise _bad(
                    f"{where}: the disk {disk.image} lies in the tree {tree}, and would be copied "
                    "twice: move it out of the tree"
                )
            if within(disk.mount, tree) or within(tree, disk.mount):
                raise _bad(
                    f"{where}: the disk mounted on {disk.mount} and the tree {tree} overlap: use "
                    "separate folders"
                )
        if c.bundle and within(c.bundle, tree):
            raise _bad(
                f"{where}: the bundle {c.bundle} lies in the tree {tree}, and would be copied with "
                "it: move it out of the tree"
            )


def check_foreign(host: HostConfig) -> None:
    """MigrateError(1) unless no folder of pyploop, and nothing of another container, lies among
    the files of a container: that container decides what is at such a path."""
    ours = {"state_dir": host.state_dir, "lock_dir": host.lock_dir, "images_dir": host.images_dir}
    for c in host.containers.values():
        for folder in c.foreign():
            for key, path in ours.items():
                if within(path, folder):
                    raise _bad(
                        f"{host.path}: {key} is {path}, inside {folder}, where the container "
                        f"{c.name} decides what is there: choose another folder"
                    )
            for other in host.containers.values():
                for what, path in other.paths():
                    if other is c and path == folder and what in ("disk mounted on", "tree"):
                        continue  # itself
                    if within(path, folder) and not (other is not c and path == folder):
                        raise _bad(
                            f"{host.path}: the {what} {path} of the container {other.name} lies "
                            f"in {folder}, where the container {c.name} decides what is there: "
                            "choose another folder"
                        )
        if len({os.path.normpath(p) for p in c.foreign()}) < len(c.foreign()):
            raise _bad(f"{host.path}: two disks of [container.{c.name}] have the same mount point")


def within(path: str, folder: str) -> bool:
    """Whether the path is the folder, or lies below it.  Only the texts are compared."""
    path, folder = (os.path.normpath(p).replace("//", "/") for p in (path, folder))
    return f"{path}/".startswith(folder.rstrip("/") + "/")


def _disk(value: Any, where: str) -> DiskConfig:
    table = _table(value, f"{where}.disk")
    for key in table:
        if key not in _DISK:
            raise _bad(f"{where}.disk: unknown key {key!r}")
    texts = {k: _typed(v, str, f"{where}.disk.{k}") for k, v in table.items()}
    for key in ("image", "mount"):
        if not str(texts.get(key, "")).startswith("/"):
            raise _bad(f"{where}.disk.{key} must be an absolute path")
    try:
        mount_options.parse(texts.get("options", ""))
    except ParameterError as e:
        raise _bad(f"{where}.disk.options: {e}") from e
    return DiskConfig(**texts)


def _trees(values: list[Any], where: str) -> tuple[str, ...]:
    """Paths, none inside another: what a tree does not have is deleted at its target."""
    paths: list[str] = []
    for value in values:
        table = _table(value, f"{where}.tree")
        if list(table) != ["path"]:
            raise _bad(f"{where}.tree must have the key path, and no other")
        path = _typed(table["path"], str, f"{where}.tree.path")
        if not _TREE.fullmatch(path) or path.endswith("\\") or {".", ".."} & {*path.split("/")}:
            # rsync's daemon reads it from a file.  There a % begins a variable, and a
            # backslash at the end joins the next line.  rsync takes names after a ./ as
            # relative to that place.
            raise _bad(
                f"{where}.tree.path cannot be {path!r}: it must be an absolute path below /, "
                "without . or .. as a part, without % and newlines, and without a backslash, a "
                "slash or a space at its end"
            )
        if near := [p for p in paths if within(path, p) or within(p, path)]:
            raise _bad(f"{where}.tree.path: {near[0]} and {path} overlap: name only the upper one")
        paths.append(path)
    return tuple(paths)


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{where} must be a table")
    return value


def _typed(value: Any, kind: type, where: str) -> Any:
    if kind is tuple:
        if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
            return tuple(value)
        raise _bad(f"{where} must be a list of non-empty strings, at least one")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _bad(f"{where} must be {_KINDS[kind]}")
    return value


_KINDS = {str: "a string", int: "a whole number", float: "a number"}


def _bad(text: str) -> MigrateError:
    return MigrateError(VzExitCode.USAGE, text)
