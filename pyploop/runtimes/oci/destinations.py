# SPDX-License-Identifier: Apache-2.0
"""Where the mounts of a fitted config.json come to lie, when the container's files
have come: a link of theirs may lead one to /dev, /proc or /sys, where runc finds what
it masks the kernel's files with, and the masked files themselves.
"""

from __future__ import annotations

import os
from typing import Any

from pyploop.errors import MigrateError
from pyploop.runtimes import BAD_CONFIG
from pyploop.runtimes.config import within

KERNEL = ("/dev", "/proc", "/sys")
MOST_LINKS = 255
"""That runc follows on the way to one destination."""


def check(config: dict[str, Any]) -> None:
    """MigrateError(15) for a mount that a link leads to the root or to KERNEL, or away
    from there.  The root and what is bound are on this host, and nobody writes there."""
    made = _Made(config["root"]["path"])
    for mount in config.get("mounts", []):
        point = mount["destination"]
        real = made.resolve(point)
        theirs = [top for top in KERNEL if within(point, top)]
        if real == "/" or (real != point and (theirs or any(within(real, k) for k in KERNEL))):
            raise MigrateError(
                BAD_CONFIG,
                f"config.json mounts something on {point}, which is {real} by a symbolic link of "
                "the container's",
            )
        made.add(real, mount)


class _Made:
    """What the container sees while its mounts are made."""

    def __init__(self, root: str) -> None:
        self._places: list[tuple[str, str | None]] = [("/", root)]
        """Point in the container, and the folder of this host that is seen there; None:
        what holds no links of the container's."""

    def add(self, point: str, mount: dict[str, Any]) -> None:
        if mount["type"] == "bind":
            self._places.append((point, mount["source"]))
        elif "tmpcopyup" not in mount.get("options", ()):
            self._places.append((point, None))

    def resolve(self, path: str) -> str:
        """As in a chroot.  What is not there has no links."""
        at: list[str] = []
        left = path.split("/")[::-1]
        links = 0
        while left:
            part = left.pop()
            if part == "..":
                at = at[:-1]
            elif part not in ("", "."):
                text = self._link("/" + "/".join([*at, part]))
                if text is None:
                    at.append(part)
                    continue
                links += 1
                if links > MOST_LINKS:
                    raise MigrateError(
                        BAD_CONFIG, f"config.json mounts something on {path}: too many links"
                    )
                at = [] if text.startswith("/") else at
                left += text.split("/")[::-1]
        return "/" + "/".join(at)

    def _link(self, path: str) -> str | None:
        point, source = next(p for p in reversed(self._places) if within(path, p[0]))
        try:
            return source and os.readlink(source + path[len(point.rstrip("/")) :])
        except OSError:
            return None
