# SPDX-License-Identifier: Apache-2.0
"""Which processes are a container's: its first process and those that descend
from it.  Only they are dumped; only those in its cgroup are suspended.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode


@dataclass(frozen=True)
class Process:
    """As /proc shows it at one moment."""

    parent: int
    state: str
    """One letter: Z is a zombie."""


def look_at(pids: Iterable[int], proc: str = "/proc") -> dict[int, Process]:
    """Those that are still there.  Some ten microseconds each."""
    found = {}
    for pid in pids:
        try:
            fd = os.open(f"{proc}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.read(fd, 1024)
            finally:
                os.close(fd)
            # The name may hold anything, also a ")".
            state, parent = data[data.rindex(b")") + 2 :].split(b" ", 2)[:2]
            found[pid] = Process(int(parent), state.decode())
        except (OSError, ValueError):
            continue
    return found


def descendants(init: int, among: Mapping[int, Process]) -> set[int]:
    """The first process and all below it."""
    known = {init: True}
    for pid in among:
        way = []
        at: int = pid
        while at not in known and at in among:
            way.append(at)
            known[at] = False  # there is no circle, but pids are used again
            at = among[at].parent
        ours = known.get(at, False)
        known.update(dict.fromkeys(way, ours))
    return {pid for pid, ours in known.items() if ours}


def strangers(init: int, members: Sequence[int], proc: str = "/proc") -> list[int]:
    """Processes of the cgroup that do not descend from the first one, as those of
    `runc exec`; a parent is in the cgroup, too."""
    seen = look_at(members, proc)
    ours = descendants(init, seen)
    lost = [p for p in seen if p not in ours and seen[p].state not in "ZX"]
    if not lost:
        return []
    # Its parent has left the cgroup, or ended a moment ago.
    seen = look_at(everybody(proc), proc)
    ours = descendants(init, seen)
    return [p for p in lost if p in seen and p not in ours and seen[p].state not in "ZX"]


@dataclass(frozen=True)
class Survey:
    """Who is in the container, and who should be."""

    strangers: list[int]
    """In its cgroup, and not descended from its first process: they would end without
    a word."""
    outside: list[int]
    """Descended from it, or in its namespace of processes, and not in its cgroup: they
    would not be suspended."""


def survey(init: int, members: Sequence[int], proc: str = "/proc") -> Survey:
    """Of all processes; milliseconds."""
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
    """Processes in the first process's namespace of processes, unless that is ours."""
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
    """For a message: `12 (sh -c …), 13 (cat)`, ten at most."""
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
    """Processes would be lost."""


def _survey_twice(init: int, members: Callable[[], Sequence[int]]) -> Survey:
    """What two looks in a row agree upon: a process that began, or ended, between the
    cgroup's list and /proc's is in one of them only."""
    first = survey(init, members())
    if not first.strangers and not first.outside:
        return first
    second = survey(init, members())
    return Survey(
        sorted({*first.strangers} & {*second.strangers}),
        sorted({*first.outside} & {*second.outside}),
    )


def check(container: str, init: int, members: Callable[[], Sequence[int]], drop: bool) -> list[str]:
    """Before anything starts: MigrateError(8) when processes would be lost, or would
    not be suspended.  members: of its cgroup, now.  drop: the first may be lost; then
    they are returned in words."""
    found = _survey_twice(init, members)
    if found.outside:
        raise MigrateError(
            VzExitCode.DUMP_FAILED,
            f"processes of {container} are in another cgroup, and would not be suspended: "
            f"{named(found.outside)}; move them back (cgroup.procs), or end them",
        )
    if found.strangers and drop:
        names = named(found.strangers)
        return [f"Not started by its first process, and dropped (--drop-exec): {names}"]
    _refuse(container, found.strangers)
    return []


def check_suspended(container: str, init: int, members: Sequence[int]) -> None:
    """The first half of it again."""
    _refuse(container, strangers(init, members))


def _refuse(container: str, lost: Sequence[int]) -> None:
    if lost:
        raise LostProcessError(
            VzExitCode.DUMP_FAILED,
            f"processes in {container} that its first process has not started, as by `runc exec`, "
            f"cannot be moved: {named(lost)}; end them, or let them be dropped with --drop-exec",
        )


_STOPS = ("do_signal_stop", "get_signal")
"""The kernel's function (the first may be part of the second) in which a stopped process
is frozen: with the freezer of v1 it looks like any other then."""

_VFORKS = ("wait_for_vfork_done", "kernel_clone", "_do_fork")


def held(pid: int) -> str:
    """'stopped' or 'traced' when a signal or a debugger holds the process, frozen or not."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return ""
    lines = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    if lines.get("TracerPid", "0") != "0":
        return f"traced by process {lines['TracerPid']}"
    state = lines.get("State", "")
    stopped = state.startswith("T") or (state.startswith("D") and _sleeps_in(pid) in _STOPS)
    return "stopped (SIGCONT lets it go on)" if stopped else ""


def awaits_vfork(pid: int) -> bool:
    """Its child, made by vfork(2), has yet to run another program, or to end."""
    return _sleeps_in(pid) in _VFORKS


def _sleeps_in(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return ""
