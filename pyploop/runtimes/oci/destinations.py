# SPDX-License-Identifier: Apache-2.0
"""Where the mounts of a fitted config.json really lie, once the container's files are
there.  A symbolic link among them could lead a mount to /dev, /proc or /sys.  There runc
finds the device with which it masks the kernel's files, and the masked files themselves.
"""

from __future__ import annotations

import os
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.config import within

KERNEL = ("/dev", "/proc", "/sys")
MOST_STEPS = 1 << 15
"""Parts of all destinations and of the links on the way to them.  Real containers have
some hundreds."""
MOST_PARTS = 2048
"""Parts of one path: the kernel takes 4096 bytes."""


def check(config: dict[str, Any]) -> None:
    """MigrateError(15) when a link leads a mount to the root or to a folder of KERNEL, or
    away from one.  The root and the sources of binds are on this host, and nothing
    writes to them meanwhile."""
    made = _Made(config["root"]["path"])
    for mount in config.get("mounts", []):
        point = mount["destination"]
        real = made.resolve(point)
        theirs = [top for top in KERNEL if within(point, top)]
        if real == "/" or (real != point and (theirs or any(within(real, k) for k in KERNEL))):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"config.json has a mount on {point}, but a symbolic link in the container leads "
                f"from there to {real}: no such mount is made",
            )
        made.add(real, mount)


class _Made:
    """The file system that the container sees while its mounts are made."""

    def __init__(self, root: str) -> None:
        self._places: list[tuple[str, str | None]] = [("/", root)]
        """Mount point in the container, and the folder of this host that it shows.  None: a
        new file system, which has no links of the container."""
        self._steps = 0

    def add(self, point: str, mount: dict[str, Any]) -> None:
        if mount["type"] == "bind":
            self._places.append((point, mount["source"]))
        elif "tmpcopyup" not in mount.get("options", ()):
            self._places.append((point, None))

    def resolve(self, path: str) -> str:
        """Where the path leads, as in a chroot.  A part that does not exist is no link."""
        at: list[str] = []
        left = path.split("/")[::-1]
        while left:
            part = left.pop()
            self._steps += 1
            if self._steps > MOST_STEPS or len(at) > MOST_PARTS:
                raise MigrateError(
                    VzExitCode.BAD_CONFIG,
                    f"config.json has a mount on {path[:80]}: too many links on the way to it",
                )
            if part == "..":
                at = at[:-1]
            elif part not in ("", "."):
                text = self._link("/" + "/".join([*at, part]))
                if text is None:
                    at.append(part)
                    continue
                at = [] if text.startswith("/") else at
                left += text.split("/")[::-1]
        return "/" + "/".join(at)

    def _link(self, path: str) -> str | None:
        below = ((len(p.rstrip("/")), s) for p, s in reversed(self._places) if _holds(p, path))
        start, source = next(below)
        try:
            return source and os.readlink(source + path[start:])
        except OSError:
            return None


def _holds(point: str, path: str) -> bool:
    return f"{path}/".startswith(f"{point.rstrip('/')}/")
