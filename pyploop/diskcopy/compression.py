# SPDX-License-Identifier: Apache-2.0
"""What `--compress` says: when blocks are compressed on their way to a pyploop receiver.

The work and the decisions of each moment are the core's (csrc/pump_pack.c, csrc/pays.c).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyploop import _core

LEVELS = range(1, 20)
"""zstd's levels above need a larger window than a receiver gives them."""
AUTO_LEVEL = 1
"""Several hundred MB/s a core.  Level 3 takes 1.7 times as long for data that become
smaller by 6% (shared libraries)."""
DEFAULT_LEVEL = 3
"""zstd's own."""


@dataclass(frozen=True)
class Compression:
    """When blocks are compressed, and how."""

    name: str
    """As the user writes it."""
    mode: int
    """COMPRESS_* of the core."""
    level: int = AUTO_LEVEL

    def __bool__(self) -> bool:
        """Something may be compressed."""
        return self.mode != _core.COMPRESS_NEVER


NEVER = Compression("never", _core.COMPRESS_NEVER)
AUTO = Compression("auto", _core.COMPRESS_AUTO)


def parse_compression(text: str) -> Compression:
    """`never`, `auto`, `zstd` or `zstd:LEVEL`; ValueError for anything else."""
    if text in (NEVER.name, AUTO.name):
        return NEVER if text == NEVER.name else AUTO
    found = re.fullmatch(r"zstd(?::([0-9]{1,2}))?", text)
    level = int(found[1] or DEFAULT_LEVEL) if found else 0
    if level not in LEVELS:
        raise ValueError(
            f"{text!r} is not never, auto, zstd or zstd:LEVEL (LEVEL is {LEVELS[0]} to "
            f"{LEVELS[-1]})"
        )
    return Compression(f"zstd:{level}", _core.COMPRESS_ALWAYS, level)
