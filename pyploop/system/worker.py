# SPDX-License-Identifier: Apache-2.0
"""Run blocking C code so that Python still handles signals."""

from __future__ import annotations

import contextlib
import math
import os
import select
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

from pyploop.system.jobs import TICK, Job, end_all

T = TypeVar("T")


def run_cancellable(
    work: Callable[[], T],
    cancel: Callable[[], None] | None = None,
    tick: Callable[[], None] | None = None,
) -> T:
    """Run `work` in a thread, while this thread handles signals.

    When a signal raises here, call `cancel`, wait for `work`, and let the exception go on.
    `tick` is called every 0.1 s.
    """
    job = Job(work)
    try:
        job.start()
        while not job.over.wait(TICK):
            if tick is not None:
                tick()
        return job.join()
    except BaseException:
        end_all([job], cancel)
        raise


def wait_for(process: subprocess.Popen[bytes], timeout: float | None) -> int:
    """`process.wait(timeout)` that returns when the process ends.

    The standard one polls, with up to 50 ms between two looks, and a container would stay
    suspended for that time.
    """
    with contextlib.suppress(OSError):  # Linux before 5.3, or it is forbidden
        fd = os.pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            deadline = math.inf if timeout is None else time.monotonic() + timeout
            # Short waits: a signal that comes just before one does not interrupt it.
            while not poll.poll(max(0.0, min(TICK, deadline - time.monotonic())) * 1000):
                if time.monotonic() >= deadline:
                    raise subprocess.TimeoutExpired(process.args, timeout or 0.0)
        finally:
            os.close(fd)
        return process.wait()
    return process.wait(timeout)
