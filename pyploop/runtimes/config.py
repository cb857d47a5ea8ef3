# SPDX-License-Identifier: Apache-2.0
"""/etc/pyploop/migrate.toml: how containers look on this host (docs/reference/migrate-toml.md).

Each host has its own; nothing of it travels, so a peer can never name a path
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
    """One [container.NAME]; commands are words, never a shell's line."""

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
    external: tuple[str, ...] = ()
    """Paths of the host that are mounted in it, and are on the other host already."""
    commands: dict[str, tuple[str, ...]] = field(default_factory=dict)
    policy: Policy = policies.PLAIN

    def foreign(self) -> list[str]:
        """Folders in which everything comes from the container."""
        return [*(d.mount for d in self.disks), *self.trees]

    def paths(self) -> list[tuple[str, str]]:
        """(what it is, path) of all that is written here."""
        found = [("disk mounted on", d.mount) for d in self.disks]
        found += [("disk", d.image) for d in self.disks] + [("tree", t) for t in self.trees]
        return found + ([("bundle", self.bundle)] if self.bundle else [])


@dataclass(frozen=True)
class HostConfig:
    """All of it, with its defaults."""

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
    vz_etc: str = "/etc/vz"
    vzctl: str = "vzctl"
    vzlist: str = "vzlist"
    vzcptcheck: str = "vzcptcheck"
    ploop: str = "ploop"
    rsync: str = "rsync"
    containers: dict[str, ContainerConfig] = field(default_factory=dict)
    policy: Policy = policies.PLAIN
    """Of containers that are not in `containers`, too."""
    trusted_live: tuple[str, ...] = ()
    """Sources whose memory images are restored here."""

    def policy_of(self, name: str) -> Policy:
        known = self.containers.get(name)
        return known.policy if known else self.policy

    def container(self, name: str) -> ContainerConfig:
        """MigrateError(10) when this host knows no such container."""
        try:
            return self.containers[name]
        except KeyError:
            where = self.path or f"{DEFAULT}, which is not there"
            raise MigrateError(
                VzExitCode.NO_CONTAINER, f"no [container.{name}] in {where}"
            ) from None


_TOP = {
    "state_dir": str,
    "lock_dir": str,
    "images_dir": str,
    "migrations": int,
    "command_timeout": float,
}
_SECTIONS: dict[str, dict[str, tuple[str, type]]] = {
    "remote": {"ssh": ("ssh", tuple), "agent": ("agent", tuple)},
    "runc": {"command": ("runc", str), "root": ("runc_root", str), "criu": ("criu", str)},
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
"""Of vzctl.  str.isdecimal() takes the digits of any script, and one more zero
before a number is another file name for the same container."""


def load(path: str | None) -> HostConfig:
    """Read it; without `path` the usual one, or the defaults when that is not
    there.  MigrateError(1) names what is wrong in it, or who else could change
    it: what it says is run as root.

    What is in it is remembered by its absolute path: a later process, in another
    folder, undoes what it says."""
    file = path or DEFAULT
    try:
        real, text = private_folder.read_trusted(file)
    except OpenError as e:
        raise MigrateError(VzExitCode.USAGE, str(e)) from e
    except FileNotFoundError:
        if path is None:
            return HostConfig()
        raise MigrateError(VzExitCode.USAGE, f"--config {path}: no such file") from None
    except OSError as e:
        raise MigrateError(VzExitCode.USAGE, f"--config {file}: {e.strerror}") from e
    try:
        parsed = parse(tomllib.loads(text.decode()), real)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise MigrateError(VzExitCode.USAGE, f"{file} is not TOML: {e}") from None
    return replace(parsed, digest=hashlib.sha256(text).hexdigest())


def parse(table: dict[str, Any], path: str) -> HostConfig:
    """The parsed file; every key must be known and of its type."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key in _TOP:
            values[key] = _typed(value, _TOP[key], f"{path}: {key}")
        elif key in _SECTIONS:
            for name, v in _table(value, f"{path}: [{key}]").items():
                if name not in _SECTIONS[key]:
                    raise MigrateError(VzExitCode.USAGE, f"{path}: [{key}] has no {name!r}")
                field_name, kind = _SECTIONS[key][name]
                values[field_name] = _typed(v, kind, f"{path}: {key}.{name}")
        elif key == "trust":
            where = f"{path}: [trust]"
            values["trusted_live"] = policies.parse_trust(_table(value, where), where)
        elif key not in ("container", "policy"):
            raise MigrateError(VzExitCode.USAGE, f"{path}: unknown key {key!r}")
    where = f"{path}: [policy]"
    policy = policies.parse(_table(table.get("policy", {}), where), policies.PLAIN, where)
    containers = {
        name: _container(name, _table(t, f"{path}: [container.{name}]"), path, policy)
        for name, t in _table(table.get("container", {}), f"{path}: [container]").items()
    }
    made = HostConfig(path=path, containers=containers, policy=policy, **values)
    _check_foreign(made)
    return made


def _container(name: str, table: dict[str, Any], path: str, policy: Policy) -> ContainerConfig:
    where = f"{path}: [container.{name}]"
    if not NAME.fullmatch(name):
        raise MigrateError(VzExitCode.USAGE, f"{where}: not a name")
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
                    raise MigrateError(VzExitCode.USAGE, f"{where}.commands has no {word!r}")
                commands[word] = _typed(argv, tuple, f"{where}.commands.{word}")
        elif key == "policy":
            policy = policies.parse(_table(value, f"{where}.policy"), policy, f"{where}.policy")
        elif key in _CONTAINER:
            values[key] = _typed(value, _CONTAINER[key], f"{where}.{key}")
        else:
            raise MigrateError(VzExitCode.USAGE, f"{where} has no {key!r}")
    values["external"] = _paths(values.get("external", ()), f"{where}.external")
    made = ContainerConfig(
        name, disks=tuple(disks), trees=trees, commands=commands, policy=policy, **values
    )
    _check_apart(made, where)
    return made


def _paths(values: tuple[str, ...], where: str) -> tuple[str, ...]:
    if not all(v.startswith("/") for v in values):
        raise MigrateError(VzExitCode.USAGE, f"{where} must be absolute paths")
    return tuple(os.path.normpath(v).replace("//", "/") for v in values)


def _check_apart(c: ContainerConfig, where: str) -> None:
    """What is moved for itself lies in no tree, and no tree on a disk: it would
    be copied twice, or not at all.  Nor is a disk mounted within another one, which
    may come up after it, and hide it."""
    for number, disk in enumerate(c.disks):
        for other in c.disks[:number]:
            if within(disk.mount, other.mount) or within(other.mount, disk.mount):
                raise MigrateError(
                    VzExitCode.USAGE,
                    f"{where}: the disks mounted on {other.mount} and {disk.mount} overlap; "
                    "config.json can bind one within the other",
                )
            if os.path.normpath(disk.image) == os.path.normpath(other.image):
                raise MigrateError(VzExitCode.USAGE, f"{where}: {disk.image} is two disks")
    for tree in c.trees:
        for disk in c.disks:
            if within(disk.image, tree):
                raise MigrateError(
                    VzExitCode.USAGE, f"{where}: the disk {disk.image} lies in the tree {tree}"
                )
            if within(disk.mount, tree) or within(tree, disk.mount):
                raise MigrateError(
                    VzExitCode.USAGE,
                    f"{where}: the disk mounted on {disk.mount} and the tree {tree} overlap",
                )
        if c.bundle and within(c.bundle, tree):
            raise MigrateError(
                VzExitCode.USAGE, f"{where}: the bundle {c.bundle} lies in the tree {tree}"
            )


def _check_foreign(host: HostConfig) -> None:
    """Nothing of ours, and nothing of another container's, lies where one
    container's own files are: they decide what is at such a path."""
    ours = {"state_dir": host.state_dir, "lock_dir": host.lock_dir, "images_dir": host.images_dir}
    for c in host.containers.values():
        for folder in c.foreign():
            for key, path in ours.items():
                if within(path, folder):
                    raise MigrateError(
                        VzExitCode.USAGE,
                        f"{host.path}: {key} {path} lies in {folder}, whose contents come from "
                        f"the container {c.name}",
                    )
            for other in host.containers.values():
                for what, path in other.paths():
                    if other is c and path == folder and what in ("disk mounted on", "tree"):
                        continue  # itself
                    if within(path, folder) and not (other is not c and path == folder):
                        raise MigrateError(
                            VzExitCode.USAGE,
                            f"{host.path}: the {what} {path} of the container {other.name} lies "
                            f"in {folder}, whose contents come from the container {c.name}",
                        )
        if len({os.path.normpath(p) for p in c.foreign()}) < len(c.foreign()):
            raise MigrateError(
                VzExitCode.USAGE,
                f"{host.path}: two disks of [container.{c.name}] have the same mount point",
            )


def within(path: str, folder: str) -> bool:
    """A path below the folder, or the folder itself, as they are written."""
    path, folder = (os.path.normpath(p).replace("//", "/") for p in (path, folder))
    return f"{path}/".startswith(folder.rstrip("/") + "/")


def _disk(value: Any, where: str) -> DiskConfig:
    table = _table(value, f"{where}.disk")
    for key in table:
        if key not in _DISK:
            raise MigrateError(VzExitCode.USAGE, f"{where}.disk has no {key!r}")
    texts = {k: _typed(v, str, f"{where}.disk.{k}") for k, v in table.items()}
    for key in ("image", "mount"):
        if not str(texts.get(key, "")).startswith("/"):
            raise MigrateError(VzExitCode.USAGE, f"{where}.disk.{key} must be an absolute path")
    try:
        mount_options.parse(texts.get("options", ""))
    except ParameterError as e:
        raise MigrateError(VzExitCode.USAGE, f"{where}.disk.options: {e}") from e
    return DiskConfig(**texts)


def _trees(values: list[Any], where: str) -> tuple[str, ...]:
    """Paths, none inside another: what is not in one goes from there."""
    paths: list[str] = []
    for value in values:
        table = _table(value, f"{where}.tree")
        if list(table) != ["path"]:
            raise MigrateError(VzExitCode.USAGE, f"{where}.tree has a path, and nothing else")
        path = _typed(table["path"], str, f"{where}.tree.path")
        if not _TREE.fullmatch(path) or path.endswith("\\") or {".", ".."} & {*path.split("/")}:
            # rsync's daemon reads it from a file, where a % is a variable, and a
            # backslash at the end joins the next line to it; a ./ is a root of names.
            raise MigrateError(
                VzExitCode.USAGE,
                f"{where}.tree.path must be an absolute path below /, without . and .. in it, "
                "% and newlines, and a backslash or a slash at its end",
            )
        if any(within(path, p) or within(p, path) for p in paths):
            raise MigrateError(
                VzExitCode.USAGE, f"{where}.tree.path: {path} lies in another one, or holds it"
            )
        paths.append(path)
    return tuple(paths)


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MigrateError(VzExitCode.USAGE, f"{where} must be a table")
    return value


def _typed(value: Any, kind: type, where: str) -> Any:
    if kind is tuple:
        if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
            return tuple(value)
        raise MigrateError(VzExitCode.USAGE, f"{where} must be a list of words")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MigrateError(VzExitCode.USAGE, f"{where} must be a {kind.__name__}")
    return value
