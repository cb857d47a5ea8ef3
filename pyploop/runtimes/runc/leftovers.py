# SPDX-License-Identifier: Apache-2.0
"""What neither runc nor CRIU (4.2) brings to the target, though nothing fails.  The user is
told before the migration starts (docs/internals/safety.md).
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
"""The annotation that pyploop writes anew on each host."""
NO_LIMIT = 1 << 62
"""Bytes.  A memory limit of v1 above this is no limit."""


class Limit(NamedTuple):
    """A file of a cgroup, and the key of config.json for its value."""

    controller: str
    v1: str
    v2: str
    key: tuple[str, str]
    """(table, key) in linux.resources of config.json."""
    unlimited: tuple[str, ...]
    """Its values when no limit is set."""


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
    """Limits that differ from those of config.json, which the target uses.  They were set by
    `runc update`, or in the cgroup.  cgroups: controller -> folder; '' is that of v2."""
    resources = (config.get("linux") or {}).get("resources") or {}
    found = []
    for limit in LIMITS:
        v1 = limit.controller in cgroups
        name = limit.v1 if v1 else limit.v2
        folder = Path(cgroups.get(limit.controller) or cgroups.get("") or "/nonexistent")
        value = _first(folder / name) if name else None
        if value is None:  # the controller is not there
            continue
        group, key = limit.key
        wanted = (resources.get(group) or {}).get(key)
        if wanted in (None, 0, -1, ""):
            same = value in limit.unlimited or _unlimited(value)
            # v1 copies the cpuset of the cgroup above.
            same = same or (limit.controller == "cpuset" and value == _first(folder.parent / name))
        else:
            same = _same(value, wanted)
        if not same:
            there = "no limit" if wanted is None else wanted
            found.append(f"{name} is {value}, but config.json has {there}, which the target uses")
    return found


def _first(path: Path) -> str | None:
    """The first word of a cgroup's file; '' for an empty one, None when it is missing."""
    try:
        return (path.read_text().split() or [""])[0]
    except OSError:
        return None


def allowed_cpus(cgroups: Mapping[str, str]) -> str:
    """The CPUs that the container's cgroup may use, as a list such as 0-3."""
    for key, name in (("cpuset", "cpuset.effective_cpus"), ("", "cpuset.cpus.effective")):
        if key in cgroups and (text := _first(Path(cgroups[key]) / name)):
            return text
    return _first(Path("/sys/devices/system/cpu/online")) or ""


def _unlimited(value: str) -> bool:
    return value.isdecimal() and int(value) >= NO_LIMIT


def _same(value: str, wanted: object) -> bool:
    if isinstance(wanted, int) and value.isdecimal():
        page = os.sysconf("SC_PAGESIZE")  # the kernel rounds a limit in bytes down
        return int(value) in (wanted, wanted // page * page)
    return cpus_of(value) == cpus_of(str(wanted))


MOST_CPUS = 1 << 16
"""Linux supports 8192 at most.  A range may come from a peer, and each of its numbers takes
memory here."""


def cpus_of(text: str) -> set[int] | str:
    """The numbers of a list such as 0-2,4; any other text as it is."""
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
    """Settings of the processes that CRIU does not dump.  cpus: those that the container may
    use."""
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


def pipes_to_outside(
    pids: Sequence[int], proc: str = "/proc", known: Sequence[str] = ()
) -> list[str]:
    """Pipes of which only one end is in the container.  known: those that lead somewhere on the
    target, too."""
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
        "whose other end is not in the container: on the target it leads nowhere"
        for pipe, both in ends.items()
        if both in (stat.S_IRUSR, stat.S_IWUSR) and pipe not in known
    ]


Watcher = tuple[int, int]
"""(pid, number of a descriptor that is an inotify)."""


def watchers(pids: Sequence[int], proc: str = "/proc") -> list[Watcher]:
    """The inotify descriptors of all these processes."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"{proc}/{pid}/fd"):
                if os.readlink(f"{proc}/{pid}/fd/{name}") == "anon_inode:inotify":
                    found.append((pid, int(name)))
    return found


def waiting(init: int, known: Sequence[Watcher]) -> list[str]:
    """Data that wait to be read in the suspended container, and that CRIU does not dump.
    known: as `watchers` found.  Takes some microseconds for each watcher and UDP socket."""
    events = [pid for pid, fd in known if _readable(pid, fd)]
    found = [f"events that wait for process {members.named(events)} (inotify)"] if events else []
    sockets = sum(_unread(f"/proc/{init}/net/{name}") for name in ("udp", "udp6"))
    if sockets and _namespace(init) != _namespace(os.getpid()):
        found.append(f"datagrams that wait in UDP sockets ({sockets} of them)")
    return [f"Does not move: {text}" for text in found]


def _namespace(pid: int) -> str:
    """The network namespace of a process."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return ""


def _readable(pid: int, fd: int) -> bool:
    """Whether another process's descriptor has data to read."""
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
    """The number of sockets in a table of /proc/net with bytes in their receive queue."""
    try:
        lines = Path(path).read_text().splitlines()[1:]
    except OSError:
        return 0
    return sum(int(line.split()[4].partition(":")[2], 16) > 0 for line in lines)


def keys(container: str, path: str = "/proc/keys") -> list[str]:
    """The keys of the session keyring that runc makes for the container."""
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
    container: str,
    pids: Sequence[int],
    config: Mapping[str, Any],
    cgroups: Mapping[str, str],
    streams: Sequence[str] = (),
) -> list[str]:
    """All that a running container would lose, each as a line for the user.  streams: pipes that
    are not lost."""
    pipes = pipes_to_outside(pids, known=streams)
    lost = [*settings(pids, allowed_cpus(cgroups)), *pipes, *keys(container)]
    lost += [*sockets.settings(pids), *(sockets.groups(pids[0]) if pids else ())]
    return [f"Does not move: {text}" for text in lost + changed_limits(config, cgroups)]


def annotations_of(config: Mapping[str, Any]) -> list[str]:
    """The annotations of config.json, as such a line.  Programs of a host obey them (CRIU
    obeys one), so the target accepts none."""
    names = sorted({*(config.get("annotations") or {})} - {OURS})
    return [f"Does not move: the annotations {', '.join(names)} of config.json"] if names else []
