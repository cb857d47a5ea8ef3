# SPDX-License-Identifier: Apache-2.0
"""Sizes and times as people write them, and the sizes that all packages use."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
SECTOR = 512
BLOCK = 4096
"""The granule of trackers, hashes and the zero test, in bytes (csrc/base.h)."""

LARGEST = (1 << 63) - 1
"""Bytes: the largest position in a file (off_t)."""
LONGEST = 20 * 86400.0
"""Seconds.  poll(2) takes milliseconds in an int, which ends at 24 days."""

_FACTORS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """Bytes from `4096`, `64K`, `1MiB`, `2.5G`; raises ValueError."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?", text.strip(), re.IGNORECASE)
    if not m:
        raise ValueError(f"{text!r} is not a size (examples: 4096, 64K, 1M)")
    size = float(m[1]) * _FACTORS[m[2].upper()]
    if size > LARGEST:
        raise ValueError(f"{text!r} is more than 8 EiB")
    return int(size)


def parse_time(text: str) -> float:
    """Seconds from `5`, `0.5s`, `200ms`, `2m`; raises ValueError."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|h|)", text.strip())
    if not m:
        raise ValueError(f"{text!r} is not a time (examples: 5, 0.5s, 200ms, 2m)")
    seconds = float(m[1]) * _TIMES[m[2]]
    if seconds > LONGEST:
        raise ValueError(f"{text!r} is more than {LONGEST / 86400:g} days")
    return seconds


def format_size(n: float) -> str:
    """`1.5 GiB`, `4.0 KiB`, `17 B`."""
    if n < KIB:
        return f"{n:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        n /= 1024
        if n < 1024:
            return f"{n:.1f} {unit}"
    return f"{n / 1024:.1f} TiB"
