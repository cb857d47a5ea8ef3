# SPDX-License-Identifier: Apache-2.0
"""The mounts of a container that is restored, and has not run yet, against those of its dump.

CRIU can restore a read-only mount writable, without an error: it does not remount a bind whose
flags are those of another bind that contains it, though it binds it from the host.  So what is
really mounted is looked at before the migration is committed.  A mount that lacks a restriction
gets it here; when it does not, the container is not restored, and goes on on the source.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.system import kernel, mount_table
from pyploop.wire import criu
from pyploop.wire.criu import Mount
from pyploop.wire.protobuf import Malformed, Message

RESTRICTIONS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8}
"""Option in mountinfo -> MS_ flag of mount(2), which is also what CRIU's images have."""
_ALL = sum(RESTRICTIONS.values())
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_FIRST_PROCESS = 1
_libc = ctypes.CDLL(None, use_errno=True)


def dumped(images: Path) -> dict[str, int]:
    """Mount point -> MS_ flags of its restrictions: what the first process saw at the dump.  Of
    several mounts on one point it is the last, which covers the others.  OSError, Malformed."""
    ids = criu.only("ids", (images / f"ids-{_FIRST_PROCESS}.img").read_bytes())
    number = ids.number32(criu.NAMESPACES["mount"])
    data = (images / f"mountpoints-{number}.img").read_bytes()
    return _topmost(list(criu.entries("mountpoints", data)))


def _topmost(entries: list[Message]) -> dict[str, int]:
    found: dict[str, int] = {}
    on: dict[str, list[Message]] = {}
    for entry in entries:
        point = "/" + (entry.text(Mount.POINT) or "").removeprefix(".").lstrip("/")
        on.setdefault(point, []).append(entry)
    for point, several in on.items():
        under = {e.number32(Mount.PARENT) for e in several} if len(several) > 1 else set()
        top = next((e for e in several if e.number32(Mount.ID) not in under), several[-1])
        found[point] = (top.number32(Mount.FLAGS) or 0) & _ALL
    return found


def mounted(pid: int) -> dict[str, int]:
    """The same, of what that process sees now.  OSError."""
    return {
        entry.point: sum(RESTRICTIONS.get(o, 0) for o in entry.own_options)
        for entry in mount_table.read(Path(f"/proc/{pid}/mountinfo"))
    }


def lacking(wanted: Mapping[str, int], there: Mapping[str, int]) -> dict[str, int]:
    """Mount point -> the flags that it lacks; -1 when nothing is mounted there."""
    return {
        point: -1 if point not in there else flags & ~there[point]
        for point, flags in wanted.items()
        if point not in there or flags & ~there[point]
    }


def check(images: Path, pid: int) -> None:
    """Restrict the mounts of the container whose first process that is, as they were at the dump.
    It must not run yet.  MigrateError(7) when that fails."""
    try:
        wanted = dumped(images)
        there = mounted(pid)
        wrong = lacking(wanted, there)
        if any(flags > 0 for flags in wrong.values()):
            _restrict(pid, {p: there[p] | f for p, f in wrong.items() if f > 0})
            wrong = lacking(wanted, mounted(pid))
    except (OSError, Malformed) as e:
        raise MigrateError(
            VzExitCode.RESTORE_FAILED,
            f"cannot compare the restored mounts with those of the dump: {e}; the container is "
            "not restored",
        ) from e
    if wrong:
        raise MigrateError(
            VzExitCode.RESTORE_FAILED,
            f"CRIU has not restored the container's mounts as they were: {described(wrong)}; the "
            "container is not restored",
        )


def described(wrong: Mapping[str, int]) -> str:
    """What `lacking` has found, in words."""
    said = []
    for point, flags in sorted(wrong.items()):
        names = [name for name, flag in RESTRICTIONS.items() if flags & flag]
        lost = "nothing is mounted on it" if flags < 0 else f"it is not {', '.join(names)}"
        said.append(f"{point[:80]!r} ({lost})")
    return ", ".join(said[:5]) + (f" and {len(said) - 5} more" if len(said) > 5 else "")


def _restrict(pid: int, flags: Mapping[str, int]) -> None:
    """Set the flags of these mounts in the mount namespace of that process.  OSError.

    No program is started in there, because it would be the container's.  A thread that shares no
    current folder with the others may enter the namespace (setns(2)), and then ends."""
    failed: list[OSError] = []

    def enter() -> None:
        try:
            with open(f"/proc/{pid}/ns/mnt", "rb") as namespace:
                _check(_libc.unshare(_CLONE_FS), "unshare")
                _check(_libc.setns(namespace.fileno(), _CLONE_NEWNS), "setns")
            for point, all_of_it in flags.items():
                kernel.remount(point, all_of_it)
        except OSError as e:
            failed.append(e)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
