# SPDX-License-Identifier: Apache-2.0
"""The features of this host's CPU, and how busy it is."""

from __future__ import annotations

import os


def flags() -> list[str]:
    """The features of the CPU, as /proc/cpuinfo names them; sorted."""
    with open("/proc/cpuinfo", errors="replace") as f:
        for line in f:
            if line.startswith(("flags", "Features")):
                return sorted(line.split(":", 1)[1].split())
    return []


class IdleShare:
    """How much of all CPUs is idle, over a second or more."""

    def __init__(self) -> None:
        self._before = _ticks()
        self._second = os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        self._share = 1.0

    def recent(self) -> float:
        """0 to 1; 1 if that is not known yet."""
        (idle, total), (idle_before, total_before) = _ticks(), self._before
        if total - total_before >= self._second:
            self._share = (idle - idle_before) / (total - total_before)
            self._before = idle, total
        return self._share


def _ticks() -> tuple[int, int]:
    """(idle, all) of all CPUs together, as /proc/stat counts them (proc_stat(5))."""
    try:
        with open("/proc/stat") as f:
            fields = [int(word) for word in f.readline().split()[1:9]]
    except (OSError, ValueError):
        return 0, 0
    return sum(fields[3:5]), sum(fields)
