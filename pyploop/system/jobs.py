# SPDX-License-Identifier: Apache-2.0
"""Work in threads.  No failure is lost, and no signal leaves a thread behind."""

from __future__ import annotations

import contextlib
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from pyploop.errors import CancelledError
from pyploop.system import signals

T = TypeVar("T")

INTERRUPT = signal.SIGUSR1
"""Interrupts a wait in the kernel, in a program that has a handler for this signal."""
TICK = 0.1
"""Seconds that a thread sleeps at a time when signals may interrupt it."""


class Latch:
    """A threading.Event for a thread in which a signal may raise an exception at any time.

    An exception at the start of Event.wait leaves its lock taken for ever.  This class has
    no lock in Python code: it has a flag, and a SimpleQueue (which is reentrant) to wake the
    waiting threads.  An exception can lose a wake-up, and a signal can come just before a
    wait; each costs TICK at most.
    """

    def __init__(self) -> None:
        self._set = False
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._wakes.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; false when that takes more than `timeout` seconds."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not self._set:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(queue.Empty):
                self._wakes.get(timeout=min(TICK, left))
                self._wakes.put(None)  # wake the next thread
        return True


class Job(Generic[T]):
    """One piece of work.

    Where a signal may raise, store the job first, where the clean-up finds it, and start
    it then: after an exception from `start` it is not known whether the thread runs.
    """

    def __init__(self, work: Callable[[], T], dropped: Callable[[], None] = lambda: None) -> None:
        """dropped: called instead when the work never begins, to close what the work would
        have closed."""
        self._work, self._dropped = work, dropped
        self._result: list[T] = []
        self._gate = threading.Lock()
        self._begun = False
        self.failure: BaseException | None = None
        self.ended = 0.0
        """time.monotonic() of its end."""
        self.over = Latch()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Job[T]:
        """Once; this job."""
        with signals.deferred():  # it waits by an Event
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
        """Wait for its result, or raise its failure.  TimeoutError after `timeout` seconds."""
        if not self.over.wait(timeout):
            raise TimeoutError(f"not done within {timeout:g} s")
        if self._begun:
            self._thread.join()
        if self.failure is not None:
            raise self.failure
        return self._result[0]

    def end(self, timeout: float | None = None) -> None:
        """End the job.  If it has begun, wait for it, `timeout` seconds at most.  If not, it
        never begins."""
        with self._gate:
            if not self._begun and not self.over.is_set():
                self.failure = CancelledError("it was cancelled before it began")
                self._dropped()
                self.over.set()
        self.over.wait(timeout)

    def interrupt(self, timeout: float) -> None:
        """Interrupt the job's waits in the kernel until it is over, for `timeout` seconds at
        most.  (The mount of a hostile image can take hours.)"""
        deadline = time.monotonic() + timeout
        while not self.over.wait(TICK) and time.monotonic() < deadline:
            if callable(signal.getsignal(INTERRUPT)) and self._thread.ident is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pthread_kill(self._thread.ident, INTERRUPT)


def end_all(jobs: Sequence[Job[T]], cancel: Callable[[], None] | None = None) -> None:
    """Cancel the jobs and wait until they are over.  One signal may raise meanwhile; they are
    over then, too."""
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
    """Run all of it at once; returns the results in order.  After a failure, or a signal's
    exception here, the other jobs are cancelled and waited for.  Then the first failure is
    raised."""
    jobs = [Job(work) for work in works]
    try:
        for job in jobs:
            job.start()
        waiting = list(jobs)
        while waiting:
            waiting[0].over.wait(TICK / 2)
            for job in jobs:
                if job.over.is_set() and job.failure is not None:
                    raise job.failure
            waiting = [j for j in waiting if not j.over.is_set()]
        return [job.join() for job in jobs]
    except BaseException:
        end_all(jobs, cancel)
        raise
