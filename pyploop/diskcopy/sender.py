# SPDX-License-Identifier: Apache-2.0
"""The story of one copy, from the first pass to the thaw.

    track -> first pass -> rounds while running -> synced -> one more round
          -> stop command -> sync -> freeze -> prove -> last blocks
          -> durable at the peer -> thaw

Invariants: clear, then read (the tracker hands out and clears, the pump reads
after that).  Nothing is delivered that the tracker could not prove complete:
what it may have missed is compared by hash and sent again, or the copy fails.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyploop import _core
from pyploop.diskcopy import separate_target
from pyploop.diskcopy.freeze_policy import Round
from pyploop.diskcopy.options import Options, Summary
from pyploop.diskcopy.precopy import Running, words
from pyploop.diskcopy.repairs import FreezeGivenUp
from pyploop.diskcopy.source_pump import Passes
from pyploop.diskcopy.target import Output
from pyploop.disks.image import clear_in_use
from pyploop.disks.source import Source
from pyploop.disks.write_counters import Writes
from pyploop.errors import DeviceControlError, LoopError, OpenError
from pyploop.freeze import FileSystems, run_command
from pyploop.freeze.deadline import Limits
from pyploop.freeze.session import Hold, newer
from pyploop.freeze.stoppers import Spec
from pyploop.report.events import Reporter
from pyploop.report.slow_steps import Patience
from pyploop.report.timeline import Recorder
from pyploop.system.worker import run_cancellable
from pyploop.trackers import Repair, Tracker, Verdict
from pyploop.undo.ledger import Plan
from pyploop.units import format_size

if TYPE_CHECKING:
    from pyploop.diskcopy.delta import Reused
    from pyploop.diskcopy.digests import Reader

FINAL_PASSES = 3
"""Passes with dirty blocks inside the freeze before it is called a loop."""
UNSTOPPED_PASSES = 20
"""The same when nothing stops the writer."""
FREEZES = 3
"""Freezes that are begun, when one had to be given up for a long repair."""


class Sender:
    """Copies one source to one output, once: `run`, or its steps one by one.

    A context manager: tracking is on inside it, and nothing is frozen or
    tracked after it.  The steps are for those who freeze several disks
    together; each may be run in a thread of its own.
    """

    def __init__(
        self, source: Source, tracker: Tracker, out: Output, options: Options, report: Reporter
    ) -> None:
        self._source, self._tracker, self._out = source, tracker, out
        self._options, self._report = options, report
        self._passes = Passes(source, tracker, out, options, report)
        self._undo = contextlib.ExitStack()
        self._may_thaw = False
        self._doubt = ""
        """What the last pass had to compare for."""
        self._stamp: tuple[int, ...] = ()
        """What `Writes` told at the beginning of the last pass."""
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
        """The approach, the freeze, the end.  When too much would have to be
        compared inside the freeze, all is undone, that is compared while the
        source runs, and the next approach begins."""
        for number in range(1, FREEZES + 1):
            self.prepare_freeze()
            try:
                with self.frozen():
                    self.last_blocks(may_thaw=self._hold.can_undo)
                    self.finish()
                return
            except FreezeGivenUp as e:
                self.recorder.give_up()
                self.summary.freezes_given_up += 1
                if number == FREEZES:
                    raise FreezeGivenUp(
                        f"{e}; it was so in {FREEZES} freezes, the source was thawed and no "
                        "target was made"
                    ) from e
                self._report.note(f"Thawed, and on with freeze {number + 1} of {FREEZES}: {e}")
            self._running.repairs.run_left()

    def __enter__(self) -> Sender:
        """Tracking begins, and the peer is found out about."""
        source, report = self._source, self._report
        report.event("sending", image=source.image, size=source.size, clock=report.start)
        report.info(f"Source: {source.path}, {format_size(source.size)}, read by {source.io_mode}")
        report.info(f"Tracker: {self._tracker.name} ({self._tracker.why})")
        self._tell_users()
        if source.kind == "ploop" and not source.mounts:
            raise OpenError(f"{source.path} has no mount point, so it cannot be frozen")
        with contextlib.ExitStack() as undo:
            self._plan = Plan(f"copy of {source.path}", report)
            undo.callback(self._plan.close)
            undo.callback(self._tracker.stop, False)
            self._mounts = FileSystems(source.mounts, report, self._plan)
            undo.callback(self._mounts.close)
            undo.callback(Patience(self.recorder, report, source.path).close)
            self._hold = Hold(self._specs(), self._mounts, self._plan, report, self._out.deadline)
            self._writes = Writes(source)
            undo.callback(self._writes.close)
            separate_target.check(source, self._mounts.points, self._out)
            self._mounts.try_out()
            if self._options.throttle is not None:
                disk = None if source.block is None else source.block.disk_dev
                self._options.throttle.prepare(self._plan, disk, self._specs())
            if source.lookout is not None:
                source.lookout.account(self._plan)
            self._tracker.start(self._plan)
            self._check_unfrozen()
            if self._hold:
                self._plan.launch()
            self._passes.greet()
            separate_target.check(source, self._mounts.points, self._out)  # as the peer has told
            self._passes.watch_room()
            self._passes.begin()
            self.summary.dialect = self._out.dialect
            report.info(f"Dialect: {self._out.dialect}")
            self.recorder.remote(self._out.heard)
            self._running = Running(
                source,
                self._tracker,
                self._out,
                self._options,
                report,
                hold=self._hold,
                mounts=self._mounts,
                passes=self._passes,
                summary=self.summary,
                recorder=self.recorder,
            )
            self._undo = undo.pop_all()
        return self

    def _tell_users(self) -> None:
        """Whom the copy finds at work on the source."""
        if self._source.lookout is None:
            return
        for text in self._source.lookout.warnings():
            self._report.note(text)
        self.summary.unsafe = self._source.lookout.unsafe
        for text in self.summary.unsafe:
            self._report.error(f"UNSAFE (--unsafe-in-use): {text}; the copy may be stale")

    def _check_unfrozen(self) -> None:
        """What is mounted and cannot be frozen needs somebody who sees writes."""
        if (points := self._mounts.unfreezable) and not self._writes.knows:
            raise DeviceControlError(
                f"{', '.join(points)} cannot be frozen, and nothing here tells whether it is "
                "written to (queue/iostats is off): unmount it, or mount -o remount,ro"
            )

    def _specs(self) -> list[Spec]:
        command = self._options.stop_command
        return [*self._options.stops, *([Spec("cmd", command)] if command else [])]

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def cancel(self) -> None:
        """From any thread: the step that runs, and each one after it, fails."""
        self._passes.cancel()

    # ---- running

    def reuse(self, digests: Reader) -> Reused:
        """Before the first pass: go on from what the target has kept of this
        source, as its digests tell."""
        return self._running.reuse(digests)

    def first_pass(self) -> Round:
        """All data of the source, and what may not be zero at the target."""
        return self._running.first_pass()

    def round(self) -> Round:
        """What was dirtied until now, the file systems' page cache included."""
        return self._running.round(last=True)

    def converge(self) -> None:
        """Rounds until the policy says that the rest is for the freeze; called
        again, at least one."""
        self._running.converge()

    @property
    def sent(self) -> int:
        """Bytes of payload so far."""
        return self._passes.stats.data

    def sync_target(self) -> str:
        """What was sent is durable at the target when this returns, as far as
        that can be known: the answer says how (`Output.sync`)."""
        return self._running.sync_target()

    def prepare_freeze(self) -> None:
        """The target durable so far, the watchdog ready, and one more round;
        nothing when there is nothing to freeze or stop.  May be called again, when
        something else took its time meanwhile."""
        self._running.prepare_freeze()

    # ---- frozen

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stopped and frozen while the body runs `last_blocks` and `finish`."""
        report, step = self._report, self.recorder.step
        report.event("phase", phase="frozen", bytes=None)
        before = self._passes.stats.data
        with contextlib.ExitStack() as held:
            held.callback(self._run_on)
            held.enter_context(report.held())
            held.enter_context(self._hold.undone())
            held.enter_context(_no_collection())
            self.recorder.stage = "frozen"
            self._stop_and_freeze()
            try:
                yield
            except FreezeGivenUp as e:
                self._undo_to_go_on(e)
                raise
            if self._options.before_thaw:
                with step("before thaw"):
                    what = "the target is complete, but the command before the thaw"
                    run_command(self._options.before_thaw, what, self._out.deadline.left)
            with step("thaw"):
                self._hold.complete()
                if self._written():
                    raise newer("was written during the last steps")
                self._hold.release(self._options.resume)
            self.recorder.stage = "running"
            self._stop_watching()
            self._tell(self._passes.stats.data - before)

    def _stop_watching(self) -> None:
        """Ending a watch (fanotify, inotify) waits for a grace period of the kernel,
        8 ms each unless it is expedited, and a caller who has stopped the source waits
        for our end."""
        self._tracker.stop(False)
        if self._source.lookout is not None:
            self._source.lookout.close()
        self._mounts.cool_down()

    def _undo_to_go_on(self, why: FreezeGivenUp) -> None:
        """Fails when something is left as it is: the source does not run then."""
        if left := self._hold.undo():
            raise LoopError("; ".join([f"{why}; no target was made", *left])) from why
        self._plan.watch()  # what went past the limit is no freeze to begin again

    def _run_on(self) -> None:
        """After the freeze the source runs, and nothing is in a hurry."""
        self.recorder.stage = "running"
        self._passes.limit(running=True)
        self._out.deadline.clear()

    def _stop_and_freeze(self) -> None:
        options, step = self._options, self.recorder.step
        self._passes.limit(running=False)
        scanned = self._tracker.name == "scan" and not self._mounts
        limits = None
        if options.freeze_limit and self._running.stops and not scanned:
            # A scan compares all there is after the stop: as long as it takes.
            limits = Limits.of(options.freeze_limit)
        with step("stop command") if self._specs() else contextlib.nullcontext():
            self._hold.stop(limits)
        if options.throttle is not None:
            options.throttle.remove()
            self._hold.watch()
        with step("source sync"):
            run_cancellable(self._running.write_back)
            self._hold.watch()
        with step("freeze"):
            self._mounts.freeze()
            # What the freeze itself wrote to a loop device on top of the source; and
            # what somebody wrote through a device since the sync.
            self._source.write_back()
            self._hold.watch()

    def last_blocks(self, may_thaw: bool = False) -> None:
        """Send what is dirty until nothing is, and no event is missing.

        may_thaw: a long repair raises FreezeGivenUp, after which all is undone,
        and `freeze_and_finish` goes on; else it has until the freeze limit."""
        self._may_thaw = may_thaw
        limit = FINAL_PASSES if self._running.stops else UNSTOPPED_PASSES
        for _ in range(limit):
            self._stamp = self._writes.begin()
            if self._last_pass():
                break
        else:
            raise self._still_written()
        with self.recorder.step("prove"):
            self._source.check_same()
            self._hold.check()
            if self._written():
                raise self._still_written()

    def finish(self) -> None:
        """The end of the image; returns when the target is durable, as far as
        that can be known (`summary.acknowledged`)."""
        pump, step = self._passes.pump, self.recorder.step
        with step("last blocks"):
            start = self._passes.first_bytes(self._out.header_size)
            if self._tracker.stop_before_end:
                self._tracker.stop(True)
            if self._source.image_format == "ploop1":
                self._out.header(pump, clear_in_use(start))
        with step("prove"):
            self._hold.commit()
            if self._written():
                raise self._still_written()
        with step("target commit"):
            size = self._source.size
            self._out.before_end = self._hold.before_end
            self.summary.acknowledged = self._out.finish(pump, size, start[:4])
        if self.summary.acknowledged == "acknowledged":
            self.recorder.remote(self._out.heard)

    def _tell(self, sent: int) -> None:
        """The summary's figures, and the events about them."""
        s, report, stats = self.summary, self._report, self._passes.stats
        self._passes.tell_notes()
        s.frozen = self.recorder.seconds("frozen")
        s.frozen_remote = self.recorder.seconds("frozen", "target")
        s.frozen_total = sum(s.frozen.values())
        s.frozen_window = self.recorder.window("target commit")
        if s.predicted is not None and s.frozen_window:
            s.prediction_ratio = s.frozen_window / s.predicted
        s.frozen_bytes = sent
        s.largest_part = self.recorder.advice()
        s.clock_offset, s.clock_error = self.recorder.clock.offset, self.recorder.clock.error
        if self._out.heard is not None:
            s.target_dirty = self._out.heard.times.dirty
        report.event(
            "frozen",
            steps=s.frozen,
            remote=s.frozen_remote,
            total=s.frozen_total,
            window=s.frozen_window,
            sent=sent,
        )
        report.info(
            f"Frozen for {s.frozen_total:.3f} s ({format_size(sent)} sent): "
            + ", ".join(f"{k} {v:.3f}" for k, v in self.recorder.frozen_parts().items())
        )
        if s.predicted is not None:
            report.info(
                f"Predicted: {s.predicted:.3f} s until the target is durable; "
                f"it was {s.frozen_window:.3f} s"
            )
        s.data_bytes, s.wire_bytes, s.read_bytes = stats.data, stats.wire, stats.read
        s.frames = stats.frames
        report.event("summary", **vars(s))

    def _last_pass(self) -> bool:
        """One pass over what is dirty; true when it was the last."""
        with self.recorder.step("prove"):
            verdict = self._tracker.check(quiesced=True)
        if verdict.state == "busy":
            raise self._still_written()
        beside = self._running.beside(frozen=True)
        self._doubt = ""
        with self.recorder.step("last blocks"):
            sent = self._passes.send(self._running.take())
        if beside:
            with self.recorder.step("repair"):
                self._compare(self._running.compare_all(beside), "; ".join(beside))
            return False
        if verdict.state in ("complete", "unknown"):
            self.summary.completeness = verdict.state
            # A stopped scan has compared everything: once is enough.
            stopped = self._running.stops and self._tracker.name == "scan" and not self._unseen()
            # Unstopped, it sees nothing of what is written behind it.
            behind = self._tracker.name == "scan" and self._writes.stamp() != self._stamp
            return stopped or (sent == 0 and not behind)
        with self.recorder.step("repair"):
            self._repair(verdict)
        return False  # prove again, from the new base

    def _repair(self, verdict: Verdict) -> None:
        """Compare what the tracker may have missed."""
        path = self._source.path
        self._doubt = words(verdict)
        # The watchdog undoes what the tracker needs as well.
        self._out.deadline.check()
        repair = self._tracker.repair(quiesced=True)
        if repair is None:
            raise DeviceControlError(
                f"tracking of {path} lost events ({words(verdict)}) and cannot "
                "tell which; no target was made"
            )
        self._compare(repair, f"tracking of {path} could not be proven ({words(verdict)})")

    def _compare(self, repair: Repair, why: str) -> None:
        """As long as a freeze may last."""
        repairs, left = self._running.repairs, self._out.deadline.left
        if self._may_thaw and self._running.stops:
            allowed = self._running.allowed
            left = allowed if left is None else min(left, allowed)
        until = None if left is None else time.monotonic() + left
        if repairs.run(repair, frozen=True, until=until) is not None:
            return
        why += f", and comparing {repair.scope} would take {repairs.seconds_left:.1f} s more"
        if self._may_thaw:
            raise FreezeGivenUp(f"{why}, too long for a freeze (--max-freeze)")
        raise LoopError(
            f"{why}, which the freeze limit does not allow (--freeze-limit); no target was made. "
            "A stop that can be undone (--undo, --freeze cgroup:PATH) lets the source run meanwhile"
        )

    def _still_written(self) -> LoopError:
        if self._doubt:
            return LoopError(
                f"tracking of {self._source.path} could not be proven ({self._doubt}), again and "
                "again; no target was made"
            )
        who = "and nothing stops its writer (-F)"
        if self._running.stops:
            who = "although it should be stopped"
        return LoopError(f"{self._source.path} is still being written {who}; no target was made")

    def _unseen(self) -> bool:
        lookout = self._source.lookout
        return lookout is not None and lookout.may_be_written_unseen

    def _written(self) -> bool:
        """The source was written since the last pass began, although something
        should have stopped that.  So is what somebody else thawed and froze
        again: a freeze writes back what came in between."""
        if not self._running.stops:
            return False
        # What waits in a page cache becomes a write now, or never.
        if self._mounts.unfreezable:
            run_cancellable(self._running.write_back)
        else:
            self._source.write_back()
        return self._writes.stamp() != self._stamp


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage can wait until after the freeze."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
