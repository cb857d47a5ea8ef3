# SPDX-License-Identifier: Apache-2.0
"""How busy this host's processors are: how many times longer work takes here, now, than it
would alone."""

from __future__ import annotations

import time

CPU = 0.02
"""Seconds of processor time that a measurement takes."""
LONGEST = 0.4
"""Seconds that it takes at most."""


def busy() -> float:
    """1 on an idle host.  Only this thread's own share of a processor is measured."""
    start, cpu = time.monotonic(), time.thread_time()
    while True:
        used, wall = time.thread_time() - cpu, time.monotonic() - start
        if used >= CPU or wall >= LONGEST:
            return max(wall / max(used, 1e-3), 1.0)
