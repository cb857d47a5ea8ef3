# SPDX-License-Identifier: Apache-2.0
"""How long a container may stay suspended here: one deadline for all that is waited
for from then on, on either host, whatever the target does meanwhile.

When it passes, the connection is cut, so that each wait for the target fails, and the
migration is undone.  Once the target was asked to restore, it decides (commit_record.py):
then the limit ends only the wait for its answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyploop.errors import MigrateError, PyploopError, VzExitCode
from pyploop.system import signals

FOR_UNDOING = 1.0
"""Seconds of the limit that are left for letting the container go on; a quarter of
a limit below four seconds."""


class SuspendLimit:
    """A context manager: nothing is cut after it."""

    def __init__(self, seconds: float, cut: Callable[[PyploopError], None]) -> None:
        """seconds: 0 for no limit.  cut: ends the connection, from another thread."""
        self._seconds, self._cut = seconds, cut
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._deadline = 0.0
        self.passed = False
        """The connection was cut."""

    def start(self) -> None:
        """The container is about to be suspended."""
        if not self._seconds:
            return
        wait = self._seconds - min(FOR_UNDOING, self._seconds / 4)
        self._deadline = time.monotonic() + wait
        self._timer = threading.Timer(wait, self._pass)
        self._timer.daemon = True
        with signals.held_back():
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
            f"the container was suspended for more than {self._seconds:g} s (--suspend-limit), "
            "so the migration was given up before the target was asked to restore it",
        )

    def ask(self, most: float) -> float:
        """The target is about to be asked to restore: nothing is cut any more.
        Returns for how many seconds its answer may be waited for, `most` at most.
        MigrateError when the limit has passed."""
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
