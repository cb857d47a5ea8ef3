# SPDX-License-Identifier: Apache-2.0
"""A config.json of another host, fitted to this host as its policy allows.

Invariant: what `fit` returns has only known keys (spec.py).  Each path, device, namespace
and label in it belongs to this host or lies within the disks and trees that are migrated.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

from pyploop.runtimes.config import ContainerConfig, within
from pyploop.runtimes.oci import json_shapes, spec
from pyploop.runtimes.oci.json_shapes import refuse

MASKED = (
    *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware"),
    "/proc/scsi",
)
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
"""MASKED and READONLY are as `runc spec` 1.1 writes them.  Without a user namespace the
container's root is root of the host.  It can write to /proc/sys whatever its
capabilities are, and core_pattern there is a command."""
DEVICES = {
    (1, 3): "/dev/null",
    (1, 5): "/dev/zero",
    (1, 7): "/dev/full",
    (1, 8): "/dev/random",
    (1, 9): "/dev/urandom",
    (5, 0): "/dev/tty",
}
"""runc makes these in each container."""
RULES = {*DEVICES, (5, 1), (5, 2), (136, -1), (10, 200)}
"""Major and minor number (-1: all) of the devices that runc 1.1 allows by itself: besides
DEVICES consoles, pseudo terminals and tun."""
_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
_POINTS = {
    "proc": "/proc",
    "sysfs": "/sys",
    "devpts": "/dev/pts",
    "mqueue": "/dev/mqueue",
    "cgroup": "/sys/fs/cgroup",
    "cgroup2": "/sys/fs/cgroup",
}
"""Where a file system of the kernel may be mounted.  Masked and read-only paths would not
protect a second mount of it."""
_FLAGS = {
    *("ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "relatime", "norelatime"),
    *("noatime", "atime", "nodiratime", "diratime", "strictatime", "nostrictatime"),
    *("private", "rprivate", "slave", "rslave", "defaults", "sync", "async", "dirsync"),
}
_VALUES = re.compile(r"(mode|ptmxmode|uid|gid)=[0-9]{1,10}|(size|nr_inodes)=[0-9]{1,16}[kKmMgG%]?")
_MORE = {
    "tmpfs": {"tmpcopyup", "notmpcopyup"},
    "devpts": {"newinstance"},
    "bind": {"bind", "rbind", "nocopy"},  # the last one is Podman's own
}
_SYSCTL = re.compile(r"[a-z0-9_-]+(\.[A-Za-z0-9_-]+)+")
_UNIFIED = re.compile(r"(cpu|cpuset|memory|pids)\.[a-z_.]{1,40}")
_STRICT = ("SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD")


def fit(
    config: Any,
    paths: dict[str, str],
    mounts: dict[str, str],
    ours: ContainerConfig,
    criu_config: str,
) -> dict[str, Any]:
    """The configuration as this host accepts it.

    paths: path in config.json -> as the source's migrate.toml writes it.  mounts: how
    those paths begin at the source -> here.  Both come from the source, so the results
    must lie within this host's disks and trees, or be external.  criu_config: the file
    that the annotation for CRIU names.  MigrateError(15) says what is not accepted, and
    which key of migrate.toml would allow it."""
    made = spec.anew(config)
    return _Fitting(made, paths, mounts, ours).all(criu_config)


class _Fitting:
    def __init__(
        self,
        made: dict[str, Any],
        paths: dict[str, str],
        mounts: dict[str, str],
        ours: ContainerConfig,
    ) -> None:
        self._made, self._paths, self._ours = made, paths, ours
        # The longest first: one may lie within another.
        self._mounts = sorted(mounts.items(), key=lambda pair: -len(pair[0]))
        self._policy = ours.policy
        self._linux = made.setdefault("linux", {})
        self._process = made.get("process")

    def all(self, criu_config: str) -> dict[str, Any]:
        self._made.pop("hooks", None)
        if "path" not in self._made.get("root", {}):
            refuse("root.path", "is missing")
        if not self._process or not self._process.get("args") or "cwd" not in self._process:
            refuse("process", "must have args and cwd")
        self._made["root"]["path"] = self._inside(self._made["root"]["path"], "root.path")
        self._check_process()
        self._check_mounts()
        self._namespaces()
        self._check_ids()
        self._check_protected()
        self._devices()
        self._check_resources()
        self._check_kernel()
        self._linux.pop("cgroupsPath", None)
        if self._ours.cgroup:
            self._linux["cgroupsPath"] = self._ours.cgroup
        self._made["annotations"] = {"org.criu.config": criu_config}
        return self._made

    def _not_allowed(self, where: str, what: str, key: str, value: str) -> NoReturn:
        refuse(
            where,
            f"{what}, which the policy of this host does not allow: to allow it, add {value} to "
            f"{key} in [container.{self._ours.name}.policy] on this host",
        )

    # ---- paths

    def _moved(self, written: str, where: str) -> str:
        """The path on this host for a path of the source."""
        path = self._paths.get(written, written)
        if not path.startswith("/"):
            path = f"{self._ours.bundle}/{path}"
        else:
            for theirs, ours in self._mounts:
                if within(path, theirs):
                    path = ours + os.path.normpath(path)[len(os.path.normpath(theirs)) :]
                    break
        return json_shapes.path(path, where)

    def _inside(self, written: str, where: str) -> str:
        path = self._moved(written, where)
        if not any(within(path, place) for place in self._ours.foreign()):
            refuse(
                where,
                f"is {written[:120]!r}, which lies on no disk and in no tree of "
                f"[container.{self._ours.name}] on this host",
            )
        return path

    # ---- process

    def _check_process(self) -> None:
        process = self._process
        assert process is not None
        if any(within(process["cwd"], p) for p in ("/proc", "/dev", "/sys")):
            refuse(
                "process.cwd",
                f"is {process['cwd']!r}: no container starts below /proc, /dev or /sys",
            )
        given = process.get("capabilities", {})
        for name in given:
            for capability in given[name]:
                if capability not in self._policy.capabilities:
                    where = f"process.capabilities.{name}"
                    self._not_allowed(where, f"has {capability}", "capabilities", f'"{capability}"')
        # Some runtimes take a missing set for another one.
        process["capabilities"] = {name: given.get(name, []) for name in _SETS}
        if not process.get("noNewPrivileges") and self._policy.no_new_privileges == "required":
            refuse(
                "process.noNewPrivileges",
                "must be true: the policy of this host says so (no_new_privileges)",
            )
        self._label(process, "apparmorProfile", "process", "apparmor", self._policy.apparmor)
        self._label(process, "selinuxLabel", "process", "selinux", self._policy.selinux)
        self._label(self._linux, "mountLabel", "linux", "selinux", self._policy.selinux)
        if process.get("oomScoreAdj", 0) < min(self._policy.oom_score_adj, 0):
            refuse(
                "process.oomScoreAdj",
                f"is {process['oomScoreAdj']}, lower than the policy of this host allows "
                f"(oom_score_adj = {self._policy.oom_score_adj})",
            )
        seen = set()
        for limit in process.get("rlimits", []):
            kind = limit.get("type")
            if kind not in self._policy.rlimits:
                self._not_allowed("process.rlimits", f"has {kind}", "rlimits", f'"{kind}"')
            if kind in seen or limit.get("soft", 0) > limit.get("hard", 0):
                refuse("process.rlimits", f"has {kind} twice, or a soft limit above the hard one")
            seen.add(kind)

    def _label(
        self, table: dict[str, Any], key: str, above: str, name: str, allowed: Collection[str]
    ) -> None:
        label = table.pop(key, "")
        if label in ("", "unconfined"):
            return
        if label not in allowed:
            self._not_allowed(f"{above}.{key}", f"is {label[:120]!r}", name, f'"{label[:120]}"')
        table[key] = label

    # ---- mounts

    def _check_mounts(self) -> None:
        seen = set()
        for n, mount in enumerate(self._made.get("mounts", [])):
            where = f"mounts[{n}]"
            point = mount.get("destination", "/")
            if point == "/" or point in seen:
                refuse(where, f"is on {point}, which is the root or has a mount already")
            seen.add(point)
            options = mount.get("options", [])
            kind = mount.get("type", "")
            if {"bind", "rbind"} & {*options} and kind in ("", "none", "bind"):
                kind = "bind"
            elif kind == "bind":
                options = [*options, "bind"]
            self._check_options(kind, options, where)
            if kind == "bind":
                source = self._bound(mount, where)
            else:
                self._check_point(kind, point, options, where)
                source = mount.get("source", kind)  # any word: nothing is opened
                source = source if re.fullmatch(r"[a-z0-9_-]{1,32}", source) else kind
            mount |= {"type": kind, "options": options, "source": source}
        dev = [m for m in self._made.get("mounts", []) if m["destination"] == "/dev"]
        if [m["type"] for m in dev] != ["tmpfs"]:
            # runc masks with /dev/null as it is in the container.
            refuse("mounts", "has no tmpfs on /dev: the disk's own /dev would be used")

    def _check_options(self, kind: str, options: Iterable[str], where: str) -> None:
        for option in options:
            known = option in _FLAGS or option in _MORE.get(kind, ())
            if not known and not (_VALUES.fullmatch(option) and kind in ("tmpfs", "devpts")):
                refuse(where, f"has the option {option[:80]!r}, which is not accepted")

    def _check_point(self, kind: str, point: str, options: list[str], where: str) -> None:
        if kind == "tmpfs":
            if any(within(point, p) for p in ("/proc", "/sys")):
                refuse(where, f"is a tmpfs on {point}, where the kernel's files are")
            if point == "/dev" and "tmpcopyup" in options:
                refuse(where, "has tmpcopyup: it would copy the disk's own /dev into /dev")
            return
        if point != _POINTS.get(kind):
            refuse(where, f"is a {kind[:40]!r} on {point}, which is not accepted there")
        if kind in ("sysfs", "cgroup", "cgroup2") and "ro" not in options:
            if point not in self._policy.unprotected:
                self._not_allowed(where, f"has {point} writable", "unprotected", f'"{point}"')
        elif "rw" in options and "ro" in options:
            refuse(where, "is both ro and rw")

    def _bound(self, mount: dict[str, Any], where: str) -> str:
        """The path on this host that is bound."""
        written = mount.get("source", "")
        path = self._moved(written, where)
        if path in (os.path.normpath(p) for p in self._ours.external):
            return path
        for kernel in ("/proc", "/sys", "/dev"):
            if within(mount["destination"], kernel):
                refuse(where, f"binds {written[:120]!r} below {kernel}, among the kernel's files")
        if not any(within(path, place) for place in self._ours.foreign()):
            refuse(
                where,
                f"binds {written[:120]!r}, which lies on no disk and in no tree of "
                f"[container.{self._ours.name}] on this host: if the container may use the one "
                f'that is here, write external = ["{path[:120]}"] there',
            )
        return path

    # ---- namespaces, ids

    def _namespaces(self) -> None:
        found: dict[str, dict[str, str]] = {}
        ours = self._ours
        for namespace in self._linux.get("namespaces", []):
            kind, path = namespace.get("type", ""), namespace.get("path", "")
            if kind not in (*self._policy.namespaces, "network", "user", "cgroup"):
                refuse("linux.namespaces", f"has {kind[:40]!r}, which is not known to this pyploop")
            if kind in found:
                refuse("linux.namespaces", f"has {kind!r} twice")
            found[kind] = {"type": kind}
            if kind == "network" and ours.netns:
                found[kind]["path"] = ours.netns
            elif path:
                why = f"has the {kind} namespace {path[:120]!r} of the source, which is not here"
                if kind == "network":
                    why += f": write netns in [container.{ours.name}] on this host"
                refuse("linux.namespaces", why)
        wanted = [*self._policy.namespaces, *(["user"] if self._policy.host_ids else [])]
        for kind in wanted:
            if kind not in found:
                refuse(
                    "linux.namespaces",
                    f"has no {kind} namespace: the container would use that of this host",
                )
        self._linux["namespaces"] = list(found.values())

    def _check_ids(self) -> None:
        user = any(n["type"] == "user" for n in self._linux["namespaces"])
        for key in ("uidMappings", "gidMappings"):
            entries = self._linux.get(key, [])
            if bool(entries) != user:
                refuse(f"linux.{key}", "must be set with a user namespace, and only then")
            for entry in entries:
                first = entry.get("hostID", 0)
                last = first + entry.get("size", 0) - 1
                ranges = self._policy.id_ranges()
                if ranges and not any(a <= first <= last <= b for a, b in ranges):
                    refuse(
                        f"linux.{key}",
                        f"has {first}-{last}, which the policy does not allow (host_ids)",
                    )

    # ---- the kernel's files, devices, resources

    def _check_protected(self) -> None:
        masked = {*self._linux.get("maskedPaths", [])}
        readonly = masked | {*self._linux.get("readonlyPaths", [])}
        for key, needed, there in (
            ("maskedPaths", MASKED, masked),
            ("readonlyPaths", READONLY, readonly),
        ):
            for path in needed:
                if path not in there and path not in self._policy.unprotected:
                    self._not_allowed(
                        f"linux.{key}", f"does not have {path}", "unprotected", f'"{path}"'
                    )

    def _devices(self) -> None:
        """Devices are found by their path on this host: the source's numbers may differ."""
        allowed: dict[tuple[int, int], str] = {}
        for path in self._policy.devices:
            try:
                st = os.stat(path)
            except OSError as e:
                why = f"cannot be fitted: {path} in the policy of this host: {e.strerror}"
                refuse("linux.devices", why)
            kind = {stat.S_IFCHR: "c", stat.S_IFBLK: "b"}.get(stat.S_IFMT(st.st_mode))
            if kind is None:
                why = f"cannot be fitted: {path} in the policy of this host is not a device"
                refuse("linux.devices", why)
            allowed[os.major(st.st_rdev), os.minor(st.st_rdev)] = f"{kind} {path}"
        by_path = {text.split(" ", 1)[1]: (text[0], *rdev) for rdev, text in allowed.items()}
        by_path |= {path: ("c", *rdev) for rdev, path in DEVICES.items()}
        for device in self._linux.get("devices", []):
            path = device.get("path", "")
            if path not in by_path:
                self._not_allowed("linux.devices", f"has {path!r}", "devices", f'"{path}"')
            kind, major, minor = by_path[path]
            if device.get("type") not in (kind, "u" if kind == "c" else kind):
                refuse("linux.devices", f"has {path!r}, which has another type on this host")
            device |= {"type": kind, "major": major, "minor": minor}
            device["fileMode"] = device.get("fileMode", 0o666) & 0o777
        self._rules(allowed)

    def _rules(self, allowed: dict[tuple[int, int], str]) -> None:
        """The rules of the devices cgroup: they allow only what the policy has."""
        resources = self._linux.setdefault("resources", {})
        rules = [{"allow": False, "access": "rwm"}]
        for rule in resources.get("devices", []):
            kind, rdev = rule.get("type") or "a", (rule.get("major", -1), rule.get("minor", -1))
            if not rule.get("allow"):
                rules.append(rule)
                continue
            only_made = rule.get("access") == "m" and kind in ("b", "c")
            ours = allowed.get(rdev, "")[:1] == kind or (kind == "c" and rdev in RULES)
            if not only_made and not ours:
                refuse(
                    "linux.resources.devices",
                    f"allows {kind} {rdev[0]}:{rdev[1]} (-1: all), which the policy of this host "
                    "does not: to allow it, add the device's file to devices in "
                    f"[container.{self._ours.name}.policy] on this host",
                )
            rules.append(rule)
        for (major, minor), text in allowed.items():
            rule = {"allow": True, "type": text[0], "major": major, "minor": minor}
            rules.append({**rule, "access": "rwm"})
        resources["devices"] = rules

    def _check_resources(self) -> None:
        for key, value in self._linux["resources"].get("unified", {}).items():
            if not _UNIFIED.fullmatch(key) or not re.fullmatch(r"[0-9a-z ,.-]{1,80}", value):
                refuse("linux.resources.unified", f"has {key[:80]!r}, which is not accepted")

    def _check_kernel(self) -> None:
        for name, value in self._linux.get("sysctl", {}).items():
            if not _SYSCTL.fullmatch(name) or not re.fullmatch(r"[0-9 \t-]{1,80}", value):
                refuse("linux.sysctl", f"has {name[:80]!r} = {value[:80]!r}, which is not accepted")
            if not self._policy.allows_sysctl(name):
                self._not_allowed("linux.sysctl", f"has {name}", "sysctls", f'"{name}"')
        seccomp = self._linux.get("seccomp")
        if self._policy.seccomp == "required" and (
            not seccomp or seccomp.get("defaultAction") not in _STRICT
        ):
            refuse(
                "linux.seccomp", "must refuse by default: the policy of this host says so (seccomp)"
            )
