# SPDX-License-Identifier: Apache-2.0
"""What of a running runc container neither runc nor CRIU (4.2) brings to the target,
without failing: said before the migration starts (docs/internals/safety.md).
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyploop.runtimes.runc import members, sockets
from pyploop.system import kernel

OURS = "org.criu.config"
"""Written anew on each host."""
NO_LIMIT = 1 << 62
"""A memory limit of v1 that is larger limits nothing."""


class Limit(NamedTuple):
    """A file of a cgroup, and where config.json says what it holds."""

    controller: str
    v1: str
    v2: str
    words: tuple[str, str]
    """Of linux.resources."""
    unlimited: tuple[str, ...]
    """What it holds when nobody has set it."""


LIMITS = (
    Limit("memory", "memory.limit_in_bytes", "memory.max", ("memory", "limit"), ("max",)),
    Limit("memory", "memory.soft_limit_in_bytes", "memory.low", ("memory", "reservation"), ("0",)),
    Limit("pids", "pids.max", "pids.max", ("pids", "limit"), ("max",)),
    Limit("cpu", "cpu.cfs_quota_us", "cpu.max", ("cpu", "quota"), ("-1", "max")),
    Limit("cpu", "cpu.shares", "", ("cpu", "shares"), ("1024",)),
    Limit("cpuset", "cpuset.cpus", "cpuset.cpus", ("cpu", "cpus"), ("",)),
    Limit("cpuset", "cpuset.mems", "cpuset.mems", ("cpu", "mems"), ("",)),
)


def changed_limits(config: Mapping[str, Any], cgroups: Mapping[str, str]) -> list[str]:
    """Limits that are others than config.json's, which the target goes by: set by
    `runc update`, or in the cgroup itself.  cgroups: controller -> folder, '' of v2."""
    resources = (config.get("linux") or {}).get("resources") or {}
    found = []
    for limit in LIMITS:
        v1 = limit.controller in cgroups
        name = limit.v1 if v1 else limit.v2
        folder = Path(cgroups.get(limit.controller) or cgroups.get("") or "/nonexistent")
        value = _first(folder / name) if name else None
        if value is None:  # the controller is not there
            continue
        group, key = limit.words
        wanted = (resources.get(group) or {}).get(key)
        if wanted in (None, 0, -1, ""):
            same = value in limit.unlimited or _unlimited(value)
            # v1 copies the cpuset above.
            same = same or (limit.controller == "cpuset" and value == _first(folder.parent / name))
        else:
            same = _same(value, wanted)
        if not same:
            said = "nothing" if wanted is None else wanted
            found.append(f"{name} is {value}, and config.json has {said}: the target goes by that")
    return found


def _first(path: Path) -> str | None:
    """The first word of a cgroup's file, '' of an empty one."""
    try:
        return (path.read_text().split() or [""])[0]
    except OSError:
        return None


def allowed_cpus(cgroups: Mapping[str, str]) -> str:
    """Those that the container's cgroup may use."""
    for key, name in (("cpuset", "cpuset.effective_cpus"), ("", "cpuset.cpus.effective")):
        if key in cgroups and (text := _first(Path(cgroups[key]) / name)):
            return text
    return _first(Path("/sys/devices/system/cpu/online")) or ""


def _unlimited(value: str) -> bool:
    return value.isdecimal() and int(value) >= NO_LIMIT


def _same(value: str, wanted: object) -> bool:
    if isinstance(wanted, int) and value.isdecimal():
        page = os.sysconf("SC_PAGESIZE")  # a limit in bytes is rounded down
        return int(value) in (wanted, wanted // page * page)
    return cpus_of(value) == cpus_of(str(wanted))


MOST_CPUS = 1 << 16
"""Linux has 8192 at most.  A range is a number for each, and may be a peer's."""


def cpus_of(text: str) -> set[int] | str:
    """Of a list such as 0-2,4; other texts as they are."""
    found: set[int] = set()
    try:
        for part in text.strip().split(","):
            first, _, last = part.partition("-")
            if int(last or first) >= MOST_CPUS:
                raise ValueError
            found.update(range(int(first), int(last or first) + 1))
    except ValueError:
        return text.strip()
    return found


# ---- processes


def settings(pids: Sequence[int], cpus: str, proc: str = "/proc") -> list[str]:
    """What a process has set for itself, or others for it, and CRIU does not dump.
    cpus: those that the container may use."""
    found: dict[str, list[int]] = {}
    usual = _settings_of(os.getpid(), os.getpid(), "/proc")
    for pid, tid in _threads(pids, proc):
        mine = _settings_of(pid, tid, proc)
        if cpus_of(own := mine.pop("cpus", cpus)) != cpus_of(cpus):
            found.setdefault(f"the CPUs ({own} of {cpus})", []).append(tid)
        for name, value in mine.items():
            if value != _USUAL.get(name, usual.get(name, "")):
                found.setdefault(f"{name} ({value})", []).append(pid)
    return [f"{what} of process {members.named(sorted(set(p)), proc)}" for what, p in found.items()]


_USUAL = {
    "the I/O priority": "0",
    "the timer slack": "50000",
    "the memory policy": "default",
    "the personality": "00000000",
    "the priority of the autogroup": "0",
}


def _threads(pids: Sequence[int], proc: str) -> Iterator[tuple[int, int]]:
    for pid in pids:
        with contextlib.suppress(OSError):
            yield from ((pid, int(name)) for name in os.listdir(f"{proc}/{pid}/task"))


def _settings_of(pid: int, tid: int, proc: str) -> dict[str, str]:
    folder, found = f"{proc}/{pid}/task/{tid}", {}
    for line in _text(f"{folder}/status").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            found["cpus"] = line.split()[1]
    if proc == "/proc":
        with contextlib.suppress(OSError):
            found["the I/O priority"] = str(kernel.io_priority(tid))
    if text := _text(f"{proc}/{tid}/timerslack_ns").strip():
        found["the timer slack"] = text
    if tid == pid:
        if words := _text(f"{proc}/{pid}/numa_maps", 256).split("\n")[0].split():
            found["the memory policy"] = words[1]
        if text := _text(f"{proc}/{pid}/coredump_filter").strip():
            found["the filter of core dumps"] = text
        if text := _text(f"{proc}/{pid}/personality").strip():
            found["the personality"] = text
        if words := _text(f"{proc}/{pid}/autogroup").split():
            found["the priority of the autogroup"] = words[-1]
    return found


def _text(path: str, most: int = 1 << 14) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, most).decode(errors="replace")
        finally:
            os.close(fd)
    except OSError:
        return ""


def pipes_to_outside(pids: Sequence[int], proc: str = "/proc") -> list[str]:
    """Pipes of which the container has one end only."""
    ends: dict[str, int] = {}
    users: dict[str, tuple[int, str]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"{proc}/{pid}/fd"):
                path = f"{proc}/{pid}/fd/{name}"
                target = os.readlink(path)
                if target.startswith("pipe:"):
                    mode = os.lstat(path).st_mode
                    ends[target] = ends.get(target, 0) | (mode & (stat.S_IRUSR | stat.S_IWUSR))
                    users.setdefault(target, (pid, name))
    return [
        f"descriptor {users[pipe][1]} of process {members.named([users[pipe][0]], proc)}, a pipe "
        "whose other end is not in the container: there it leads nowhere"
        for pipe, both in ends.items()
        if both in (stat.S_IRUSR, stat.S_IWUSR)
    ]


Watcher = tuple[int, int]
"""A process, and its descriptor that is an inotify."""


def watchers(pids: Sequence[int], proc: str = "/proc") -> list[Watcher]:
    """Of all these processes."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"{proc}/{pid}/fd"):
                if os.readlink(f"{proc}/{pid}/fd/{name}") == "anon_inode:inotify":
                    found.append((pid, int(name)))
    return found


def waiting(init: int, known: Sequence[Watcher]) -> list[str]:
    """Of the suspended container: what waits to be read, and CRIU does not dump.  Some
    microseconds for each watcher and UDP socket."""
    events = [pid for pid, fd in known if _readable(pid, fd)]
    found = [f"events that wait for process {members.named(events)} (inotify)"] if events else []
    sockets = sum(_unread(f"/proc/{init}/net/{name}") for name in ("udp", "udp6"))
    if sockets and _namespace(init) != _namespace(os.getpid()):
        found.append(f"datagrams that wait in UDP sockets ({sockets} of them)")
    return [f"Does not move: {text}" for text in found]


def _namespace(pid: int) -> str:
    """Of the network."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return ""


def _readable(pid: int, fd: int) -> bool:
    """Whether something waits in another process's descriptor."""
    try:
        pidfd = os.pidfd_open(pid)
        try:
            taken = kernel.take_descriptor(pidfd, fd)
        finally:
            os.close(pidfd)
    except OSError:  # closed since
        return False
    try:
        poll = select.poll()
        poll.register(taken, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(taken)


def _unread(path: str) -> int:
    """Sockets of a table of /proc/net that have bytes in their receive queue."""
    try:
        lines = Path(path).read_text().splitlines()[1:]
    except OSError:
        return 0
    return sum(int(line.split()[4].partition(":")[2], 16) > 0 for line in lines)


def keys(container: str, path: str = "/proc/keys") -> list[str]:
    """Of the session keyring that runc makes for it."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        name, _, number = line.partition(" _ses.")[2].partition(": ")
        if name == container and number.strip() not in ("", "empty"):
            return [f"{number.strip()} keys of its session keyring (keyctl)"]
    return []


def all_of(
    container: str, pids: Sequence[int], config: Mapping[str, Any], cgroups: Mapping[str, str]
) -> list[str]:
    """Of a running container.  In words, each a line for the user."""
    lost = [*settings(pids, allowed_cpus(cgroups)), *pipes_to_outside(pids), *keys(container)]
    lost += [*sockets.settings(pids), *(sockets.groups(pids[0]) if pids else ())]
    return [f"Does not move: {text}" for text in lost + changed_limits(config, cgroups)]


def annotations_of(config: Mapping[str, Any]) -> list[str]:
    """The same of those of config.json, which programs of a host obey (CRIU one): no
    target takes them over."""
    names = sorted({*(config.get("annotations") or {})} - {OURS})
    return [f"Does not move: the annotations {', '.join(names)} of config.json"] if names else []
