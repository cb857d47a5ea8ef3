# SPDX-License-Identifier: Apache-2.0
"""How much memory a container holds that a dump of it will: the target is told before
anything starts, and takes so many times that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.units import GIB, format_size

GROWTH = 8
"""All memory images of a migration may be this many times the memory that was told of,
and GIB more: the rounds are twice that at most, and it may grow meanwhile."""


def most_taken(told: int) -> int:
    """Bytes of memory images that a target takes."""
    return told * GROWTH + GIB


def check_growth(container: str, told: int, now: int) -> None:
    """Before the container is suspended: MigrateError(6) when the target would not
    take the dump.  told: 0 when it was told of none."""
    if told and now > most_taken(told):
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{container} holds {format_size(now)} of memory by now, and held {format_size(told)} "
            "when the target was told of it: migrate it again",
        )


def memory_of(pids: Iterable[int], cgroups: Mapping[str, str]) -> int:
    """Bytes.  cgroups: controller -> folder, '' of v2.  What no process has mapped is
    known to the cgroup only: a memfd, System V's shared memory, files of a tmpfs."""
    return max(sum(_of_process(pid) for pid in pids), _of_cgroup(cgroups))


def _of_process(pid: int) -> int:
    """Resident, and in swap."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return 0
    # The process's name is on a line of its own, and may say anything.
    words = [line.split() for line in text.split("\n")]
    return sum(int(w[1]) for w in words if w[:1] in (["VmRSS:"], ["VmSwap:"])) << 10


def _of_cgroup(cgroups: Mapping[str, str]) -> int:
    if v1 := cgroups.get("memory"):
        numbers, names = _numbers(Path(v1)), ("total_rss", "total_shmem", "total_swap")
        return sum(numbers.get(name, 0) for name in names)
    folder = Path(cgroups.get("") or "/nonexistent")
    numbers = _numbers(folder)
    try:
        swap = int((folder / "memory.swap.current").read_text())
    except (OSError, ValueError):
        swap = 0
    return numbers.get("anon", 0) + numbers.get("shmem", 0) + swap


def _numbers(folder: Path) -> dict[str, int]:
    try:
        lines = (folder / "memory.stat").read_text().split("\n")
        return {name: int(value) for name, _, value in (x.partition(" ") for x in lines if x)}
    except (OSError, ValueError):
        return {}
