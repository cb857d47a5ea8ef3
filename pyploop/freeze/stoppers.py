# SPDX-License-Identifier: Apache-2.0
"""Stop specs: what keeps a container from writing during the last blocks.

    cmd:COMMAND                 a shell command of the user's (-F too)
    cgroup:PATH                 the cgroup freezer, v1 or v2
    vzctl:CTID                  vzctl chkpnt CTID --suspend
    fs[:MOUNT]                  the source's file systems, at this place of the order

A Stopper is used once: `prepare` while everything runs, `stop`, then either
`leave` (success; it stays stopped) or `undo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pyploop.errors import ParameterError
from pyploop.freeze.command import run_command
from pyploop.freeze.filesystems import FileSystems
from pyploop.report.events import Reporter
from pyploop.system.mount_table import Mount
from pyploop.undo.ledger import UNDO_TIMEOUT, UndoLedger, UndoStep


@dataclass(frozen=True)
class Spec:
    """A stop spec as given.  argument: the text after the colon.  undo: the command
    that undoes a `cmd`.  name: its name in messages."""

    kind: str
    argument: str
    undo: str | None = None
    name: str = "the stop command"


def parse_spec(text: str) -> Spec:
    """ValueError when it is not a stop spec."""
    kind, colon, argument = text.partition(":")
    if kind == "fs" and (argument or not colon):
        return Spec(kind, argument, name=text)
    if kind in ("cgroup", "vzctl") and argument:
        return Spec(kind, argument, name=text)
    if kind == "cmd" and argument:
        return Spec(kind, argument, name="the command of --freeze")
    raise ValueError(
        f"{text!r} is not a stop spec (vzctl:CTID, cgroup:PATH, fs, fs:MOUNT or cmd:COMMAND)"
    )


class Stopper(Protocol):
    """One thing to stop, once."""

    name: str
    can_undo: bool
    """What `stop` did can be undone."""

    def prepare(self, plan: UndoLedger) -> None:
        """While everything runs: check that it can be stopped.  Stops nothing.
        PyploopError."""

    def stop(self, timeout: float | None) -> None:
        """Stop it within `timeout` seconds (None: no limit).  The undo step is in the
        plan before anything happens.  PyploopError."""

    def check(self) -> None:
        """LoopError when it is not stopped any more."""

    def leave(self) -> None:
        """It stays stopped, and the caller resumes it."""

    def undo(self) -> None:
        """Resume what `stop` stopped, or began to.  PyploopError."""

    def by_hand(self) -> str | None:
        """After a failed or impossible undo: what was not undone, and how to do it by
        hand; None: nothing."""


class CommandStopper:
    """A command of the user, undone by another one (--undo) if there is one."""

    def __init__(self, spec: Spec) -> None:
        self.name = spec.name
        self._command, self._undo = spec.argument, spec.undo
        self.can_undo = spec.undo is not None
        self._plan: UndoLedger | None = None
        self._undo_step: UndoStep | None = None
        self._ran = False

    def prepare(self, plan: UndoLedger) -> None:
        self._plan = plan

    def stop(self, timeout: float | None) -> None:
        assert self._plan is not None, "prepared"
        if self._undo is not None:
            self._undo_step = self._plan.add(
                {
                    "kind": "run",
                    "argv": ["/bin/sh", "-c", self._undo],
                    "timeout": UNDO_TIMEOUT,
                    "what": f"undo {self.name} with {self._undo!r}",
                }
            )
        run_command(self._command, self.name, timeout)
        self._ran = True

    def check(self) -> None:
        """What the command did is not known."""

    def leave(self) -> None:
        self._ran = False
        if self._undo_step is not None and self._plan is not None:
            self._plan.done(self._undo_step)

    def undo(self) -> None:
        if self._undo_step is not None and self._plan is not None:
            self._plan.undo(self._undo_step)
            self._ran = False

    def by_hand(self) -> str | None:
        if not self._ran:
            return None
        if self._undo is not None:
            return f"{self.name} {self._command!r} was not undone; run this by hand: {self._undo}"
        return f"what {self.name} {self._command!r} did was not undone (no --undo was given)"


class FsStopper:
    """The file systems, frozen at this place of the order."""

    can_undo = True

    def __init__(self, mounts: FileSystems, only: Mount | None) -> None:
        self.name = "fs" if only is None else f"fs:{only.point}"
        self._mounts, self._only = mounts, only

    def prepare(self, plan: UndoLedger) -> None:
        """Nothing: FileSystems.guard prepares all of them."""

    def stop(self, timeout: float | None) -> None:
        self._mounts.sync(self._only)
        self._mounts.freeze(self._only)

    def check(self) -> None:
        self._mounts.check_frozen()

    def leave(self) -> None:
        self._mounts.thaw(self._only)

    def undo(self) -> None:
        self._mounts.thaw(self._only)

    def by_hand(self) -> str | None:
        return None  # the message of FileSystems.thaw says how


def build(specs: list[Spec], mounts: FileSystems, report: Reporter) -> list[Stopper]:
    """The stoppers of these specs, in order.  Only what is used is loaded."""
    made: list[Stopper] = []
    for spec in specs:
        if spec.kind == "fs":
            only = mounts.include(spec.argument) if spec.argument else None
            if only is None and not len(mounts):
                raise ParameterError("--freeze fs: nothing is mounted from the source")
            made.append(FsStopper(mounts, only))
        elif spec.kind == "cgroup":
            from pyploop.freeze.cgroup import CgroupStopper

            made.append(CgroupStopper(spec.argument, report))
        elif spec.kind == "vzctl":
            from pyploop.freeze.vzctl import VzctlStopper

            made.append(VzctlStopper(spec.argument, report))
        else:
            made.append(CommandStopper(spec))
    return made
