# SPDX-License-Identifier: Apache-2.0
"""What this host's CPU can do."""

from __future__ import annotations


def flags() -> list[str]:
    """What this CPU can, as the kernel names it."""
    with open("/proc/cpuinfo", errors="replace") as f:
        for line in f:
            if line.startswith(("flags", "Features")):
                return sorted(line.split(":", 1)[1].split())
    return []
