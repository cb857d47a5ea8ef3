# SPDX-License-Identifier: Apache-2.0
"""The suspend limit: how long a container may stay suspended on the source.  It is one
deadline for every wait from the suspend on, whatever the target does meanwhile.

When it passes, the connection is ended.  Each wait for the target then fails, and the
migration is rolled back.  After the target was asked to restore, the target decides
(commit_record.py).  Then the limit ends only the wait for its answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyploop.errors import MigrateError, PyploopError, VzExitCode
from pyploop.system import signals

FOR_UNDOING = 1.0
"""Seconds of the limit that are reserved for letting the container go on.  Of a limit below
four seconds it is a quarter."""


class SuspendLimit:
    """A context manager: after it, the limit has no effect."""

    def __init__(self, seconds: float, cut: Callable[[PyploopError], None]) -> None:
        """seconds: 0 for no limit.  cut: called from another thread to end the connection."""
        self._seconds, self._cut = seconds, cut
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._deadline = 0.0
        self.passed = False
        """The limit has passed, and the connection was ended."""

    def start(self) -> None:
        """The container is about to be suspended."""
        if not self._seconds:
            return
        wait = self._seconds - min(FOR_UNDOING, self._seconds / 4)
        self._deadline = time.monotonic() + wait
        self._timer = threading.Timer(wait, self._pass)
        self._timer.daemon = True
        with signals.deferred():
            self._timer.start()

    def _pass(self) -> None:
        with self._lock:
            if self._timer is None:
                return
            self.passed = True
        self._cut(self._failure())

    def _failure(self) -> MigrateError:
        return MigrateError(
            VzExitCode.COPY_FAILED,
            f"the container was suspended for more than {self._seconds:g} s (--suspend-limit); "
            "the target was not asked to restore it",
            hint="give a larger --suspend-limit, or copy more memory before (--pre-dumps)",
        )

    def ask(self, most: float) -> float:
        """The target is about to be asked to restore: from now on the connection is not
        ended.  Returns the seconds that its answer may take, `most` at most.
        MigrateError(6) when the limit has passed."""
        self.stop()
        left = self._deadline - time.monotonic() if self._seconds else most
        if self.passed or left <= 0:
            raise self._failure()
        return min(left, most)

    def stop(self) -> None:
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def __enter__(self) -> SuspendLimit:
        return self

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        self.stop()
        if self.passed and isinstance(failure, (PyploopError, OSError)):
            raise self._failure() from failure
