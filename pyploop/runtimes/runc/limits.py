# SPDX-License-Identifier: Apache-2.0
"""Limits of the container's processes (setrlimit).  Without CAP_SYS_RESOURCE root can neither
read those of other users' processes, as CRIU does, nor set higher ones than its own: a restore
would set its own instead, without an error."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.runc import members
from pyploop.system import sysblock

NAMES = {
    "Max cpu time": "CPU",
    "Max file size": "FSIZE",
    "Max data size": "DATA",
    "Max stack size": "STACK",
    "Max core file size": "CORE",
    "Max resident set": "RSS",
    "Max processes": "NPROC",
    "Max open files": "NOFILE",
    "Max locked memory": "MEMLOCK",
    "Max address space": "AS",
    "Max pending signals": "SIGPENDING",
    "Max msgqueue size": "MSGQUEUE",
    "Max nice priority": "NICE",
    "Max realtime priority": "RTPRIO",
    "Max realtime timeout": "RTTIME",
}
"""As /proc/PID/limits has them -> as setrlimit(2) has them, after RLIMIT_."""
_SYS_RESOURCE = 24  # linux/capability.h
UNLIMITED = -1


def check_readable(pids: Sequence[int]) -> None:
    """MigrateError(8) when CRIU cannot ask for the limits of a process."""
    for pid in pids:
        try:
            resource.prlimit(pid, resource.RLIMIT_CPU)
        except PermissionError as e:
            raise MigrateError(
                VzExitCode.DUMP_FAILED,
                f"root of this host may not read the limits of process {members.named([pid])}, "
                "which is another user's: CRIU cannot dump it",
                hint="give root of this host the capability CAP_SYS_RESOURCE, or run the program "
                "as root in the container, or migrate without --live",
            ) from e
        except OSError:
            continue  # it has ended


def highest(pids: Sequence[int], proc: str = "/proc") -> dict[str, int]:
    """Name in NAMES -> the highest hard limit of a process; -1: unlimited."""
    found: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"{proc}/{pid}/limits").read_text().splitlines()[1:]:
                name = NAMES.get(line[:25].strip(), "")
                if name:
                    word = line[47:].split()[0]
                    value = UNLIMITED if word == "unlimited" else int(word)
                    found[name] = _higher(value, found.get(name, value))
    return found


def _higher(a: int, b: int) -> int:
    return UNLIMITED if UNLIMITED in (a, b) else max(a, b)


def check(theirs: Mapping[str, Any], may_raise: bool | None = None) -> None:
    """MigrateError(15) when a restore on this host would lower a limit.  theirs: as of
    `highest`.  may_raise: root can set higher limits than its own; None: ask the kernel."""
    if may_raise is None:
        may_raise = sysblock.has_capability(_SYS_RESOURCE)
    if may_raise:
        return
    low = []
    for name in NAMES.values():
        wanted = theirs.get(name)
        if isinstance(wanted, int):
            ours = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
            if _higher(ours, wanted) != ours:
                low.append(f"{name.lower()} (here {_word(ours)}, there {_word(wanted)})")
    if low:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            "root of this host lacks CAP_SYS_RESOURCE, and would lower limits of the container's "
            f"processes: {', '.join(low)}",
            hint="raise the limits of ssh's sessions on this host (/etc/security/limits.conf), or "
            "give its root the capability",
        )


def _word(limit: int) -> str:
    return "unlimited" if limit == UNLIMITED else str(limit)
