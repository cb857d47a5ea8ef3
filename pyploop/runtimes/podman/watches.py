# SPDX-License-Identifier: Apache-2.0
"""Files that processes watch (inotify, fanotify) on an overlay, as the root of a container of
Podman is one.

CRIU finds a watched file by its handle, and overlayfs opens none.  Then it looks in some folders
(/etc, /var/log, ...) for a file with that inode, and in those that its option irmap-scan-path
names.  Without its path it cannot dump a watch ("Can't dump that handle").
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyploop.system import mount_table

_WATCH = re.compile(r"^(?:inotify|fanotify) .*?\bino:([0-9a-f]+) sdev:([0-9a-f]+) ", re.MULTILINE)
_PLAIN = re.compile(r"[A-Za-z0-9/_.+@%:,=~-]+")
"""A path that is one word of CRIU's options.  The container names its files, and another name could
be another option."""
_MINOR = 20  # bits of the minor number in the kernel's dev_t


def paths(pids: Sequence[int], proc: str = "/proc") -> list[str]:
    """Those that are found, as the container names them, without those within another one.  CRIU
    looks through a whole folder.  pids: all the container's processes, the first one first."""
    root = f"{proc}/{pids[0]}/root"
    overlays: dict[tuple[int, int], str] = {}
    with contextlib.suppress(OSError):
        for entry in mount_table.read(Path(f"{proc}/{pids[0]}/mountinfo")):
            if entry.fstype == "overlay":
                overlays.setdefault(entry.dev, entry.point)
    wanted: dict[str, set[int]] = {}
    for dev, inode in _watched(pids, proc):
        if dev in overlays:
            wanted.setdefault(overlays[dev], set()).add(inode)
    found = (p for point, inodes in wanted.items() for p in _named(root, point, inodes))
    kept: list[str] = []
    for path in sorted(p for p in found if _PLAIN.fullmatch(p)):
        if not any(mount_table.within(path, k) for k in kept):
            kept.append(path)
    return kept


def _watched(pids: Sequence[int], proc: str) -> set[tuple[tuple[int, int], int]]:
    """(device, inode) of each file."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"{proc}/{pid}/fd"):
                with contextlib.suppress(OSError):  # closed meanwhile
                    if os.readlink(f"{proc}/{pid}/fd/{name}").endswith("notify"):
                        text = Path(f"{proc}/{pid}/fdinfo/{name}").read_text()
                        for inode, dev in _WATCH.findall(text):
                            number = int(dev, 16)
                            major, minor = number >> _MINOR, number & ((1 << _MINOR) - 1)
                            found.add(((major, minor), int(inode, 16)))
    return found


def _named(root: str, point: str, inodes: set[int]) -> Iterator[str]:
    """The paths of these inodes in the file system that is mounted there.  The search ends with the
    last one."""
    left = set(inodes)
    top = os.stat(root + point)
    left.discard(top.st_ino)  # CRIU looks there itself
    folders = [point.rstrip("/")]
    while folders and left:
        folder = folders.pop()
        with contextlib.suppress(OSError), os.scandir(f"{root}{folder}/") as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}"
                # Of a folder that something is mounted on this is the one below.
                if entry.inode() in left:
                    left.discard(entry.inode())
                    yield path
                if entry.is_dir(follow_symlinks=False) and not os.path.ismount(root + path):
                    folders.append(path)
