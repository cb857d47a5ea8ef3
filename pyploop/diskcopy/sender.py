# SPDX-License-Identifier: Apache-2.0
"""The story of one copy, from the first pass to the thaw.

    track -> first pass -> rounds while running      precopy
          -> target synced -> one more round         approach
          -> stop command -> sync -> freeze -> prove -> last blocks
          -> durable at the peer -> thaw             freeze_stage

Invariants: clear, then read (the tracker hands out and clears, the pump reads
after that).  Nothing is delivered that the tracker could not prove complete:
what it may have missed is compared by hash and sent again, or the copy fails.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pyploop import _core
from pyploop.diskcopy import separate_target
from pyploop.diskcopy.approach import Approach
from pyploop.diskcopy.context import Context
from pyploop.diskcopy.freeze_policy import Round
from pyploop.diskcopy.freeze_stage import FreezeStage
from pyploop.diskcopy.hot_blocks import HotBlocks
from pyploop.diskcopy.measurements import Measurements
from pyploop.diskcopy.options import Options, Summary
from pyploop.diskcopy.precopy import PreCopy
from pyploop.diskcopy.relink import LinkLost
from pyploop.diskcopy.repairs import FreezeGivenUp, Repairs
from pyploop.diskcopy.source_pump import SourcePump
from pyploop.diskcopy.target import Output
from pyploop.disks.source import Source
from pyploop.disks.write_counters import Writes
from pyploop.errors import DeviceControlError, OpenError
from pyploop.freeze import FileSystems
from pyploop.freeze.session import FreezeSession
from pyploop.report.events import Reporter
from pyploop.report.slow_steps import SlowSteps
from pyploop.report.timeline import Recorder
from pyploop.trackers import Tracker
from pyploop.undo.ledger import UndoLedger
from pyploop.units import format_size

if TYPE_CHECKING:
    from pyploop.diskcopy.delta import Reused
    from pyploop.diskcopy.digests import Reader

FREEZES = 3
"""Freezes to try, when one is given up because of a long repair."""


class Sender:
    """Copies one source to one output, once: `run`, or its steps one by one.

    A context manager: tracking is on inside it, and nothing is frozen or tracked
    after it.  The steps are for callers that freeze several disks together; each
    step may run in a thread of its own.
    """

    def __init__(
        self, source: Source, tracker: Tracker, out: Output, options: Options, report: Reporter
    ) -> None:
        self._source, self._tracker, self._out = source, tracker, out
        self._options, self._report = options, report
        self._source_pump = SourcePump(source, tracker, out, options, report)
        self._undo = contextlib.ExitStack()
        self.recorder = Recorder()
        self.summary = Summary(
            source.path,
            source.size,
            tracker.name,
            source.io_mode,
            out.dialect,
            _core.hash_kernel(),
        )

    def run(self) -> Summary:
        """The whole copy."""
        with self:
            self.first_pass()
            self.converge()
            self.freeze_and_finish()
        return self.summary

    def freeze_and_finish(self) -> None:
        """The approach, the freeze, the end.  When a repair would take too long inside
        the freeze, the source is thawed, the repair is done while it runs, and the
        next approach begins."""
        for number in range(1, FREEZES + 1):
            self.prepare_freeze()
            try:
                with self.frozen():
                    self.last_blocks(may_thaw=self._context.session.can_undo)
                    self.finish()
                return
            except (FreezeGivenUp, LinkLost) as e:
                if isinstance(e, LinkLost) and self._bridged(e):
                    return
                self.recorder.give_up()
                self.summary.freezes_given_up += 1
                if number == FREEZES:
                    raise FreezeGivenUp(
                        f"{e}; this happened in {FREEZES} freezes: the source was thawed, and no "
                        "target was made"
                    ) from e
                self._report.note(
                    f"The source was thawed, and freeze {number + 1} of {FREEZES} follows: {e}"
                )
            self._context.repairs.run_left()

    def _bridged(self, lost: LinkLost) -> bool:
        """The connection was lost in the freeze, which has ended: wait for another one.  True:
        the copy was complete already, only the receiver's answer to END was lost."""
        context = self._context
        if not context.session.can_undo:
            raise lost
        if not context.source_pump.bridge(lost):
            if self._freeze.untracked:
                lost.add(f"the tracker {self._tracker.name} had ended, so no other freeze follows")
                raise lost
            return False
        self._freeze.complete_late()
        return True

    def __enter__(self) -> Sender:
        """Begin to track, and greet the peer."""
        source, report = self._source, self._report
        report.event("sending", image=source.image, size=source.size, clock=report.start)
        report.info(f"Source: {source.path}, {format_size(source.size)}, read by {source.io_mode}")
        report.info(f"Tracker: {self._tracker.name} ({self._tracker.why})")
        report.detail(f"Hash code: {self.summary.hash_kernel}")
        self._report_users()
        if source.must_be_mounted and not source.mounts:
            raise OpenError(
                f"{source.path} has no mount point, so it cannot be frozen: mount it, or name its "
                "mount point (--mount)",
                path=source.path,
            )
        with contextlib.ExitStack() as undo:
            self._context = context = self._open(undo)
            self._precopy = PreCopy(context, measurements := Measurements(context))
            self._approach = Approach(context, measurements, self._precopy)
            self._freeze = FreezeStage(context)
            self._track()
            self._greet()
            self._undo = undo.pop_all()
        return self

    def _open(self, undo: contextlib.ExitStack) -> Context:
        """Make the parts of the copy.  Nothing is tracked yet, and the peer is not asked."""
        source, tracker, out, options = self._source, self._tracker, self._out, self._options
        report, recorder = self._report, self.recorder
        plan = UndoLedger(f"copy of {source.path}", report)
        undo.callback(plan.close)
        undo.callback(tracker.stop, False)
        mounts = FileSystems(source.mounts, report, plan)
        undo.callback(mounts.close)
        undo.callback(SlowSteps(recorder, report, source.path).close)
        session = FreezeSession(options.stop_specs, mounts, plan, report, out.deadline)
        writes = Writes(source)
        undo.callback(writes.close)
        source_pump = self._source_pump
        return Context(
            source,
            tracker,
            out,
            options,
            report,
            plan=plan,
            mounts=mounts,
            session=session,
            source_pump=source_pump,
            writes=writes,
            hot=HotBlocks(source.size),
            repairs=Repairs(source_pump, report, self.summary, limited=bool(options.rate)),
            summary=self.summary,
            recorder=recorder,
        )

    def _track(self) -> None:
        """Make the checks that need no peer, and begin to track."""
        c = self._context
        separate_target.check(c.source, c.mounts.points, c.out)
        if (receipt := c.options.receipt) is not None:
            separate_target.check_receipt(
                c.source, c.mounts.points, receipt, frozen=c.options.before_thaw is not None
            )
        c.mounts.try_out()
        if c.options.throttle is not None:
            disk = None if c.source.block is None else c.source.block.disk_dev
            c.options.throttle.prepare(c.plan, disk, c.options.stop_specs)
        if c.source.monitor is not None:
            c.source.monitor.account(c.plan)
        c.tracker.start(c.plan)
        self._check_unfrozen()

    def _greet(self) -> None:
        """Greet the peer, and check the target.  It is touched only after that."""
        c = self._context
        if c.session:
            c.plan.launch()
        c.source_pump.greet()
        separate_target.check(c.source, c.mounts.points, c.out)  # as the peer says
        c.source_pump.watch_room()
        c.source_pump.begin()
        self.summary.dialect = c.out.dialect
        if c.out.write_mode.words:
            c.report.info(f"Target written: {c.out.write_mode.words}")
        c.report.info(f"Dialect: {c.out.dialect}")
        c.recorder.remote(c.out.heard)

    def _report_users(self) -> None:
        """Report the users of the source."""
        if self._source.monitor is None:
            return
        for text in self._source.monitor.warnings():
            self._report.note(text)
        self.summary.unsafe = self._source.monitor.unsafe
        for text in self.summary.unsafe:
            self._report.error(f"UNSAFE (--unsafe-in-use): {text}; the copy may be stale")

    def _check_unfrozen(self) -> None:
        """A file system that cannot be frozen needs an accounting that shows writes."""
        if (points := self._context.mounts.unfreezable) and not self._context.writes.knows:
            raise DeviceControlError(
                f"{', '.join(points)} cannot be frozen, and nothing shows whether it is written "
                "to (queue/iostats is off); nothing was copied",
                path=self._source.path,
                hint="unmount it, or make it read-only (mount -o remount,ro)",
            )

    def __exit__(self, *exc: object) -> None:
        if self._out.lanes is not None:
            self._out.lanes.refuse("the copy has ended")
        self._undo.close()

    def cancel(self) -> None:
        """From any thread: the step that runs, and each one after it, fails."""
        self._source_pump.cancel()

    # ---- running

    def reuse(self, digests: Reader) -> Reused:
        """Before the first pass: go on from what the target has kept of this source.
        digests: of what it has kept."""
        return self._precopy.reuse(digests)

    def first_pass(self) -> Round:
        """Send all data of the source, and holes that may not be zero at the target."""
        return self._precopy.first_pass()

    def round(self) -> Round:
        """Send what was dirtied until now, the file systems' page cache included."""
        return self._precopy.round(last=True)

    def converge(self) -> None:
        """Rounds until the policy leaves the rest to the freeze.  At least one when
        called again."""
        self._precopy.converge()

    @property
    def sent(self) -> int:
        """Bytes of payload so far."""
        return self._context.source_pump.stats.data

    def sync_target(self) -> str:
        """Make what was sent durable at the target.  Returns how that is known
        (`Output.sync`)."""
        return self._approach.sync_target()

    def prepare_freeze(self) -> None:
        """Sync the target, start the watchdog, and do one more round.  Does nothing when
        there is nothing to freeze or stop.  May be called again, when something else
        took long meanwhile."""
        self._approach.prepare_freeze()

    # ---- frozen

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Stopped and frozen while the body runs `last_blocks` and `finish`."""
        return self._freeze.frozen()

    def last_blocks(self, may_thaw: bool = False) -> None:
        """Send what is dirty until nothing is dirty and no event is missing.

        may_thaw: a long repair raises FreezeGivenUp, which thaws; the caller may try
        again.  Else a repair has until the freeze limit."""
        self._freeze.last_blocks(may_thaw)

    def finish(self) -> None:
        """Send the end of the image.  Returns when the target is durable, as far as that
        can be known (`summary.acknowledged`)."""
        self._freeze.finish()
