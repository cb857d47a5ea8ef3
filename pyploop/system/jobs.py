# SPDX-License-Identifier: Apache-2.0
"""Work in threads whose failures are not lost, and which no signal leaves behind."""

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
"""Ends a wait in the kernel, in a program that has a handler for it."""
TICK = 0.1
"""Seconds that a thread which signals may interrupt sleeps at a time."""


class Latch:
    """What threading.Event is, for a thread in which a signal may raise at any moment.

    An exception as Event.wait begins leaves its lock taken for ever.  This has none
    that Python code holds: a flag, and a queue, safe by its own promise, that wakes
    who sleeps.  Of what an exception takes out of that, or a signal that came just
    before the sleep, each costs TICK at most.
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
        """Whether it was set within so many seconds (None: it is waited for)."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not self._set:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(queue.Empty):
                self._wakes.get(timeout=min(TICK, left))
                self._wakes.put(None)  # the next one's
        return True


class Job(Generic[T]):
    """One piece of work.

    Where a signal's exception may come, the job is put down first, where what ends
    it finds it, and started then: an exception out of `start` does not tell whether
    the thread runs.
    """

    def __init__(self, work: Callable[[], T], dropped: Callable[[], None] = lambda: None) -> None:
        """dropped: what is done instead when the work never begins, for what it was
        to have closed."""
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
        with signals.held_back():  # it waits by an Event
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
                self._dropped()
                self.over.set()
        self.over.wait(timeout)

    def interrupt(self, timeout: float) -> None:
        """Over when this returns, or late: what it waits for in the kernel (a mount can
        take hours, as its image says) is interrupted, again and again."""
        deadline = time.monotonic() + timeout
        while not self.over.wait(TICK) and time.monotonic() < deadline:
            if callable(signal.getsignal(INTERRUPT)) and self._thread.ident is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pthread_kill(self._thread.ident, INTERRUPT)


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
            waiting[0].over.wait(TICK / 2)
            for job in jobs:
                if job.over.is_set() and job.failure is not None:
                    raise job.failure
            waiting = [j for j in waiting if not j.over.is_set()]
        return [job.join() for job in jobs]
    except BaseException:
        end_all(jobs, cancel)
        raise
