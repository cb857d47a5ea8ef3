# SPDX-License-Identifier: Apache-2.0
"""Suspend and resume an OpenVZ container with vzctl, by its documented
contract: options, exit codes, and the line that `status` prints.

vzctl is called with --skiplock, as vzmigrate calls it: the program that starts
us has the container's lock.  `vzctl:CTID,lock` leaves --skiplock off, for use by
hand: then vzctl refuses while another program works on the container.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from pyploop.errors import (
    BusyError,
    CommandError,
    LoopError,
    OpenError,
    ParameterError,
    PyploopError,
)
from pyploop.freeze import cgroup, command
from pyploop.freeze.cgroup_freezer import Freezer
from pyploop.report.events import Reporter
from pyploop.undo.ledger import UNDO_TIMEOUT, UndoLedger, UndoStep

SUSPEND_DEADLINE = 60.0
"""Seconds of `chkpnt --suspend`."""
STATUS_DEADLINE = 15.0

_CODES = {
    3: "a system error",
    5: "not an OpenVZ kernel",
    9: "the container is locked by another vzctl or vzmigrate",
    16: "the checkpoint failed (see the kernel log)",
    17: "the restore failed (see the kernel log)",
    20: "a bad parameter",
    21: "a bad value of a parameter",
    31: "the container is not running",
    32: "the container is running",
    40: "the container's file system is not mounted",
    41: "the container's file system is mounted",
}
_NOTHING_DONE = (5, 9, 20, 21, 31, 32, 40, 41)
"""Exit codes after which `chkpnt --suspend` has changed nothing."""


def explain(what: str, code: int) -> PyploopError:
    """vzctl's exit code as an error to act on."""
    text = f"{what}: {_CODES.get(code, 'see vzctl(8)')} (vzctl exited with {code})"
    return BusyError(text) if code == 9 else CommandError(text)


@dataclass(frozen=True)
class Status:
    """What `vzctl status` says of a container."""

    exists: bool
    running: bool
    suspended: bool
    mounted: bool


def parse_status(text: str, ctid: str) -> Status:
    """`CTID N exist|deleted mounted|unmounted running|down [suspended]`;
    CommandError for anything else."""
    words = text.split()
    good = (
        len(words) in (5, 6)
        and words[0] == "CTID"
        and words[2] in ("exist", "deleted")
        and words[3] in ("mounted", "unmounted")
        and words[4] in ("running", "down")
        and words[5:] in ([], ["suspended"])
    )
    if not good:
        raise CommandError(f"vzctl status {ctid} answered {text.strip()[:80]!r}, not with a status")
    return Status(
        words[2] == "exist", words[4] == "running", len(words) == 6, words[3] == "mounted"
    )


class VzctlStopper:
    """Suspends one container.  One that is already suspended stays so."""

    can_undo = True

    def __init__(self, argument: str, report: Reporter) -> None:
        ctid, comma, option = argument.partition(",")
        if not ctid or ctid.startswith("-") or (comma and option != "lock"):
            raise ParameterError(f"vzctl:{argument}: expected vzctl:CTID or vzctl:CTID,lock")
        self.name = f"vzctl:{ctid}"
        self._ctid, self._report = ctid, report
        self._options = [] if comma else ["--skiplock"]
        self._plan: UndoLedger | None = None
        self._undo_step: UndoStep | None = None
        self._left_so = False
        self._freezer: Freezer | None = None
        """Of the container's cgroup, if it shows a suspension."""

    def _chkpnt(self, step: str, timeout: float) -> int:
        argv = ["vzctl", *self._options, "chkpnt", self._ctid, step]
        return command.exit_code(argv, " ".join(argv), timeout)

    def _resume_argv(self) -> list[str]:
        # Without the lock: the program that has it may be waiting for us.
        return ["vzctl", "--skiplock", "chkpnt", self._ctid, "--resume"]

    def status(self) -> Status:
        argv = ["vzctl", "status", self._ctid]
        code, text = command.answer(argv, " ".join(argv), STATUS_DEADLINE)
        if code:
            raise explain(f"cannot get the status of container {self._ctid}", code)
        return parse_status(text, self._ctid)

    def prepare(self, plan: UndoLedger) -> None:
        self._plan = plan
        status = self.status()
        if not (status.exists and status.running):
            raise CommandError(f"container {self._ctid} is not running: nothing to suspend")
        self._left_so = status.suspended
        with contextlib.suppress(OpenError, ParameterError):
            self._freezer = cgroup.find(self._ctid)
        plan.start()

    def stop(self, timeout: float | None) -> None:
        assert self._plan is not None, "prepared"
        if self._left_so:
            self._report.info(
                f"Container {self._ctid} is already suspended, and stays suspended after the copy"
            )
            self._see_suspended()
            return
        resume = self._resume_argv()
        self._undo_step = self._plan.add(
            {
                "kind": "run",
                "argv": resume,
                "timeout": UNDO_TIMEOUT,
                "what": f"resume container {self._ctid}",
                "by_hand": " ".join(resume),
            }
        )
        seconds = SUSPEND_DEADLINE if timeout is None else min(timeout, SUSPEND_DEADLINE)
        code = self._chkpnt("--suspend", seconds)
        if code in _NOTHING_DONE:
            # Above all when it is locked: the lock's owner may have suspended it.
            self._plan.done(self._undo_step)
            self._undo_step = None
        if code:
            raise explain(f"cannot suspend container {self._ctid}", code)
        self._see_suspended()

    def _see_suspended(self) -> None:
        if self._freezer is not None and not self._freezer.frozen():
            self._freezer = None  # its cgroup does not show a suspension

    def check(self) -> None:
        """By its cgroup, since vzctl would cost frozen time."""
        if self._freezer is not None and not self._freezer.frozen():
            raise LoopError(
                f"container {self._ctid} was resumed by another process during the last blocks"
            )

    def leave(self) -> None:
        if self._undo_step is not None and self._plan is not None:
            self._plan.done(self._undo_step)
            self._undo_step = None

    def undo(self) -> None:
        step, plan = self._undo_step, self._plan
        if step is None or plan is None:
            return
        self._undo_step = None
        try:
            plan.undo(step)
        except CommandError:
            # A failed suspend has resumed it already, and vzctl refuses to resume what
            # is not suspended.
            status = self.status()
            if not status.running or status.suspended:
                raise
            plan.done(step)

    def by_hand(self) -> str | None:
        return None  # UndoLedger.undo's own message says it
