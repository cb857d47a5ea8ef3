# SPDX-License-Identifier: Apache-2.0
"""What the kernel of the target must have for a restore: the cgroups, the LSM's profiles and
the actions of seccomp that the source uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.system import mount_table

_PROFILES = "/sys/kernel/security/apparmor/profiles"
_ACTIONS = "/proc/sys/kernel/seccomp/actions_avail"
_ACTION_NAMES = {
    "SCMP_ACT_KILL": "kill_thread",
    "SCMP_ACT_KILL_THREAD": "kill_thread",
    "SCMP_ACT_KILL_PROCESS": "kill_process",
    "SCMP_ACT_TRAP": "trap",
    "SCMP_ACT_ERRNO": "errno",
    "SCMP_ACT_TRACE": "trace",
    "SCMP_ACT_LOG": "log",
    "SCMP_ACT_ALLOW": "allow",
    "SCMP_ACT_NOTIFY": "user_notif",
}
V2 = ""
"""The name of cgroup v2 among the controllers, as runc has it."""


# ---- on the source


def controllers(cgroups: Iterable[str]) -> list[str]:
    """cgroups: controllers of the container, as runc has them.  V2 alone, or those of v1."""
    return sorted(c for c in cgroups if c != V2) or [V2]


def labels(pids: Sequence[int], proc: str = "/proc") -> list[str]:
    """The AppArmor profiles of the processes, without those that are not confined."""
    found = set()
    for pid in pids:
        for name in ("attr/apparmor/current", "attr/current"):
            with contextlib.suppress(OSError):
                text = Path(f"{proc}/{pid}/{name}").read_text().strip("\0\n ")
                label = text.removesuffix(" (enforce)").removesuffix(" (complain)")
                if label and label != "unconfined" and "(unconfined)" not in label:
                    found.add(label)
                break
    return sorted(found)


def filtered(pids: Sequence[int], proc: str = "/proc") -> bool:
    """Whether a process has a seccomp filter."""
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"{proc}/{pid}/status").read_text(errors="replace")
            if "\nSeccomp:\t2" in text:
                return True
    return False


# ---- on the target


def check_cgroups(theirs: Iterable[Any]) -> None:
    """MigrateError(14).  theirs: the controllers of the container on the source."""
    ours = {V2} if _only_v2() else _controllers()
    missing = sorted(str(c) for c in {*theirs} - ours)
    if V2 in ours and missing:
        text = "this host has cgroup v2, and the container uses v1 on the source"
    elif V2 in missing:
        text = "this host has cgroup v1, and the container uses v2 on the source"
    elif missing:
        text = f"this host has not mounted the cgroup controllers {', '.join(missing)}"
    else:
        return
    raise MigrateError(
        VzExitCode.NO_KERNEL,
        f"{text}: CRIU cannot restore its cgroups",
        hint="start this host with the same cgroups (systemd.unified_cgroup_hierarchy=0 or 1), or "
        "migrate without --live",
    )


def _only_v2() -> bool:
    at = mount_table.at("/sys/fs/cgroup")
    return at is not None and at.fstype == "cgroup2"


def _controllers() -> set[str]:
    found: set[str] = set()
    for point, names in mount_table.cgroup_mounts():
        seen = mount_table.at(point)  # another mount may hide it
        if names and seen is not None and seen.option_list == names:
            found.update(names)
    return found


def check_labels(theirs: Iterable[Any], profiles: str = _PROFILES) -> None:
    """MigrateError(14).  theirs: as of `labels`."""
    wanted = {str(label) for label in theirs}
    try:
        loaded = {line.rpartition(" (")[0] for line in Path(profiles).read_text().splitlines()}
    except OSError:
        loaded = set()
    # A stacked label is `one//&other`.
    if missing := sorted(w for w in wanted if not {*w.split("//&")} <= loaded):
        where = "has not loaded" if os.path.exists(profiles) else "has no AppArmor for"
        raise MigrateError(
            VzExitCode.NO_KERNEL,
            f"this host {where} the AppArmor profile {', '.join(missing)[:200]} of the container's "
            "processes",
            hint="copy it from /etc/apparmor.d of the source, and load it with apparmor_parser",
        )


def check_seccomp(config: Mapping[str, Any], used: bool, actions: str = _ACTIONS) -> None:
    """MigrateError(14).  used: a process has a filter."""
    try:
        there = {*Path(actions).read_text().split()}
    except OSError:
        there = set()
    seccomp = (config.get("linux") or {}).get("seccomp") or {}
    rules = seccomp.get("syscalls") or ()
    names = [seccomp.get("defaultAction"), *(r.get("action") for r in rules)]
    wanted = {_ACTION_NAMES[n] for n in names if n in _ACTION_NAMES} if used else set()
    if used and not there:
        wanted = wanted or {"filters"}
    if missing := sorted(wanted - there):
        raise MigrateError(
            VzExitCode.NO_KERNEL,
            f"the kernel of this host has no seccomp {', '.join(missing)}, which the container "
            "uses",
            hint="use a kernel that has it, or migrate without --live",
        )
