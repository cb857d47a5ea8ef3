# SPDX-License-Identifier: Apache-2.0
"""How much of a dump is loaded lazily, from CRIU's own list of its pages."""

from __future__ import annotations

import os
from pathlib import Path

from pyploop.wire import criu
from pyploop.wire.criu import Pagemap
from pyploop.wire.protobuf import Malformed

LARGEST = 64 << 20
"""Bytes of one list that is read: some five million pieces."""


def lazy_bytes(images: Path) -> int | None:
    """Of all processes; None when that cannot be read (any more)."""
    total = 0
    try:
        for path in images.glob("pagemap-[0-9]*.img"):
            with path.open("rb") as f:
                data = f.read(LARGEST)
            for entry in criu.entries("pagemap", data):
                if (entry.number(Pagemap.FLAGS) or 0) & criu.LAZY_PAGES:
                    pages = entry.number(Pagemap.PAGES) or entry.number(Pagemap.OLD_PAGES) or 0
                    total += pages
    except (OSError, Malformed):
        return None
    return total * os.sysconf("SC_PAGESIZE")
