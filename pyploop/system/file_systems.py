# SPDX-License-Identifier: Apache-2.0
"""The file systems that this kernel can mount."""

from __future__ import annotations

import subprocess
from pathlib import Path

TIMEOUT = 10.0
"""Seconds for modprobe to look for a module."""


def has(fstype: str, table: Path = Path("/proc/filesystems")) -> bool:
    """Whether it is there, or in a module that a mount would load.  True when that is not
    known."""
    try:
        names = {line.split()[-1] for line in table.read_text().splitlines() if line.strip()}
    except OSError:
        return True
    if fstype in names:
        return True
    try:
        done = subprocess.run(
            ["modprobe", "--dry-run", "--quiet", f"fs-{fstype}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        return False
    except (OSError, subprocess.TimeoutExpired):
        return True
    return done.returncode == 0
