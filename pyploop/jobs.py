# SPDX-License-Identifier: Apache-2.0
"""Work in threads whose failures are not lost, and which no signal leaves behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from pyploop.errors import CancelledError

T = TypeVar("T")


class Job(Generic[T]):
    """One piece of work.

    Where a signal's exception may come, the job is put down first, where what ends
    it finds it, and started then: an exception out of `start` does not tell whether
    the thread runs.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._result: list[T] = []
        self._gate = threading.Lock()
        self._begun = False
        self.failure: BaseException | None = None
        self.ended = 0.0
        """time.monotonic() of its end."""
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Job[T]:
        """Once; this job."""
        self._thread.start()
        return self

    def _run(self) -> None:
        with self._gate:
            if self.over.is_set():
                return
            self._begun = True
        try:
            self._result.append(self._work())
        except BaseException as e:
            self.failure = e
        self.ended = time.monotonic()
        self.over.set()

    def join(self, timeout: float | None = None) -> T:
        """Its result, or its failure is raised.  TimeoutError when it is late."""
        if not self.over.wait(timeout):
            raise TimeoutError(f"not done within {timeout:g} s")
        if self._begun:
            self._thread.join()
        if self.failure is not None:
            raise self.failure
        return self._result[0]

    def end(self, timeout: float | None = None) -> None:
        """It is over when this returns: waited for if it has begun, that long at
        most, and else it never begins."""
        with self._gate:
            if not self._begun and not self.over.is_set():
                self.failure = CancelledError("not begun")
                self.over.set()
        self.over.wait(timeout)


def end_all(jobs: Sequence[Job[T]], cancel: Callable[[], None] | None = None) -> None:
    """Cancelled, and over when this returns or raises: a signal may come meanwhile,
    but only once."""
    try:
        _end_all(jobs, cancel)
    except BaseException:
        _end_all(jobs, cancel)
        raise


def _end_all(jobs: Sequence[Job[T]], cancel: Callable[[], None] | None) -> None:
    if cancel is not None:
        cancel()
    for job in jobs:
        job.end()


def in_parallel(works: Sequence[Callable[[], T]], cancel: Callable[[], None]) -> list[T]:
    """The results in order.  After a failure, or an exception here (a signal's),
    the others are cancelled and waited for, and the first failure goes on."""
    jobs = [Job(work) for work in works]
    try:
        for job in jobs:
            job.start()
        waiting = list(jobs)
        while waiting:
            waiting[0].over.wait(0.05 if len(waiting) > 1 else None)
            for job in jobs:
                if job.over.is_set() and job.failure is not None:
                    raise job.failure
            waiting = [j for j in waiting if not j.over.is_set()]
        return [job.join() for job in jobs]
    except BaseException:
        end_all(jobs, cancel)
        raise
