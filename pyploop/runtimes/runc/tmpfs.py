# SPDX-License-Identifier: Apache-2.0
"""The tmpfs of a container.

CRIU starts `tar` for each of them, and that starts a shell and gzip, all while the container
is suspended.  So pyploop's own tar (csrc/tmpfs_tar) is found first by CRIU.  It packs them
without another process, as GNU headers and pax headers:

    plain     for a target that has that tar, too
    wrapped   for any other target: in gzip's format, not compressed

On the target it unpacks what it has packed, and runs the next tar in PATH for the rest.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop.system import beneath, helpers, mount_table
from pyploop.units import MIB, format_size

CAPABILITY = "tmpfs"
"""The target's agent unpacks a tmpfs that is packed PLAIN."""
PLAIN, WRAPPED = "plain", "wrapped"
WORTH_TELLING = 16 * MIB
"""Bytes of a tmpfs from which on the checks name it, with its size."""


def has_own_users(config: dict[str, Any]) -> bool:
    """Whether a config.json has a user namespace.  CRIU starts tar in it."""
    linux = config.get("linux")
    namespaces = linux.get("namespaces") if isinstance(linux, dict) else None
    return any(isinstance(n, dict) and n.get("type") == "user" for n in namespaces or ())


def packing(takes: Collection[str], own_users: bool) -> str:
    """takes: the optional parts of the agent's protocol that the target knows.  own_users:
    as of `has_own_users`; then root may not be allowed to run our tar on the target."""
    return PLAIN if CAPABILITY in takes and not own_users else WRAPPED


def environment(packing: str) -> dict[str, str]:
    """The environment in which CRIU finds our tar.  packing: PLAIN or WRAPPED."""
    path = os.environ.get("PATH") or os.defpath
    return {**os.environ, "PATH": f"{helpers.FOLDER}:{path}", "PYPLOOP_TMPFS": packing}


@dataclass(frozen=True)
class Used:
    """A tmpfs of the container."""

    point: str
    size: int
    """Bytes of files."""


def used_by(init: int) -> list[Used]:
    """Each tmpfs in the mount namespace of the container's first process, once.  One that
    cannot be asked, such as one below another mount, is left out."""
    root = Path(f"/proc/{init}/root")
    found: dict[tuple[int, int], Used] = {}
    try:
        mounts = mount_table.read(Path(f"/proc/{init}/mountinfo"))
    except OSError:
        return []
    for mount in mounts:
        if mount.fstype != "tmpfs" or mount.root != "/" or mount.dev in found:
            continue
        try:
            found[mount.dev] = Used(mount.point, _size(f"{root}{mount.point}", root, mount.dev))
        except OSError:
            continue
    return list(found.values())


def _size(path: str, root: Path, dev: tuple[int, int]) -> int:
    # The container may swap a folder for a link.  Then it is another file system.
    with beneath.place(path, str(root)) as at:
        fd = os.open(at.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at.dir_fd)
    try:
        st = os.fstat(fd)
        if (os.major(st.st_dev), os.minor(st.st_dev)) != dev:
            return 0
        space = os.fstatvfs(fd)
        return (space.f_blocks - space.f_bfree) * space.f_frsize
    finally:
        os.close(fd)


def in_words(every: list[Used]) -> list[str]:
    """Lines for the user about what moves while the container is suspended."""
    large = [f"{t.point} ({format_size(t.size)})" for t in every if t.size >= WORTH_TELLING]
    return [f"Moves while the container is suspended: tmpfs {', '.join(large)}"] if large else []
