# SPDX-License-Identifier: Apache-2.0
"""Which processes belong to a container: its first process and all descendants of that.
Only these are dumped, and only those in its cgroup are suspended.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode


@dataclass(frozen=True)
class Process:
    """What /proc showed of a process."""

    parent: int
    state: str
    """One letter: Z is a zombie."""


def look_at(pids: Iterable[int], proc: str = "/proc") -> dict[int, Process]:
    """The processes that still exist, by pid.  Some ten microseconds for each."""
    found = {}
    for pid in pids:
        try:
            fd = os.open(f"{proc}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.read(fd, 1024)
            finally:
                os.close(fd)
            # The process's name may have any characters, also a ")".
            state, parent = data[data.rindex(b")") + 2 :].split(b" ", 2)[:2]
            found[pid] = Process(int(parent), state.decode())
        except (OSError, ValueError):
            continue
    return found


def descendants(init: int, among: Mapping[int, Process]) -> set[int]:
    """The first process (init) and all its descendants."""
    known = {init: True}
    for pid in among:
        way = []
        at: int = pid
        while at not in known and at in among:
            way.append(at)
            known[at] = False  # ends a circle: a pid may have been used again
            at = among[at].parent
        ours = known.get(at, False)
        known.update(dict.fromkeys(way, ours))
    return {pid for pid, ours in known.items() if ours}


def strangers(init: int, members: Sequence[int], proc: str = "/proc") -> list[int]:
    """Processes of the cgroup (members) that do not descend from the first process, such as
    those of `runc exec`."""
    seen = look_at(members, proc)
    ours = descendants(init, seen)
    lost = [p for p in seen if p not in ours and seen[p].state not in "ZX"]
    if not lost:
        return []
    # A parent may be outside the cgroup, or have ended a moment ago: look at all processes.
    seen = look_at(everybody(proc), proc)
    ours = descendants(init, seen)
    return [p for p in lost if p in seen and p not in ours and seen[p].state not in "ZX"]


def dumped(init: int, members: Sequence[int]) -> list[int]:
    """Those of the cgroup's processes that a dump has, the first one first.  CRIU leaves out
    those of `runc exec`."""
    lost = {*strangers(init, members)}
    return [init, *(p for p in members if p != init and p not in lost)]


@dataclass(frozen=True)
class Survey:
    """Processes that are in the container's cgroup, or its tree, but not in both."""

    strangers: list[int]
    """In its cgroup, but not descended from its first process.  They would be lost."""
    outside: list[int]
    """Descended from its first process, or in its pid namespace, but not in its cgroup.
    They would not be suspended."""


def survey(init: int, members: Sequence[int], proc: str = "/proc") -> Survey:
    """Compare the cgroup's members with all processes of the host.  Takes milliseconds."""
    seen = look_at(everybody(proc), proc)
    ours = descendants(init, seen)
    alive = {p for p, process in seen.items() if process.state not in "ZX"}
    return Survey(
        sorted((set(members) & alive) - ours),
        sorted((ours | _same_namespace(init, seen, proc)) & alive - set(members)),
    )


def everybody(proc: str = "/proc") -> list[int]:
    return [int(name) for name in os.listdir(proc) if name.isdecimal()]


def _same_namespace(init: int, pids: Iterable[int], proc: str) -> set[int]:
    """Processes in the first process's pid namespace, unless that is this process's own."""
    wanted = _namespace(init, proc)
    if wanted is None or wanted == _namespace(os.getpid(), proc):
        return set()
    return {pid for pid in pids if _namespace(pid, proc) == wanted}


def _namespace(pid: int, proc: str) -> str | None:
    try:
        return os.readlink(f"{proc}/{pid}/ns/pid")
    except OSError:
        return None


def named(pids: Sequence[int], proc: str = "/proc") -> str:
    """For a message: `12 (sh -c …), 13 (cat)`, with ten processes at most."""
    names = [f"{pid} ({_command(pid, proc)})" for pid in pids[:10]]
    return ", ".join(names) + (f" and {len(pids) - 10} more" if len(pids) > 10 else "")


def _command(pid: int, proc: str) -> str:
    for file in ("cmdline", "comm"):
        try:
            with open(f"{proc}/{pid}/{file}", "rb") as f:
                words = f.read(200).replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if words:
            return words[:60]
    return "?"


# ---- checks


class LostProcessError(MigrateError):
    """Some processes would be lost."""


def _survey_twice(init: int, members: Callable[[], Sequence[int]]) -> Survey:
    """What two surveys in a row agree on.  A process that starts or ends between the reading
    of the cgroup and that of /proc is in one of them only."""
    first = survey(init, members())
    if not first.strangers and not first.outside:
        return first
    second = survey(init, members())
    return Survey(
        sorted({*first.strangers} & {*second.strangers}),
        sorted({*first.outside} & {*second.outside}),
    )


def check(container: str, init: int, members: Callable[[], Sequence[int]], drop: bool) -> list[str]:
    """Before anything starts: MigrateError(8) when processes would be lost, or would not be
    suspended.  members: reads the cgroup.  drop: processes may be lost; the returned
    lines name them."""
    found = _survey_twice(init, members)
    if found.outside:
        raise MigrateError(
            VzExitCode.DUMP_FAILED,
            f"processes of {container} are in another cgroup, and would not be suspended: "
            f"{named(found.outside)}; move them back (write to cgroup.procs), or end them",
        )
    if found.strangers and drop:
        names = named(found.strangers)
        return [f"Not started by its first process, and dropped (--drop-exec): {names}"]
    _refuse(container, found.strangers)
    return []


def check_suspended(container: str, init: int, members: Sequence[int]) -> None:
    """Check again that no process would be lost, now that the container is suspended."""
    _refuse(container, strangers(init, members))


def _refuse(container: str, lost: Sequence[int]) -> None:
    if lost:
        raise LostProcessError(
            VzExitCode.DUMP_FAILED,
            f"processes in {container} that were not started by its first process, but for example "
            f"by `runc exec`, cannot be migrated: {named(lost)}; end them, or use --drop-exec, "
            "with which they end during the migration",
        )


_STOPS = ("do_signal_stop", "get_signal")
"""The kernel's function in which a stopped process is frozen (the first may be compiled
into the second).  The freezer of v1 gives it the same state as any other process."""

_VFORKS = ("wait_for_vfork_done", "kernel_clone", "_do_fork")


def stopped_or_traced(pid: int) -> str:
    """For a message: `stopped …` by a signal or `traced …` by a debugger, frozen or not;
    empty for any other process."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return ""
    lines = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    if lines.get("TracerPid", "0") != "0":
        return f"traced by process {lines['TracerPid']} (end that process)"
    state = lines.get("State", "")
    stopped = state.startswith("T") or (state.startswith("D") and _sleeps_in(pid) in _STOPS)
    return f"stopped (run kill -CONT {pid})" if stopped else ""


def awaits_vfork(pid: int) -> bool:
    """Whether it waits in vfork(2): its child has not run another program yet, nor ended."""
    return _sleeps_in(pid) in _VFORKS


def _sleeps_in(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return ""
