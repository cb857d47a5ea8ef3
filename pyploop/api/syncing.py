# SPDX-License-Identifier: Apache-2.0
"""Making files durable: `sync`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

from pyploop._core import fdatasync
from pyploop.errors import SyncError
from pyploop.system.worker import run_cancellable


def sync(
    paths: Iterable[str | os.PathLike[str]],
    *,
    flush: Literal["all", "data", "nothing"] = "all",
    drop_cache: bool = False,
) -> None:
    """Make files durable, one after another.

    flush: `all` is fsync, `data` is fdatasync, `nothing` is for `drop_cache` alone, which
    drops each file from the page cache.  It goes on after a file that fails, and raises a
    SyncError at the end: its `path` is the first that failed, and its cause the OSError.
    """
    first: SyncError | None = None
    for name in paths:
        path = os.fspath(name)
        try:
            _one(path, flush, drop_cache)
        except OSError as e:
            failure = SyncError.of(f"cannot sync {path}", e, path=path)
            failure.__cause__ = e
            first = first or failure
    if first is not None:
        raise first


def _one(path: str, flush: str, drop_cache: bool) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if flush == "all":
            run_cancellable(lambda: os.fsync(fd))
        elif flush == "data":
            run_cancellable(lambda: fdatasync(fd))
        if drop_cache:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
