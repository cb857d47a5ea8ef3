# SPDX-License-Identifier: Apache-2.0
"""CRIU's page server needs a pipe of 64 MiB, which root does not get without
CAP_SYS_RESOURCE.  The limit is the machine's: it is raised while a test needs it."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

LIMIT = Path("/proc/sys/fs/pipe-max-size")
BYTES = 64 << 20
BEFORE = Path("/run/lock/pyploop-tests-pipes")
"""Holds the limit as it was, while somebody has raised it; each of those has it locked."""
CHANGES = Path("/run/lock/pyploop-tests-pipes.lock")
"""Locked by who changes the limit."""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    with CHANGES.open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def large_pipes() -> Iterator[None]:
    """Several processes may need them at a time: the last one puts the limit back."""
    with _alone():
        users = BEFORE.open("a+")
        fcntl.flock(users, fcntl.LOCK_SH)
        users.seek(0)
        if int(LIMIT.read_text()) < BYTES:
            if not users.read():  # else a user was killed
                users.write(LIMIT.read_text())
                users.flush()
            LIMIT.write_text(str(BYTES))
    try:
        yield
    finally:
        with _alone(), users, contextlib.suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            users.seek(0)
            if before := users.read():
                LIMIT.write_text(before)
            BEFORE.unlink()
