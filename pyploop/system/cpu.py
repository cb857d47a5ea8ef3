# SPDX-License-Identifier: Apache-2.0
"""The features of this host's CPU."""

from __future__ import annotations


def flags() -> list[str]:
    """The features of the CPU, as /proc/cpuinfo names them; sorted."""
    with open("/proc/cpuinfo", errors="replace") as f:
        for line in f:
            if line.startswith(("flags", "Features")):
                return sorted(line.split(":", 1)[1].split())
    return []
