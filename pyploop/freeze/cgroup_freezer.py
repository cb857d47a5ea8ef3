# SPDX-License-Identifier: Apache-2.0
"""One cgroup's freezer, v1 (freezer.state) and v2 (cgroup.freeze), written
directly: no process is started."""

from __future__ import annotations

import contextlib
import os
import select
import time
from dataclasses import dataclass
from pathlib import Path

from pyploop.system.tree_walk import walk

LONGEST_POLL = 0.001
"""Seconds between two reads of a v1 freezer's state.  It sends no notification, and
a read makes it check its tasks again."""


@dataclass(frozen=True)
class Freezer:
    """One cgroup's freezer.  v2: the unified hierarchy."""

    folder: Path
    v2: bool

    @property
    def knob(self) -> Path:
        return self.folder / ("cgroup.freeze" if self.v2 else "freezer.state")

    @property
    def freeze_word(self) -> str:
        return "1" if self.v2 else "FROZEN"

    @property
    def thaw_word(self) -> str:
        return "0" if self.v2 else "THAWED"

    def asked(self) -> bool:
        """This cgroup itself is to be frozen, whatever its parents are."""
        knob = self.knob if self.v2 else self.folder / "freezer.self_freezing"
        return knob.read_text().strip() == "1"

    def frozen(self) -> bool:
        """Every task in it, and in the cgroups below it, has stopped."""
        if self.v2:
            return "frozen 1" in (self.folder / "cgroup.events").read_text().splitlines()
        return self.knob.read_text().strip() == "FROZEN"

    def wait(self, deadline: float) -> bool:
        """Wait until it is frozen.  False: the deadline (time.monotonic()) has passed."""
        if self.v2:
            return self._wait_for_event(deadline)
        pause = LONGEST_POLL / 8
        while not self.frozen():
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_POLL)
        return True

    def _wait_for_event(self, deadline: float) -> bool:
        with (self.folder / "cgroup.events").open() as f:
            poll = select.poll()
            poll.register(f, select.POLLPRI)
            while True:
                f.seek(0)
                if "frozen 1" in f.read().splitlines():
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(min(left, 0.1) * 1000)

    def processes(self) -> list[int]:
        """The PIDs in this cgroup and those below it, sorted."""
        found: list[int] = []
        with contextlib.suppress(FileNotFoundError):
            for _, folder, _ in walk(str(self.folder)):
                try:
                    with open(os.open("cgroup.procs", os.O_RDONLY, dir_fd=folder)) as f:
                        found += [int(line) for line in f.read().split()]
                except OSError:  # removed, or threaded
                    continue
        return sorted(set(found))


def freezer_in(folder: Path) -> Freezer | None:
    """The freezer of the cgroup with this folder; None: it has none."""
    for v2 in (False, True):
        freezer = Freezer(folder, v2)
        if freezer.knob.exists():
            return freezer
    return None
