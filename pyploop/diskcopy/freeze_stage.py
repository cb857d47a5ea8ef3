# SPDX-License-Identifier: Apache-2.0
"""The freeze of one copy: stop, sync, freeze, prove, last blocks, durable, thaw.

Invariant: nothing is delivered that the tracker could not prove complete.  What it
may have missed is compared by hash and sent again, or the copy fails.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator

from pyploop.diskcopy.context import Context
from pyploop.diskcopy.proof import TargetDiffers, frame
from pyploop.diskcopy.relink import LinkLost
from pyploop.diskcopy.repairs import FreezeGivenUp
from pyploop.disks.image import clear_in_use
from pyploop.errors import CommandError, DeviceControlError, LoopError, PyploopError
from pyploop.freeze import run_command
from pyploop.freeze.deadline import Limits
from pyploop.freeze.session import newer
from pyploop.system.worker import run_cancellable
from pyploop.trackers import Completeness, Repair
from pyploop.units import format_size
from pyploop.wire.d1 import Feature

FINAL_PASSES = 3
"""Passes inside the freeze that may find dirty blocks, until the copy fails."""
UNSTOPPED_PASSES = 20
"""The same when nothing is stopped or frozen."""
REPAIR_SLACK = 1.0
"""Without --max-freeze: seconds that a repair may take inside the freeze, on top of
twice the forecast."""


class FreezeStage:
    """From the stop command to the thaw."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._may_thaw = False
        self._doubt = ""
        """Why the last pass had to compare."""
        self.untracked = False
        """The tracker has ended, so no other freeze can follow."""
        self._end_written = False
        self._late = False
        """The source was written to in the freeze whose answer to END was lost."""
        self._stamp: tuple[int, ...] = ()
        """`Writes.begin` at the beginning of the last pass."""

    @property
    def allowed(self) -> float:
        """Seconds that one repair may take inside the freeze."""
        c = self._context
        if c.options.policy.max_freeze is not None:
            return c.options.policy.max_freeze
        return 2 * (c.summary.predicted or 0.0) + REPAIR_SLACK

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stopped and frozen while the body runs `last_blocks` and `finish`."""
        c = self._context
        report, step = c.report, c.recorder.step
        report.event("phase", phase="frozen", bytes=None)
        before = c.source_pump.stats.data
        with contextlib.ExitStack() as freeze:
            freeze.callback(self._run_on)
            freeze.enter_context(report.deferred())
            freeze.enter_context(c.session.undo_on_failure())
            freeze.enter_context(_no_collection())
            c.recorder.stage = "frozen"
            self._stop_and_freeze()
            try:
                yield
            except FreezeGivenUp as e:
                self._undo_to_go_on(e)
                raise
            except LinkLost as e:
                if not c.session.can_undo:
                    raise
                self._late = self._end_written and self._written()
                self._undo_to_go_on(e)
                raise
            if c.options.before_thaw:
                self._write_receipt()  # the command may compare it with the source
                with step("before thaw"):
                    what = "the target is complete, but the --before-thaw command"
                    run_command(c.options.before_thaw, what, c.deadline.left)
            with step("thaw"):
                c.session.complete()
                if self._written():
                    raise newer("was written to during the last steps")
                c.session.release(c.options.resume)
            c.recorder.stage = "running"
            self._stop_watching()
            if not c.options.before_thaw:
                self._write_receipt()
            self._report_end(c.source_pump.stats.data - before)

    def complete_late(self) -> None:
        """The answer to END was lost, and the connection with it: the source was thawed, and
        the receiver has said afterwards that its target is complete."""
        c = self._context
        c.recorder.stage = "running"
        if self._late:
            raise newer("was written to during the last steps")
        if c.options.before_thaw:
            raise CommandError(
                "the target is complete, but the --before-thaw command did not run: the "
                "connection was lost, so the source was thawed before that was known"
            )
        c.summary.acknowledged = "acknowledged"
        c.report.note("The target is complete: only the receiver's answer to END was lost")
        self._stop_watching()
        self._write_receipt()
        self._report_end(0)

    def _stop_watching(self) -> None:
        """While RCU is still expedited: the end of a watch (fanotify, inotify) waits for
        a grace period, else 8 ms each, and a caller that has stopped the source waits
        for this process to end."""
        c = self._context
        c.tracker.stop(False)
        if c.source.monitor is not None:
            c.source.monitor.close()
        c.mounts.cool_down()

    def _undo_to_go_on(self, why: PyploopError) -> None:
        """Thaw, for another freeze later.  LoopError when something could not be undone, so
        the source does not run."""
        c = self._context
        if left := c.session.undo():
            raise LoopError("; ".join([f"{why}; no target was made", *left])) from why
        c.plan.watch()  # no further freeze after one that went past its limit

    def _run_on(self) -> None:
        """After the freeze the source runs: the limit ends, and --bwlimit holds again."""
        c = self._context
        c.recorder.stage = "running"
        c.source_pump.limit(running=True)
        c.deadline.clear()

    def _stop_and_freeze(self) -> None:
        c = self._context
        options, step = c.options, c.recorder.step
        c.source_pump.limit(running=False)
        self._end_written = False
        scanned = c.tracker.compares_everything and not c.mounts
        limits = None
        if options.freeze_limit and c.stops and not scanned:
            # After a stop without file systems a scan may take as long as it needs.
            limits = Limits.of(options.freeze_limit)
        with step("stop command") if c.options.stop_specs else contextlib.nullcontext():
            c.session.stop(limits)
        if options.throttle is not None:
            options.throttle.remove()
            c.session.watch()
        with step("source sync"):
            run_cancellable(c.write_back)
            c.session.watch()
        with step("freeze"):
            c.mounts.freeze()
            # What the freeze wrote to a loop device on top of the source, and what was
            # written through a device since the sync.
            c.source.write_back()
            c.session.watch()

    def last_blocks(self, may_thaw: bool = False) -> None:
        """As `Sender.last_blocks`."""
        c = self._context
        self._may_thaw = may_thaw
        limit = FINAL_PASSES if c.stops else UNSTOPPED_PASSES
        for _ in range(limit):
            self._stamp = c.writes.begin()
            if self._last_pass():
                break
        else:
            raise self._still_written()
        with c.recorder.step("prove"):
            c.source.check_same()
            c.session.check()
            if self._written():
                raise self._still_written()

    def finish(self) -> None:
        """As `Sender.finish`."""
        c = self._context
        with c.recorder.step("last blocks"):
            start = c.source_pump.first_bytes(c.out.header_size)
            if c.tracker.stop_before_end:
                c.tracker.stop(True)
                self.untracked = True
        for last in (False, True):
            try:
                self._end(start)
                break
            except TargetDiffers as e:
                if last or e.ask is None:
                    raise
                c.report.note("The target is not what was sent: the blocks that differ go again")
                with c.recorder.step("repair"):
                    c.summary.resent_bytes = c.source_pump.send_again(e.ask)
        if c.summary.acknowledged == "acknowledged":
            c.recorder.remote(c.out.heard)

    def _end(self, start: bytes) -> None:
        """The header, and the end of the image.  TargetDiffers: the target is not what was
        sent.  start: the image's first bytes."""
        c = self._context
        pump, step, proof = c.source_pump.pump, c.recorder.step, c.source_pump.proof
        header = b""
        if c.source.image_format == "ploop1":
            with step("last blocks"):
                header = clear_in_use(start)
                c.out.header(pump, header)
                c.source_pump.note_header(header)
        if proof is not None:
            with step("proof"):
                c.summary.root = proof.root().hex()
                c.summary.proven = Feature.PROOF in c.out.features
                c.out.proof = frame(proof) if c.summary.proven else b""
        with step("prove"):
            c.session.commit()
            if self._written():
                raise self._still_written()
        with step("target commit"):
            c.out.before_end = c.session.before_end
            self._end_written = True
            c.summary.acknowledged = c.out.finish(pump, c.source.size, start[:4])
        if header:
            # A lane may have lost block 0, which went again without it, and then it again.
            c.source_pump.note_header(header)

    def _write_receipt(self) -> None:
        """WriteError: the target is complete, and the receipt cannot be written."""
        path = self._context.options.receipt
        if path is not None:
            from pyploop.diskcopy import receipt  # few ask for one

            receipt.of_copy(self._context).write(path)

    def _report_end(self, sent: int) -> None:
        """Fill the summary, and report it."""
        c = self._context
        s, report, stats = c.summary, c.report, c.source_pump.stats
        c.source_pump.log_notes()
        s.frozen = c.recorder.seconds("frozen")
        s.frozen_remote = c.recorder.seconds("frozen", "target")
        s.frozen_total = sum(s.frozen.values())
        s.frozen_window = c.recorder.window("target commit")
        if s.predicted is not None and s.frozen_window:
            s.prediction_ratio = s.frozen_window / s.predicted
        s.frozen_bytes = sent
        if c.out.resend is not None:
            s.cuts = c.out.resend.cuts
        s.largest_part = c.recorder.advice()
        s.clock_offset, s.clock_error = c.recorder.clock.offset, c.recorder.clock.error
        if c.out.heard is not None:
            s.target_dirty = c.out.heard.times.dirty
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
            + ", ".join(f"{k} {v:.3f}" for k, v in c.recorder.frozen_parts().items())
        )
        if s.predicted is not None:
            report.info(
                f"Predicted: {s.predicted:.3f} s until the target is durable; "
                f"it was {s.frozen_window:.3f} s"
            )
        s.data_bytes, s.wire_bytes, s.read_bytes = stats.data, stats.wire, stats.read
        s.direct_bytes, s.filled_bytes = stats.direct, stats.filled
        s.write_mode = self._context.out.write_mode.report(stats.direct)
        s.frames = stats.frames
        s.compression = c.source_pump.compression.name
        s.compressed_bytes = stats.compressed
        s.compressed_frames = stats.compressed_frames
        if c.source_pump.compression:
            report.info(
                f"Compressed: {format_size(stats.compressed)} of {format_size(stats.data)} "
                f"({stats.compressed_frames} of {stats.frames} frames); "
                f"{format_size(stats.wire)} on the wire"
            )
        report.event("summary", **vars(s))

    def _last_pass(self) -> bool:
        """One pass over what is dirty; true when no other is needed."""
        c = self._context
        with c.recorder.step("prove"):
            completeness = c.tracker.check(quiesced=True)
        if completeness.state == "busy":
            raise self._still_written()
        beside = c.beside(frozen=True)
        self._doubt = ""
        with c.recorder.step("last blocks"):
            sent = c.source_pump.send(c.hot.all(c.tracker.take()))
        if beside:
            with c.recorder.step("repair"):
                self._compare(c.compare_all(beside), "; ".join(beside))
            return False
        if completeness.state in ("complete", "unknown"):
            c.summary.completeness = completeness.state
            # After a stop, a scan has compared everything: one pass is enough.
            stopped = c.stops and c.tracker.compares_everything and not self._unseen()
            # Without a stop, it does not see what is written behind it.
            behind = c.tracker.compares_everything and c.writes.stamp() != self._stamp
            return stopped or (sent == 0 and not behind)
        with c.recorder.step("repair"):
            self._repair(completeness)
        return False  # prove it again, from the new base

    def _repair(self, completeness: Completeness) -> None:
        """Compare what the tracker may have missed."""
        c = self._context
        path = c.source.path
        self._doubt = str(completeness)
        # When the watchdog thaws, it also takes back what the tracker needs.
        c.deadline.check()
        repair = c.tracker.repair(quiesced=True)
        if repair is None:
            raise DeviceControlError(
                f"tracking of {path} lost events ({completeness}), and the tracker cannot say "
                "for which blocks; no target was made",
                path=path,
                hint="copy again; with --tracker scan no events are needed",
            )
        self._compare(repair, f"tracking of {path} could not be proven complete ({completeness})")

    def _compare(self, repair: Repair, why: str) -> None:
        """Compare, as long as the freeze may last."""
        c = self._context
        repairs, left = c.repairs, c.deadline.left
        if self._may_thaw and c.stops:
            allowed = self.allowed
            left = allowed if left is None else min(left, allowed)
        until = None if left is None else time.monotonic() + left
        if repairs.run(repair, frozen=True, until=until) is not None:
            return
        why += f", and comparing {repair.scope} would take {repairs.seconds_left:.1f} s more"
        if self._may_thaw:
            raise FreezeGivenUp(f"{why}, too long for a freeze (--max-freeze)")
        raise LoopError(
            f"{why}, longer than the freeze may last (--freeze-limit); no target was made",
            path=c.source.path,
            hint="raise --freeze-limit, or use a stop that can be undone (--undo, --freeze "
            "cgroup:PATH): then the source runs while blocks are compared",
        )

    def _still_written(self) -> LoopError:
        c = self._context
        if self._doubt:
            return LoopError(
                f"tracking of {c.source.path} could not be proven complete in any of several "
                f"passes ({self._doubt}); no target was made",
                path=c.source.path,
                hint="copy again; with --tracker scan no such proof is needed",
            )
        if c.stops:
            return LoopError(
                f"{c.source.path} is still being written to although it should be stopped; no "
                "target was made",
                path=c.source.path,
                hint="stop the programs that write to it, too (-F, --freeze)",
            )
        return LoopError(
            f"{c.source.path} is still being written to, and nothing stops its writers; no target "
            "was made",
            path=c.source.path,
            hint="stop them with -F or --freeze",
        )

    def _unseen(self) -> bool:
        monitor = self._context.source.monitor
        return monitor is not None and monitor.may_be_written_unseen

    def _written(self) -> bool:
        """The source was written to since the last pass began, although it is stopped.
        That also finds a thaw and another freeze by another process: a freeze writes
        back what came in between."""
        c = self._context
        if not c.stops:
            return False
        # So that what is dirty in a page cache counts as a write.
        if c.mounts.unfreezable:
            run_cancellable(c.write_back)
        else:
            c.source.write_back()
        return c.writes.stamp() != self._stamp


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside the freeze."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
