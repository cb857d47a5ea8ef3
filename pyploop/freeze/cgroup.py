# SPDX-License-Identifier: Apache-2.0
"""Stops a copy's source by its cgroup's freezer.

A frozen task has stopped at the border of the kernel, so it holds no lock of a
file system.  A task that waits for a frozen file system is in state D, and
cannot be frozen by v2 any more (nor by v1 before Linux 6.1).  Hence: cgroups
first, then file systems.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pyploop.errors import CommandError, LoopError, OpenError, ParameterError
from pyploop.freeze.cgroup_freezer import Freezer, freezer_in
from pyploop.report.events import Reporter
from pyploop.system.mount_table import cgroup_mounts
from pyploop.system.sysblock import text_of
from pyploop.undo.ledger import UndoLedger, UndoStep

FREEZE_DEADLINE = 10.0
"""Seconds until all tasks of a cgroup must have stopped."""


def find(path: str) -> Freezer:
    """The freezer of a cgroup.  path: its folder, or its name in its hierarchy.
    OpenError: there is none.  ParameterError: two cgroups have this name."""
    if (here := Path(path)).is_absolute() and (found := freezer_in(here)):
        return found
    candidates: dict[int, Freezer] = {}
    for root, controllers in cgroup_mounts():
        if controllers is None or "freezer" in controllers:
            folder = Path(root) / path.lstrip("/")
            if ".." not in Path(path).parts and (found := freezer_in(folder)):
                # By inode number: one hierarchy may be mounted twice.
                candidates.setdefault(found.knob.stat().st_ino, found)
    # systemd and others make the same cgroup in each hierarchy: take the one with processes.
    populated = [c for c in candidates.values() if c.processes()] or list(candidates.values())
    if not populated:
        raise OpenError(
            f"no cgroup {path} with a freezer (the root of a hierarchy has none)",
            hint="name the cgroup by its whole path, below /sys/fs/cgroup",
        )
    if len(populated) > 1:
        names = " and ".join(str(c.folder) for c in populated)
        raise ParameterError(f"cgroup {path} is both {names}: give the whole path")
    return populated[0]


class CgroupStopper:
    """Freezes one cgroup and all below it.  One that is already frozen stays so."""

    can_undo = True

    def __init__(self, path: str, report: Reporter) -> None:
        self.name = f"cgroup:{path}"
        self._path, self._report = path, report
        self._plan: UndoLedger | None = None
        self._freezer: Freezer | None = None
        self._undo_step: UndoStep | None = None
        self._stopped = False

    @property
    def freezer(self) -> Freezer:
        assert self._freezer is not None, "prepared"
        return self._freezer

    def prepare(self, plan: UndoLedger) -> None:
        self._plan = plan
        freezer = self._freezer = find(self._path)
        processes = freezer.processes()
        if os.getpid() in processes:
            raise ParameterError(
                f"cannot freeze cgroup {freezer.folder}: this process is in it; nothing was frozen",
                path=str(freezer.folder),
                hint="start pyploop in another cgroup",
            )
        if not processes:
            self._report.note(f"{freezer.folder} contains no process: freezing it stops nothing")
        plan.start()
        # Journaled now, which costs no frozen time.  To thaw what is not frozen is harmless.
        self._undo_step = plan.prepare(
            {
                "kind": "write",
                "path": str(freezer.knob),
                "inode": freezer.knob.stat().st_ino,
                "value": freezer.thaw_word,
                "what": f"thaw cgroup {freezer.folder}",
                "by_hand": f"echo {freezer.thaw_word} > {freezer.knob}",
            }
        )

    def stop(self, timeout: float | None) -> None:
        freezer, plan = self.freezer, self._plan
        assert plan is not None and self._undo_step is not None
        seconds = FREEZE_DEADLINE if timeout is None else min(timeout, FREEZE_DEADLINE)
        try:
            if freezer.asked():
                self._report.info(
                    f"{freezer.folder} is already frozen, and stays frozen after the copy"
                )
                plan.done(self._undo_step)
                self._undo_step = None
            else:
                plan.add(self._undo_step)
                freezer.knob.write_text(freezer.freeze_word)
            self._stopped = True
            if freezer.wait(time.monotonic() + seconds):
                return
        except OSError as e:
            raise CommandError.of(f"cannot freeze cgroup {freezer.folder}", e) from e
        raise CommandError(
            f"cgroup {freezer.folder} did not freeze within {seconds:g} s{self._who()}"
        )

    def _who(self) -> str:
        """The first process that cannot be frozen: it is in an uninterruptible wait."""
        for pid in self.freezer.processes():
            try:
                text = text_of(Path(f"/proc/{pid}/stat"))
            except OSError:
                continue
            left, _, right = text.rpartition(")")
            if right.split()[0] == "D":
                name = left.partition("(")[2]
                return f": process {pid} ({name}) is in an uninterruptible wait"
        return ""

    def check(self) -> None:
        if self._stopped and not self.freezer.frozen():
            raise LoopError(
                f"cgroup {self.freezer.folder} was thawed by another process during the last "
                "blocks",
                path=str(self.freezer.folder),
            )

    def leave(self) -> None:
        self._stopped = False
        if self._undo_step is not None and self._plan is not None:
            self._plan.done(self._undo_step)

    def undo(self) -> None:
        if self._undo_step is not None and self._plan is not None:
            self._stopped = False
            if not self._plan.undo(self._undo_step):
                self._plan.done(self._undo_step)

    def by_hand(self) -> str | None:
        return None  # the message of UndoLedger.undo says how
