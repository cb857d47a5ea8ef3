# SPDX-License-Identifier: Apache-2.0
"""The mounts of a dump against those of config.json."""

from __future__ import annotations

import os
from typing import Any

from pyploop.runtimes.config import within
from pyploop.runtimes.oci import config_json
from pyploop.runtimes.oci.image_files import Images
from pyploop.wire.criu import FsType, Mount
from pyploop.wire.protobuf import Message

_MS_RDONLY = 1
_COVERED = (*config_json.READONLY, "/sys/firmware")
"""Paths that must be read-only or masked where this kernel has them.  Other masked paths
may be missing: the source's kernel may not have them."""


class Mounts:
    """What is mounted in the images, against what config.json mounts."""

    def __init__(self, images: Images, config: dict[str, Any]) -> None:
        self._images, self._config, self._linux = images, config, config["linux"]
        self._points: dict[str, Message] = {}

    def check(self, entries: list[Message]) -> None:
        """The mounts of one mount namespace."""
        points: dict[str, Message] = {}
        for entry in entries:
            point = entry.text(Mount.POINT) or ""
            point = point if point.startswith("/") else "/" + point.removeprefix("./")
            if os.path.normpath(point) != point:
                self._images.refuse(f"has a mount on {point[:80]!r}, which is not a plain path")
            if point in points and (
                point == "/" or within(point, "/proc") or within(point, "/sys")
            ):
                self._images.refuse(f"has two mounts on {point}")
            points[point] = entry
        root = points.get("/")
        if root is None:
            self._images.refuse("has no mount on /")
        self._points = points
        for point, entry in points.items():
            if entry is not root:
                self._mount(point, entry, root)
        for kernel in ("/proc", "/sys"):
            if kernel in points and points[kernel].number32(Mount.PARENT) != root.number32(
                Mount.ID
            ):
                self._images.refuse(f"has {kernel} mounted on another file system than the root")
        self._check_covered(points)

    def _mount(self, point: str, entry: Message, root: Message) -> None:
        kind, key = entry.number32(Mount.FSTYPE), entry.text(Mount.KEY)
        if entry.number32(Mount.EXTERNAL) or entry.number32(Mount.PLUGIN):
            self._images.refuse(f"has a mount on {point} that CRIU did not dump itself")
        readonly = bool((entry.number32(Mount.FLAGS) or 0) & _MS_RDONLY)
        if key:
            self._external(point, key, readonly)
        elif kind == FsType.OTHER:
            if entry.number32(Mount.ROOT_DEV) != root.number32(Mount.ROOT_DEV):
                self._images.refuse(f"has a file system on {point} that config.json does not have")
        elif kind in (FsType.PROC, FsType.SYSFS):
            top = "/proc" if kind == FsType.PROC else "/sys"
            inner = (entry.text(Mount.ROOT) or "/").rstrip("/")
            if point != top + inner:
                self._images.refuse(f"has {inner or '/'} of {top} mounted on {point}")
            if point == "/sys" and self._readonly("/sys") and not readonly:
                self._images.refuse("has /sys writable, but config.json does not")
        elif kind in (FsType.CGROUP, FsType.CGROUP2):
            self._cgroup_mount(point, readonly)
        elif kind not in (FsType.TMPFS, FsType.DEVPTS, FsType.MQUEUE):
            self._images.refuse(
                f"has a file system of the kind {kind} on {point}, which is never restored"
            )

    def _readonly(self, point: str) -> bool:
        """Whether config.json mounts it read-only, or not at all."""
        found = [m for m in self._config["mounts"] if m["destination"] == point]
        return not found or "ro" in found[0].get("options", ())

    def _cgroup_mount(self, point: str, readonly: bool) -> None:
        if not within(point, "/sys/fs/cgroup"):
            self._images.refuse(f"has cgroups mounted on {point}")
        if self._readonly("/sys/fs/cgroup") and not readonly:
            self._images.refuse(f"has {point} writable, but config.json does not")

    def _external(self, point: str, key: str, readonly: bool) -> None:
        """A mount that runc makes itself.  key: how runc and CRIU name it."""
        devices = [
            *config_json.DEVICES.values(),
            *(d["path"] for d in self._linux.get("devices", ())),
        ]
        if key == point and key in devices:
            return  # in a user namespace, where runc cannot make them
        if key == "/dev/null":
            if point not in self._linux.get("maskedPaths", ()):
                self._images.refuse(
                    f"has /dev/null mounted on {point}, but config.json does not mask it"
                )
        elif within(key, "/sys/fs/cgroup"):
            if point != key:
                self._images.refuse(f"has the cgroups of {key} mounted on {point}")
            self._cgroup_mount(point, readonly)
        elif key != point or not (binds := self._binds_on(point)):
            self._images.refuse(f"has {key} mounted on {point}, but config.json does not")
        elif any("ro" in m.get("options", ()) for m in binds) and not readonly:
            self._images.refuse(f"has {point} writable, but config.json does not")

    def _binds_on(self, point: str) -> list[dict[str, Any]]:
        """The binds of config.json that may be this mount.  A destination that leads through
        links of the root (/var/run) is mounted where they lead.  runc finds that place
        again at the restore, and CRIU accepts no mount that runc does not give it."""
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
                self._images.refuse(f"does not protect {path}, but config.json does")
            readonly = (entry.number32(Mount.FLAGS) or 0) & _MS_RDONLY
            if entry.text(Mount.KEY) != "/dev/null" and not readonly:
                self._images.refuse(f"has {path} writable, but config.json does not")
