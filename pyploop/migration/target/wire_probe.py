# SPDX-License-Identifier: Apache-2.0
"""The target's part of a probe of the connection: so many bytes are read, and forgotten."""

from __future__ import annotations

import contextlib
import os
import time

from pyploop.system import descriptors
from pyploop.units import KIB

PIECE = 256 * KIB


def read(fd: int, size: int, timeout: float) -> None:
    """Read `size` bytes, and answer with one.  Without the answer when they do not come in
    time.  Closes the descriptor."""
    deadline = time.monotonic() + timeout
    left = size
    try:
        while left:
            wait = deadline - time.monotonic()
            if wait <= 0 or not descriptors.readable(fd, wait):
                return
            part = os.read(fd, min(left, PIECE))
            if not part:
                return
            left -= len(part)
        with contextlib.suppress(OSError):  # the source does not wait for it any more
            os.write(fd, b"!")
    finally:
        os.close(fd)
