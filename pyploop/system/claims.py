# SPDX-License-Identifier: Apache-2.0
"""Whether something has a block device for itself: a file system, swap space, a
driver on top of it.

The kernel gives such a claim to one holder only, and says so to an open with
O_EXCL (block/bdev.c, bd_may_claim: EBUSY).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from pyploop.system import sysblock

PAUSE = 0.005
"""Seconds between two looks at a claim that may end."""
NO_DEVICE = (errno.ENOENT, errno.ENXIO, errno.ENODEV)
"""What an open says when the device is gone, or out of reach from here."""


def is_claimed(
    device: tuple[int, int], path: str | None = None, *, wait: float = 0.0, unknown: bool
) -> bool:
    """Whether the block device `device` (major, minor) is claimed.

    path: its usual name; None: as the kernel names it in /dev.  wait: seconds for a
    claim to end.  unknown: the answer when it is there and cannot be opened.
    """
    deadline = time.monotonic() + wait
    name = node(device) if path is None else path
    while True:
        try:
            os.close(sysblock.open_device(name, device, os.O_EXCL | os.O_NONBLOCK))
        except OSError as e:
            if e.errno != errno.EBUSY:
                return unknown and e.errno not in NO_DEVICE
            if time.monotonic() >= deadline:
                return True
            time.sleep(PAUSE)
        else:
            return False


def node(device: tuple[int, int]) -> str:
    """Its name in /dev, as the kernel gives it."""
    with contextlib.suppress(OSError):
        text = Path(f"/sys/dev/block/{device[0]}:{device[1]}/uevent").read_text()
        for line in text.splitlines():
            if line.startswith("DEVNAME="):
                return f"/dev/{line.removeprefix('DEVNAME=')}"
    return f"/dev/block/{device[0]}:{device[1]}"
