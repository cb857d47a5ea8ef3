# SPDX-License-Identifier: Apache-2.0
"""The part of a restore that needs the disks, and of the images only the first.  It is done
while the source still dumps and sends the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyploop.runtimes import Runtime
from pyploop.system.jobs import TICK, Job, Latch


class EarlyRestore:
    """Of one migration.  The owner ends `job` before it undoes anything."""

    def __init__(
        self, runtime: Runtime, jobs: Mapping[str, Job[Any]], wait_for_disks: Callable[[], None]
    ) -> None:
        """jobs: those that receive; `dump` is one of them.  wait_for_disks: until they are
        mounted."""
        self._runtime, self._jobs = runtime, jobs
        self._wait_for_disks = wait_for_disks
        self._first = Latch()
        self._released = False
        self.job = Job(self._begin)

    def start(self) -> None:
        """What `prepare_undump` has started waits.  Trees get their last pass late, and are not
        waited for here."""
        if self._runtime.first_image and not self._runtime.trees():
            self.job.start()

    def complete(self, image: str) -> None:
        """An image is complete."""
        if image == self._runtime.first_image:
            self._first.set()

    def _begin(self) -> None:
        """A failure comes again in `finish`, or in the restore."""
        self._wait_for_disks()
        while not self._first.wait(TICK):
            if self._jobs["dump"].over.is_set():
                return
        self._release()
        self._runtime.begin_undump()

    def _release(self) -> None:
        self._runtime.release()
        self._released = True

    def finish(self, timeout: float) -> None:
        """All is there, and the restore follows.  timeout: seconds."""
        self.job.end(timeout)
        if not self._released:
            self._release()
