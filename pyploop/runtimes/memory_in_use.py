# SPDX-License-Identifier: Apache-2.0
"""How much memory a dump of a container will have.  The target is told before anything
starts, and accepts a fixed multiple of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.units import GIB, format_size

GROWTH = 8
"""All memory images of a migration may have this many times the memory that was announced,
and GIB more: the memory rounds have at most twice that, and the memory may grow."""


def most_taken(announced: int) -> int:
    """Bytes of memory images that a target accepts."""
    return announced * GROWTH + GIB


def check_growth(container: str, announced: int, now: int) -> None:
    """Before the container is suspended: MigrateError(6) when the target would not
    accept the dump.  announced: bytes that it was told; 0: none."""
    if announced and now > most_taken(announced):
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"the memory of {container} has grown from {format_size(announced)} to "
            f"{format_size(now)} since the target was asked for room; it would not accept a dump "
            "of that size: migrate it again",
        )


def memory_of(pids: Iterable[int], cgroups: Mapping[str, str]) -> int:
    """Bytes of memory in use.  cgroups: controller -> folder; '' is the controller of v2.
    Only the cgroup counts what no process has mapped: a memfd, System V's shared
    memory, files of a tmpfs."""
    return max(sum(_of_process(pid) for pid in pids), _of_cgroup(cgroups))


def _of_process(pid: int) -> int:
    """Resident memory and swap."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return 0
    # The process's name has a line of its own, and may look like any other line.
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


def shared_of(cgroups: Mapping[str, str]) -> int:
    """Bytes of shared memory and files of tmpfs, as the container's cgroup counts them."""
    if v1 := cgroups.get("memory"):
        return _numbers(Path(v1)).get("total_shmem", 0)
    return _numbers(Path(cgroups.get("") or "/nonexistent")).get("shmem", 0)


def _numbers(folder: Path) -> dict[str, int]:
    try:
        lines = (folder / "memory.stat").read_text().split("\n")
        return {name: int(value) for name, _, value in (x.partition(" ") for x in lines if x)}
    except (OSError, ValueError):
        return {}
