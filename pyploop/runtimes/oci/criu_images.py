# SPDX-License-Identifier: Apache-2.0
"""CRIU's images of a container against the config.json that was written for it,
before they are restored.

A restore makes processes as the images say, whatever the configuration says: their
capabilities, their namespaces, what is mounted, their cgroup.  Here nothing more is
let through than the configuration gives.  This cannot make a source safe that is not
trusted: memory, the contents of tmpfs and seccomp filters are as they come, and CRIU
reads them as root.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.config import within
from pyploop.runtimes.oci import config_json, json_shapes
from pyploop.wire import criu
from pyploop.wire.criu import Core, Creds, File, FsType, Inventory, Mount, Task, Thread
from pyploop.wire.protobuf import Malformed, Message

LARGEST = 64 << 20
"""Bytes of an image that is looked into.  That of 10,000 open files has one MiB."""
STREAMS = "descriptors.json"
ALL = 256 << 20
"""Bytes of all that are looked into: a minute's work."""
MOST_ENTRIES = 1 << 20
"""Of all of them: open files, processes, mounts."""
MOST_LISTED = 1 << 17
"""Of one that is kept in memory: processes, mounts."""
_NEVER = {"creds", "apparmor", "binfmt-misc", "autofs", "bpfmap-file", "bpfmap-data"}
"""Credentials of old images, profiles that CRIU loads into the kernel, programs by
which the host would run files, mounts that wait for a process, BPF."""
_MS_RDONLY = 1
_COVERED = (*config_json.READONLY, "/sys/firmware")
"""What has to be read-only or masked where this kernel has it.  Of what is masked
besides it a source with another kernel may have less."""
_REALTIME = (1, 2, 6)
"""SCHED_FIFO, SCHED_RR, SCHED_DEADLINE."""
_SETS = {
    "bounding": Creds.BOUNDING,
    "permitted": Creds.PERMITTED,
    "effective": Creds.EFFECTIVE,
    "inheritable": Creds.INHERITABLE,
    "ambient": Creds.AMBIENT,
}
_EXTERNAL_BEGINS = (File.REGULAR_EXTERNAL << 3, File.REGULAR_EXTERNAL << 3 | 0x80)
_RULE = re.compile(r"([abc]) ([0-9]{1,10}|\*):([0-9]{1,10}|\*) ([rwm]{1,3})")


def check(folder: Path, config: dict[str, Any], labels: Collection[str] = ()) -> None:
    """config: as this host has written it.  labels: of LSMs that the policy allows,
    for the kernel gives some to processes whose configuration has none.
    MigrateError(15)."""
    _Check(folder, config, labels).all()


class _Check:
    def __init__(self, folder: Path, config: dict[str, Any], labels: Collection[str]) -> None:
        self._folder, self._config, self._labels_allowed = folder, config, labels
        self._linux, self._process = config["linux"], config["process"]
        self._kinds = {n["type"] for n in self._linux["namespaces"]}
        self._caps = {k: _bits(v) for k, v in self._process["capabilities"].items()}
        self._any_cap = 0
        for bits in self._caps.values():
            self._any_cap |= bits
        self._name = ""
        self._bytes = self._count = 0
        """What was looked into so far."""
        self._points: dict[str, Message] = {}

    def all(self) -> None:
        try:
            names = self._names()
            self._streams()
            self._ids(names)
            for name, kind in names.items():
                self._name = name
                if kind == "core":
                    self._core(self._only(name, kind))
                elif kind == "mountpoints":
                    self._mounts(self._listed(name, kind))
                elif kind == "files":
                    for entry in self._entries(name, kind):
                        self._file(entry)
                elif kind == "userns":
                    self._user_namespace(self._only(name, kind))
                elif kind == "cgroup":
                    self._cgroup(self._only(name, kind))
        except Malformed as e:
            self._refuse(f"is damaged: {e}")
        except OSError as e:
            self._refuse(f"cannot be read: {e.strerror}")

    def _refuse(self, why: str) -> NoReturn:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"the memory images are not restored here: {self._name} {why}",
        )

    # ---- files

    def _names(self) -> dict[str, str]:
        """Image file -> its kind."""
        found = {}
        for entry in os.scandir(self._folder):
            known = criu.kind_of(entry.name)
            self._name = entry.name
            if known is None:
                continue  # nor does CRIU open it
            if known in _NEVER:
                self._refuse("is of a kind that is never restored")
            if not entry.is_file(follow_symlinks=False):
                self._refuse("is no regular file")
            found[entry.name] = known
        self._name = "the dump"
        for name in ("inventory.img", "pstree.img"):
            if name not in found:
                self._refuse(f"has no {name}")
        if "mountpoints" not in found.values():
            self._refuse("has no mountpoints-*.img")
        return found

    def _streams(self) -> None:
        """runc's own file: each name of a pipe in it stands for the descriptor of runc's
        that has its place in the list, and the container gets that."""
        self._name = STREAMS
        try:
            found = json_shapes.loads(self._read(STREAMS))
        except FileNotFoundError:
            return
        except ValueError:
            found = None
        if not isinstance(found, list) or len(found) > 3:
            self._refuse("has more than the standard input, output and error")

    def _read(self, name: str) -> bytes:
        self._name = name
        with (self._folder / name).open("rb", buffering=0) as f:
            size = os.fstat(f.fileno()).st_size
            if size > LARGEST:
                self._refuse(f"has {size} bytes, more than any real one")
            self._bytes += size
            if self._bytes > ALL:
                self._refuse(f"is one of those that have more than {ALL} bytes together")
            return f.readall()

    def _entries(self, name: str, kind: str) -> Iterator[Message]:
        for entry in criu.entries(kind, self._read(name)):
            self._count += 1
            if self._count > MOST_ENTRIES:
                self._refuse(f"is one of those that have more than {MOST_ENTRIES} entries")
            yield entry

    def _listed(self, name: str, kind: str) -> list[Message]:
        found = list(itertools.islice(self._entries(name, kind), MOST_LISTED + 1))
        if len(found) > MOST_LISTED:
            self._refuse(f"has more than {MOST_LISTED} entries")
        return found

    def _only(self, name: str, kind: str) -> Message:
        return criu.only(kind, self._read(name))

    # ---- namespaces

    def _ids(self, names: dict[str, str]) -> None:
        inventory = self._only("inventory.img", "inventory")
        host = inventory.message(Inventory.ROOT_IDS)
        if host is None:
            self._refuse("does not tell the source's own namespaces")
        tasks = self._listed("pstree.img", "pstree")
        roots = [t for t in tasks if not t.number32(Task.PPID)]
        if len(roots) != 1:
            self._refuse(f"has {len(roots)} first processes, not one")
        for task in tasks:
            pid = task.number32(Task.PID)
            for thread in (pid, *task.numbers32(Task.THREADS)):
                if f"core-{thread}.img" in names:
                    continue
                # What CRIU writes as the thread of a process that has ended is chance,
                # and it does not read it.
                if thread == pid or not self._has_ended(f"core-{pid}.img"):
                    self._name = "pstree.img"
                    self._refuse(f"has the process {thread}, of which there is no core-*.img")
            if f"ids-{pid}.img" in names:
                self._namespaces(self._only(f"ids-{pid}.img", "ids"), host)
            elif task is roots[0]:
                self._refuse("has a first process without namespaces of its own")

    def _has_ended(self, name: str) -> bool:
        task = self._only(name, "core").message(Core.TC)
        return task is not None and task.number32(1) in criu.DEAD

    def _namespaces(self, ids: Message, host: Message) -> None:
        for kind, field in criu.NAMESPACES.items():
            same = (ids.number32(field) or 0) == (host.number32(field) or 0)
            if kind in self._kinds and same:
                self._refuse(f"has a process in the {kind} namespace of the host")
            if kind == "user" and kind not in self._kinds and not same:
                self._refuse("has a process in a user namespace, config.json has none")

    def _user_namespace(self, entry: Message) -> None:
        for field, key in ((1, "uidMappings"), (2, "gidMappings")):
            theirs = [tuple(m.number32(n) or 0 for n in (1, 2, 3)) for m in entry.messages(field)]
            ours = [
                (m.get("containerID", 0), m.get("hostID", 0), m.get("size", 0))
                for m in self._linux.get(key, [])
            ]
            if sorted(theirs) != sorted(ours):
                self._refuse(f"has other {key} than config.json")

    # ---- a process

    def _core(self, core: Message) -> None:
        thread = core.message(Core.THREAD)
        creds = thread.message(Thread.CREDS) if thread is not None else None
        if thread is None or creds is None:
            task = core.message(Core.TC)
            if task is None or task.number32(1) not in criu.DEAD:
                self._refuse("has a process without credentials")
            return
        for name, field in _SETS.items():
            words = creds.numbers32(field)
            bits = sum(word << (32 * n) for n, word in enumerate(words[:2]))
            if any(words[2:]):  # the kernel has 64
                self._refuse(f"has a process with more capabilities ({name}) than there are")
            more = bits & ~(self._caps[name] if name == "bounding" else self._any_cap)
            if more:
                self._refuse(f"has a process with {_names(more)} ({name}), config.json has not")
        if self._process.get("noNewPrivileges") and not creds.number32(Creds.NO_NEW_PRIVS):
            self._refuse("has a process that may gain privileges, config.json has not")
        self._labels(creds)
        if self._linux.get("seccomp"):
            mode, task = thread.number32(Thread.SECCOMP_MODE), core.message(Core.TC)
            if task is not None and task.number32(criu.OLD_SECCOMP_MODE) is not None:
                self._refuse("has the seccomp mode of an old image, which would win")
            if mode not in (1, 2) or (mode == 2 and thread.number32(Thread.SECCOMP_FILTER) is None):
                self._refuse("has a process without a seccomp filter, config.json has one")
        ahead = thread.number32(Thread.POLICY) in _REALTIME
        if ahead and not self._any_cap & _bits(["CAP_SYS_NICE"]):
            self._refuse("has a process in real time, without CAP_SYS_NICE")

    def _labels(self, creds: Message) -> None:
        profile = self._process.get("apparmorProfile") or self._process.get("selinuxLabel")
        theirs = creds.text(Creds.LSM_PROFILE)
        free = (None, "", "unconfined", *self._labels_allowed)
        if theirs not in free if profile is None else theirs != profile:
            self._refuse(
                f"has a process with the label {theirs!r}, config.json has {profile or 'none'}: if "
                "it may, add it to apparmor or selinux in the container's policy here"
            )
        if creds.text(Creds.LSM_SOCKCREATE) not in (None, "", self._process.get("selinuxLabel")):
            self._refuse("has a process that labels its sockets")

    # ---- mounts

    def _mounts(self, entries: list[Message]) -> None:
        """Of one mount namespace."""
        points: dict[str, Message] = {}
        for entry in entries:
            point = entry.text(Mount.POINT) or ""
            point = point if point.startswith("/") else "/" + point.removeprefix("./")
            if os.path.normpath(point) != point:
                self._refuse(f"has a mount on {point[:80]!r}")
            if point in points and (
                point == "/" or within(point, "/proc") or within(point, "/sys")
            ):
                self._refuse(f"has two mounts on {point}")
            points[point] = entry
        root = points.get("/")
        if root is None:
            self._refuse("has no root")
        self._points = points
        for point, entry in points.items():
            if entry is not root:
                self._mount(point, entry, root, points)
        for kernel in ("/proc", "/sys"):
            if kernel in points and points[kernel].number32(Mount.PARENT) != root.number32(
                Mount.ID
            ):
                self._refuse(f"has {kernel} mounted on something else than the root")
        self._check_covered(points)

    def _mount(self, point: str, entry: Message, root: Message, points: dict[str, Message]) -> None:
        kind, key = entry.number32(Mount.FSTYPE), entry.text(Mount.KEY)
        if entry.number32(Mount.EXTERNAL) or entry.number32(Mount.PLUGIN):
            self._refuse(f"has {point}, which another host mounts")
        readonly = bool((entry.number32(Mount.FLAGS) or 0) & _MS_RDONLY)
        if key:
            self._external(point, key, readonly)
        elif kind == FsType.OTHER:
            if entry.number32(Mount.ROOT_DEV) != root.number32(Mount.ROOT_DEV):
                self._refuse(f"has a file system on {point} that config.json does not have")
        elif kind in (FsType.PROC, FsType.SYSFS):
            top = "/proc" if kind == FsType.PROC else "/sys"
            inner = (entry.text(Mount.ROOT) or "/").rstrip("/")
            if point != top + inner:
                self._refuse(f"has {inner or '/'} of {top} on {point}")
            if point == "/sys" and self._readonly("/sys") and not readonly:
                self._refuse("has /sys writable, config.json has not")
        elif kind in (FsType.CGROUP, FsType.CGROUP2):
            self._cgroup_mount(point, readonly)
        elif kind not in (FsType.TMPFS, FsType.DEVPTS, FsType.MQUEUE):
            self._refuse(f"has a file system of the kind {kind} on {point}")

    def _readonly(self, point: str) -> bool:
        """As config.json has its mount."""
        found = [m for m in self._config["mounts"] if m["destination"] == point]
        return not found or "ro" in found[0].get("options", ())

    def _cgroup_mount(self, point: str, readonly: bool) -> None:
        if not within(point, "/sys/fs/cgroup"):
            self._refuse(f"has cgroups on {point}")
        if self._readonly("/sys/fs/cgroup") and not readonly:
            self._refuse(f"has {point} writable, config.json has not")

    def _external(self, point: str, key: str, readonly: bool) -> None:
        """key: by which runc knows what it mounts itself."""
        devices = [
            *config_json.DEVICES.values(),
            *(d["path"] for d in self._linux.get("devices", ())),
        ]
        if key == point and key in devices:
            return  # in a user namespace, where runc cannot make them
        if key == "/dev/null":
            if point not in self._linux.get("maskedPaths", ()):
                self._refuse(f"has /dev/null on {point}")
        elif within(key, "/sys/fs/cgroup"):
            if point != key:
                self._refuse(f"has the cgroups of {key} on {point}")
            self._cgroup_mount(point, readonly)
        elif key != point or not (binds := self._binds_on(point)):
            self._refuse(f"has {key} on {point}, which config.json does not have")
        elif any("ro" in m.get("options", ()) for m in binds) and not readonly:
            self._refuse(f"has {point} writable, config.json has not")

    def _binds_on(self, point: str) -> list[dict[str, Any]]:
        """Those of config.json that may be this mount.  A destination that leads
        through links of the root (/var/run) is mounted where they lead; runc finds
        that again at the restore, and CRIU takes no mount that runc does not give it."""
        binds = [m for m in self._config["mounts"] if m["type"] == "bind"]
        named = [m for m in binds if m["destination"] == point]
        linked = [m for m in binds if m["destination"] not in self._points]
        name = os.path.basename(point)
        return named or [m for m in linked if os.path.basename(m["destination"]) == name]

    def _check_covered(self, points: dict[str, Message]) -> None:
        masked = {*self._linux.get("maskedPaths", [])}
        wanted = masked | {*self._linux.get("readonlyPaths", [])}
        for path in _COVERED:
            top = "/proc" if path.startswith("/proc") else "/sys"
            if path not in wanted or top not in points or not os.path.lexists(path):
                continue
            entry = points.get(path)
            if entry is None or entry.number32(Mount.PARENT) != points[top].number32(Mount.ID):
                self._refuse(f"does not protect {path}, config.json does")
            readonly = (entry.number32(Mount.FLAGS) or 0) & _MS_RDONLY
            if entry.text(Mount.KEY) != "/dev/null" and not readonly:
                self._refuse(f"has {path} writable, config.json has not")

    def _file(self, entry: Message) -> None:
        external = entry.number32(File.TYPE) == File.TYPE_EXTERNAL
        regular = entry.raw(File.REGULAR)
        # Its field begins with one of these bytes; most of thousands of files have none.
        if regular and any(byte in regular for byte in _EXTERNAL_BEGINS):
            external = external or bool(Message(regular).number32(File.REGULAR_EXTERNAL))
        if external:
            self._refuse("has an open file of another host")

    # ---- cgroups

    def _cgroup(self, entry: Message) -> None:
        """One folder for each controller, in which all of the container lies: runc
        tells CRIU where that is here, and other folders stay where they were."""
        tops: dict[str, set[str]] = {}
        for group in entry.messages(1):
            for member in group.messages(2):
                name, path = member.text(1) or "", member.text(2) or ""
                if ".." in path.split("/"):
                    self._refuse(f"has the cgroup {path!r}")
                for part in name.split(","):  # mounted together
                    tops.setdefault(part, set()).add(path)
        for controller in entry.messages(2):
            folders = controller.messages(2)
            if len(folders) > 1:
                self._refuse("has more than one cgroup outside each other")
            for folder in folders:
                name = "/" + (folder.text(1) or "").strip("/")
                members = set().union(*(tops.get(c, set()) for c in controller.texts(1)))
                if name == "/" or not members or not all(within(path, name) for path in members):
                    self._refuse(f"has the cgroup {name!r}, in which the container does not lie")
                self._cgroup_folder(folder, 0)

    def _cgroup_folder(self, folder: Message, depth: int) -> None:
        name = folder.text(1) or ""
        if ".." in name.split("/") or (depth and "/" in name) or depth > 32:
            self._refuse(f"has the cgroup {name[:80]!r}")
        for prop in folder.messages(3):
            key, value = prop.text(1) or "", prop.text(2) or ""
            if (
                "/" in key
                or key == "release_agent"
                or (key == "notify_on_release" and value.strip() not in ("", "0"))
            ):
                self._refuse(f"sets {key[:80]} of a cgroup")
            if key.startswith("devices."):
                self._device_rules(value.splitlines())
        for child in folder.messages(2):
            self._cgroup_folder(child, depth + 1)

    def _device_rules(self, lines: Iterable[str]) -> None:
        ours = {
            (r["type"], r["major"], r["minor"])
            for r in self._linux["resources"]["devices"]
            if r.get("allow") and "major" in r and "minor" in r
        }
        ours |= {("c", *numbers) for numbers in config_json.RULES}
        for line in filter(None, map(str.strip, lines)):
            found = _RULE.fullmatch(line)
            if found is None:
                self._refuse(f"has the device rule {line[:80]!r}")
            major, minor = (-1 if n == "*" else int(n) for n in (found[2], found[3]))
            only_made = found[4] == "m" and found[1] != "a"
            if not only_made and (found[1], major, minor) not in ours:
                self._refuse(f"allows the device {line[:80]!r}, config.json does not")


def _bits(names: Iterable[str]) -> int:
    known = {f"CAP_{name}": n for n, name in enumerate(criu.CAPABILITIES)}
    return sum(1 << known[name] for name in {*names} if name in known)


def _names(bits: int) -> str:
    known = dict(enumerate(criu.CAPABILITIES))
    found = [n for n in range(bits.bit_length()) if bits >> n & 1]
    return ", ".join(f"CAP_{known[n]}" if n in known else f"capability {n}" for n in found)
