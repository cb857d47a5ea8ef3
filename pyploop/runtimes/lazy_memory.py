# SPDX-License-Identifier: Apache-2.0
"""What of a container's memory a lazy restore can bring later, and what it cannot: said
before anything starts, with its size.

CRIU loads lazily what is private, anonymous and not locked (vma_entry_can_be_lazy in its
sources); huge pages are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pyploop.units import format_size

_HEAD = re.compile(r"[0-9a-f]+-[0-9a-f]+ (....) \S+ \S+ \d+ *(.*)")
_ANONYMOUS = ("", "[heap]", "[stack]")
_SHARED = ("/memfd:", "/SYSV", "/dev/zero", "/dev/shm/", "[anon_shmem")
_KERNELS = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")


@dataclass
class InUse:
    """Bytes of a container, resident or in swap."""

    private: int = 0
    """Can come later."""
    forked: int = 0
    """What of it is counted again for each process that shares it since a fork."""
    locked: int = 0
    huge: int = 0
    files: int = 0
    """Changed pages of private mappings of files."""
    shared: int = 0
    """Shared memory, System V's, memfd and files of a tmpfs; each page once."""

    @property
    def whole(self) -> int:
        """What must be there before the container runs."""
        return self.locked + self.huge + self.files + self.shared

    def told(self) -> dict[str, int]:
        """For the target (lazy_policy.Memory), and for `in_words`."""
        return {**vars(self), "whole": self.whole}


_KINDS = {
    "shared": "shared memory, tmpfs and memfd",
    "locked": "locked",
    "huge": "huge pages",
    "files": "changed pages of mapped files",
}


def in_words(told: Mapping[str, int]) -> str:
    """What cannot come later, with its size; empty for less than a MiB.  told: see InUse."""
    sizes = {what: told.get(kind, 0) for kind, what in _KINDS.items()}
    return ", ".join(f"{format_size(n)} {what}" for what, n in sizes.items() if n >= 1 << 20)


def of_processes(pids: Iterable[int], shmem: int, proc: str = "/proc") -> InUse:
    """shmem: bytes of shared memory that the container's cgroup knows of, mapped or not."""
    found = InUse()
    for pid in pids:
        try:
            text = Path(f"{proc}/{pid}/smaps").read_text(errors="replace")
        except OSError:  # it has ended
            continue
        _add(found, text)
    found.shared = max(found.shared, shmem)
    return found


def _add(found: InUse, text: str) -> None:
    """Of one process: its /proc/PID/smaps."""
    mode = name = ""
    sizes: dict[str, int] = {}
    for line in text.split("\n"):
        key, _, value = line.partition(":")
        if " " in key or not value:
            if head := _HEAD.fullmatch(line):
                mode, name = head[1], head[2]
                sizes = {}
        elif key == "VmFlags":
            _sort(found, mode, name, sizes, value.split())
        elif value.endswith(" kB"):
            sizes[key] = int(value.split()[0]) << 10


def _sort(found: InUse, mode: str, name: str, sizes: dict[str, int], flags: list[str]) -> None:
    """Of one mapping."""
    if name in _KERNELS or "io" in flags:
        return
    swap = sizes.get("Swap", 0)
    if mode.endswith("s"):
        if name.startswith(_SHARED):  # else a file on a disk, which is not dumped
            found.shared += sizes.get("Pss", 0) + sizes.get("SwapPss", swap)
    elif "ht" in flags:
        found.huge += sizes.get("Private_Hugetlb", 0) + sizes.get("Shared_Hugetlb", 0)
    elif name not in _ANONYMOUS and not name.startswith("[anon:"):
        found.files += sizes.get("Anonymous", 0) + swap
    elif "lo" in flags:
        found.locked += sizes.get("Rss", 0) + swap
    else:
        found.private += sizes.get("Rss", 0) + swap
        found.forked += max(0, sizes.get("Rss", 0) - sizes.get("Pss", 0))
