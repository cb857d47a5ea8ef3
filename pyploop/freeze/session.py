# SPDX-License-Identifier: Apache-2.0
"""The freeze of one copy: its stops in the order given, its file systems last.
Everything is undone in reverse order.

How long: `Deadline`.  This process gives up first, the watchdog a little later;
once the end of the stream may be sent, the watchdog waits until the hard limit
for the peer's acknowledgement.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from pyploop.errors import DeviceControlError, LoopError, OpenError, PyploopError
from pyploop.freeze.deadline import Deadline, Limits
from pyploop.freeze.filesystems import FileSystems
from pyploop.freeze.stoppers import CommandStopper, Spec, Stopper, build
from pyploop.report.events import Reporter
from pyploop.undo.journal import folder
from pyploop.undo.ledger import UndoLedger

STOP_ASSUMED = 0.01
"""Seconds of one stop command, since it cannot be tried out."""


def newer(why: str) -> LoopError:
    """The failure after which there is a target that must not be used."""
    return LoopError(
        f"the target is complete, but may be older than the source, which {why}",
        hint="go on with the source, and copy it again",
    )


class FreezeSession:
    """What is stopped and frozen for one copy."""

    def __init__(
        self,
        specs: Sequence[Spec],
        mounts: FileSystems,
        plan: UndoLedger,
        report: Reporter,
        deadline: Deadline,
    ) -> None:
        """deadline: begins with the first stop."""
        self._deadline = deadline
        self._mounts, self._plan, self._report = mounts, plan, report
        self._stoppers = build(list(specs), mounts, report)
        self._begun: list[Stopper] = []

    def __bool__(self) -> bool:
        """There is something to stop or freeze."""
        return bool(self._stoppers or self._mounts)

    @property
    def can_undo(self) -> bool:
        """All that is stopped can be resumed, and stopped again later."""
        return all(stopper.can_undo for stopper in self._stoppers)

    @property
    def expected(self) -> float:
        """Seconds that stopping is expected to take."""
        return STOP_ASSUMED * len(self._stoppers)

    def prepare(self) -> None:
        """While all runs: take the locks, start the watchdog and the journal, and check
        that each can be stopped."""
        if self._mounts:
            self._check_journal()
            self._mounts.guard()
        for stopper in self._stoppers:
            stopper.prepare(self._plan)

    def _check_journal(self) -> None:
        try:
            where = folder()
            point = self._mounts.holding(os.stat(where if where.exists() else where.parent).st_dev)
        except (OpenError, OSError):
            return  # UndoLedger.start reports why there is no journal
        if point is not None:
            self._plan.drop_journal(f"{where} lies on {point}, which will be frozen")

    def stop(self, limits: Limits | None) -> None:
        """Stop in order; the deadline begins."""
        self._let_go()
        if limits is not None:
            self._deadline.begin(limits, self._plan.watch)
            self._plan.start()
        if self:
            self._plan.limit(None if limits is None else limits.watchdog)
        for stopper in self._stoppers:
            self._begun.append(stopper)
            stopper.stop(self._deadline.left)
            self._plan.watch()

    def _let_go(self) -> None:
        """A command may unmount: so no descriptor of a mount point stays open, neither
        here nor in the watchdog."""
        if self._mounts and any(isinstance(s, CommandStopper) for s in self._stoppers):
            self._mounts.let_go()
            self._plan.start()
            self._plan.settle()

    def watch(self) -> None:
        """Raises what UndoLedger.watch raises: the watchdog has thawed, or died.  It is not
        asked, so this costs nothing."""
        self._plan.watch()

    def check(self) -> None:
        """LoopError when something is not stopped or frozen any more."""
        self._plan.watch()
        self._check_stopped()

    def _check_stopped(self) -> None:
        for stopper in self._begun:
            stopper.check()
        self._mounts.check_frozen()

    def commit(self) -> None:
        """END may be sent: nothing has been undone, and the watchdog undoes nothing
        before the hard limit."""
        self.check()
        self._plan.renew(self._deadline.left_to_watchdog)
        self._deadline.commit()

    def before_end(self) -> None:
        """The last check, right before END is written: this process may have been
        asleep since `commit`."""
        self._plan.in_time()

    def complete(self) -> None:
        """The target is complete: the limit ends.  LoopError when the source may
        have run before now."""
        self._plan.take_over()
        try:
            self._plan.watch()
        except LoopError:
            raise newer("was thawed when the limit had passed (--freeze-limit)") from None
        except DeviceControlError:
            # No watchdog is left to undo.  Whether all is still stopped and frozen
            # is checked below.
            self._report.info("The thaw watchdog died during the last steps")
        try:
            self._check_stopped()
        except LoopError as e:
            raise newer(f"may have been running again ({e})") from None

    def release(self, resume: bool) -> None:
        """After `complete`: thaw.  resume: resume what was stopped, too; else that is
        left to the caller.  RCU stays expedited until `FileSystems.cool_down`."""
        self._mounts.thaw(warm=True)
        while self._begun:
            stopper = self._begun[-1]
            if resume:
                stopper.undo()
            else:
                stopper.leave()
            self._begun.pop()
        self._plan.unlimit()

    def undo(self) -> list[str]:
        """After a failure: undo all, in reverse.  Never raises; returns a sentence for
        each step that could not be undone."""
        self._plan.take_over()
        left = self._attempt(self._mounts.thaw)
        while self._begun:
            stopper = self._begun.pop()
            left += self._attempt(stopper.undo)
            left += [words] if (words := stopper.by_hand()) else []
        self._plan.unlimit()
        return left

    @staticmethod
    def _attempt(step: Callable[[], None]) -> list[str]:
        try:
            step()
        except PyploopError as e:
            return [str(e)]
        return []

    @contextlib.contextmanager
    def undo_on_failure(self) -> Iterator[None]:
        """When the body fails, all is undone.  The failure's message then ends with the
        state of the source: that it was resumed, or what could not be undone."""
        try:
            yield
        except BaseException as e:
            left = self.undo()
            if isinstance(e, PyploopError) and e.args:
                # What a command without --undo has stopped is not known here.
                if not left and self and self.can_undo:
                    left = ["what this copy had stopped or frozen was resumed"]
                e.args = ("; ".join([str(e.args[0]), *left]),)
            else:
                for words in left:
                    self._report.error(words)
            raise
