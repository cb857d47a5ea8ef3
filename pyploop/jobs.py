# SPDX-License-Identifier: Apache-2.0
"""Work in threads whose failures are not lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """One piece of work, started."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._result: list[T] = []
        self.failure: BaseException | None = None
        self.ended = 0.0
        """time.monotonic() of its end."""
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._result.append(work())
        except BaseException as e:
            self.failure = e
        self.ended = time.monotonic()
        self.over.set()

    def join(self, timeout: float | None = None) -> T:
        """Its result, or its failure is raised.  TimeoutError when it is late."""
        if not self.over.wait(timeout):
            raise TimeoutError(f"not done within {timeout:g} s")
        self._thread.join()
        if self.failure is not None:
            raise self.failure
        return self._result[0]


def in_parallel(works: Sequence[Callable[[], T]], cancel: Callable[[], None]) -> list[T]:
    """The results in order.  After a failure, or an exception here (a signal's),
    the others are cancelled and waited for, and the first failure goes on."""
    jobs = [Job(work) for work in works]
    first: BaseException | None = None
    try:
        waiting = list(jobs)
        while waiting and first is None:
            waiting[0].over.wait(0.05 if len(waiting) > 1 else None)
            waiting = [j for j in waiting if not j.over.is_set()]
            first = next((j.failure for j in jobs if j.over.is_set() and j.failure), None)
    except BaseException as e:
        first = e
    if first is not None:
        cancel()
        for job in jobs:
            job.over.wait()
        raise first
    return [job.join() for job in jobs]
