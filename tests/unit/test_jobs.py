# SPDX-License-Identifier: Apache-2.0
"""Whatever moment a signal comes at, no work goes on behind who gave it up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from pyploop.errors import CancelledError, Interrupted
from pyploop.freeze.command import run_command
from pyploop.system.commands import Command
from pyploop.system.jobs import Job, Latch, end_all, in_parallel
from pyploop.system.worker import run_cancellable

MOMENTS = [20e-6 * n for n in range(1, 60)]
"""Seconds until the signal; a thread takes 0.1 to 1 ms to start."""


class Endless:
    """Work that ends by `cancel` alone, as a pump does."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self.running = 0
        self.forgotten = False
        """Nobody cancelled it for long after the signal."""

    def work(self) -> None:
        with self._lock:
            self.running += 1
        ended = self._cancelled.wait(20)
        with self._lock:
            self.running -= 1
            self.forgotten |= not ended

    def cancel(self) -> None:
        self._cancelled.set()


def in_threads(endless: Endless) -> None:
    in_parallel([endless.work, endless.work], endless.cancel)


def in_one(endless: Endless) -> None:
    run_cancellable(endless.work, endless.cancel)


def held(endless: Endless) -> None:
    jobs = [Job(endless.work), Job(endless.work)]
    try:
        for job in jobs:
            job.start()
        jobs[0].join()
    finally:
        end_all(jobs, endless.cancel)


@pytest.mark.parametrize("how", [in_threads, in_one, held])
def test_no_work_goes_on_after_a_signal(
    how: Callable[[Endless], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(_: object) -> None:
        # As cli/main.py does: Python drops what is raised in a weak reference's callback.
        signal.setitimer(signal.ITIMER_REAL, 0.005)

    monkeypatch.setattr(sys, "unraisablehook", again)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for moment in MOMENTS:
            endless = Endless()
            with contextlib.suppress(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, moment)
                how(endless)
                pytest.fail("nothing interrupted it")
            assert not endless.running
            assert not endless.forgotten
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("how", [in_threads, in_one, held])
def test_a_thread_whose_start_was_interrupted_is_not_left_behind(
    how: Callable[[Endless], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    endless = Endless()
    with pytest.raises(Interrupted):
        how(endless)
    assert not endless.running


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (lambda: Command(["sleep", "0.2"]), 0),
        (lambda: run_command("exec sleep 60", "-F"), -signal.SIGTERM),
    ],
)
def test_a_command_that_a_signal_met_at_its_start_has_ended_before_it_is_undone(
    start: Callable[[], object], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    def begin(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        begun.append(popen(argv, **options))
        signal.raise_signal(signal.SIGALRM)
        return begun[0]

    begun: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", begin)
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interrupted):
            start()
        assert begun[0].poll() == status
    finally:
        signal.signal(signal.SIGALRM, old)
        begun[0].kill()
        begun[0].wait()


def test_a_job_that_was_ended_before_it_began_never_begins() -> None:
    done: list[int] = []
    job = Job(lambda: done.append(1))
    job.end()
    job.start()
    with pytest.raises(CancelledError):
        job.join()
    assert not done


def test_a_signal_during_the_wait_for_other_jobs_leaves_no_thread_behind() -> None:
    one = Endless()
    cancels: list[int] = []

    def cancel() -> None:
        cancels.append(1)
        if len(cancels) == 1:
            raise Interrupted(signal.SIGTERM)
        one.cancel()

    def fails() -> None:
        raise ValueError

    with pytest.raises(Interrupted):
        in_parallel([one.work, fails], cancel)
    assert not one.running


def test_a_latch_wakes_all_waiting_threads_and_none_before() -> None:
    latch = Latch()
    assert not latch.wait(0.01)
    seen: list[bool] = []
    waiting = [threading.Thread(target=lambda: seen.append(latch.wait(20))) for _ in range(5)]
    for thread in waiting:
        thread.start()
    assert not seen
    latch.set()
    for thread in waiting:
        thread.join()
    assert seen == [True] * 5
    assert latch.wait(0)


def test_what_never_begins_closes_what_it_was_to_have_closed() -> None:
    r, w = os.pipe()
    job = Job(lambda: os.close(w), lambda: os.close(w))
    job.end()
    assert os.read(r, 1) == b""
    os.close(r)
    job.start()
    job.end()  # it does not begin any more: w may be another's by now
