# SPDX-License-Identifier: Apache-2.0
"""How much memory a dump of a container will have.  The target is told before anything
starts, and accepts a fixed multiple of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


def memory_of(pids: Iterable[int], cgroups: Mapping[str, str], tmpfs: int = 0) -> int:
    """Bytes of memory in use that a dump will have.  cgroups: controller -> folder; '' is
    the controller of v2.  tmpfs: bytes of files, of which no cgroup may know.

    Shared memory is in a dump once, whatever has it mapped or not: a memfd, System V's,
    files of a tmpfs.  Private memory that processes share since a fork is in it once for
    each process (seen with CRIU 4.2), so the proportional size (PSS) would be too small.
    Pages of mapped files that were not changed are not in it."""
    processes = [_of_process(pid) for pid in pids]
    known = _of_cgroup(cgroups)
    private = sum(p.private for p in processes)
    # Without a cgroup only the kernel's walk over the mappings tells what is shared.
    shared = known.shared if known else sum(_shared_part(p) for p in processes if p.shared)
    return max(private, known.private) + max(shared, tmpfs)


@dataclass(frozen=True)
class _Bytes:
    """Of a process or a cgroup."""

    private: int = 0
    """Anonymous and in swap."""
    shared: int = 0
    pid: int = 0

    def __bool__(self) -> bool:
        return bool(self.private or self.shared)


def _of_process(pid: int) -> _Bytes:
    found = _fields(f"/proc/{pid}/status")
    resident = found.get("RssAnon:", found.get("VmRSS:", 0))  # Linux before 4.5 has one sum
    return _Bytes(resident + found.get("VmSwap:", 0), found.get("RssShmem:", 0), pid)


def _shared_part(process: _Bytes) -> int:
    """Of shared memory, each page divided by the number of its processes."""
    # Linux before 5.4 does not tell.
    return _fields(f"/proc/{process.pid}/smaps_rollup").get("Pss_Shmem:", process.shared)


def _fields(path: str) -> dict[str, int]:
    """The fields in kB of a file in /proc, in bytes."""
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:  # the process has ended
        return {}
    # The process's name has a line of its own, and may look like any other line.
    words = [line.split() for line in text.split("\n")]
    return {
        w[0]: int(w[1]) << 10 for w in words if len(w) == 3 and w[2] == "kB" and w[0] != "Name:"
    }


def _of_cgroup(cgroups: Mapping[str, str]) -> _Bytes:
    if v1 := cgroups.get("memory"):
        numbers = _numbers(Path(v1))
        private = numbers.get("total_rss", 0) + numbers.get("total_swap", 0)
        return _Bytes(private, numbers.get("total_shmem", 0))
    folder = Path(cgroups.get("") or "/nonexistent")
    numbers = _numbers(folder)
    try:
        swap = int((folder / "memory.swap.current").read_text())
    except (OSError, ValueError):
        swap = 0
    return _Bytes(numbers.get("anon", 0) + swap, numbers.get("shmem", 0))


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
