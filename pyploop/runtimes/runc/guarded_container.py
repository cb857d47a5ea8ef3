# SPDX-License-Identifier: Apache-2.0
"""The container whose memory is loaded while it runs, as its guard sees it (lazy_guard.py): by
runc's record of it, which is there as long as the container."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from typing import Any

ENDING_SECONDS = 30.0
"""For the container's processes to end."""


def record_of(state: str) -> dict[str, Any]:
    """runc's record of the container; empty when there is none."""
    with contextlib.suppress(OSError, ValueError), open(state) as f:
        return dict(json.load(f))
    return {}


def cgroup_of(state: str) -> str:
    """The container's, in the hierarchy that freezes it; '' when there is no container."""
    paths = record_of(state).get("cgroup_paths") or {}
    return str(paths.get("freezer") or paths.get("") or "")


def life_of(state: str) -> tuple[int, int] | None:
    """Its first process, and when that was started; None when there is no container."""
    found = record_of(state)
    if "init_process_pid" not in found:
        return None
    return found["init_process_pid"], found.get("init_process_start", 0)


def end_container(state: str) -> bool:
    """End each of its processes, frozen or not.  False when some stay."""
    deadline = time.monotonic() + ENDING_SECONDS
    while pids := processes_in(folder := cgroup_of(state)):
        if time.monotonic() > deadline:
            return False
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # v1 delivers signals to what is frozen only when it is thawed.
        with contextlib.suppress(OSError), open(f"{folder}/freezer.state", "r+") as f:
            f.write("THAWED")
        time.sleep(0.005)
    return True


def processes_in(folder: str) -> list[int]:
    """Of a cgroup, with those below it; without those that have ended and are waited for."""
    found: list[int] = []
    for inner, _, _ in os.walk(folder) if folder else ():
        with contextlib.suppress(OSError), open(f"{inner}/cgroup.procs") as f:
            found += [int(line) for line in f]
    return [pid for pid in found if pid and not ended(pid)]


def ended(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as f:
        return f.read().rpartition(b")")[2].split()[0] in b"ZX"
    return True
