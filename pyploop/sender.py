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
import os
import time
from collections.abc import Iterator

from pyploop import _core
from pyploop._core import Extents
from pyploop.device import Source
from pyploop.errors import DeviceControlError, LoopError, OpenError
from pyploop.events import Reporter
from pyploop.freeze import FileSystems, Timeline, run_command
from pyploop.freeze.hold import Hold, Limits
from pyploop.freeze.stoppers import Spec
from pyploop.image import clear_in_use
from pyploop.outputs import Output
from pyploop.passes import Passes
from pyploop.plan import Plan
from pyploop.rounds import Round, decide
from pyploop.summary import Options, Summary
from pyploop.trackers import Batch, Tracker, Verdict
from pyploop.units import format_size
from pyploop.worker import run_cancellable

FINAL_PASSES = 3
"""Passes with dirty blocks inside the freeze before it is called a loop."""
UNSTOPPED_PASSES = 20
"""The same when nothing stops the writer."""


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
        self._undo = contextlib.ExitStack()
        self._time_line = Timeline()
        self._first: Round | None = None
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
            self.prepare_freeze()
            with self.frozen():
                self.last_blocks()
                self.finish()
        return self.summary

    def __enter__(self) -> Sender:
        """Tracking begins, and the peer is found out about."""
        source, report = self._source, self._report
        report.event("sending", image=source.image, size=source.size, clock=report.start)
        report.info(f"Source: {source.path}, {format_size(source.size)}, read by {source.io_mode}")
        report.info(f"Tracker: {self._tracker.name} ({self._tracker.why})")
        if source.kind == "ploop" and not source.mounts:
            raise OpenError(f"{source.path} has no mount point, so it cannot be frozen")
        with contextlib.ExitStack() as undo:
            self._plan = Plan(f"copy of {source.path}", report)
            undo.callback(self._plan.close)
            self._mounts = FileSystems(source.mounts, report, self._plan)
            undo.callback(self._mounts.close)
            self._hold = Hold(self._specs(), self._mounts, self._plan, report)
            self._out.check_apart(self._mounts)
            self._tracker.start(self._plan)
            undo.callback(self._tracker.stop, False)
            self._passes = Passes(source, self._tracker, self._out, self._options, report)
            self._passes.greet()
            self.summary.dialect = self._out.dialect
            report.info(f"Dialect: {self._out.dialect}")
            self._undo = undo.pop_all()
        return self

    def _specs(self) -> list[Spec]:
        command = self._options.stop_command
        return [*self._options.stops, *([Spec("cmd", command)] if command else [])]

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def cancel(self) -> None:
        """From any thread: the step that runs, and each one after it, fails."""
        self._passes.cancel()

    # ---- running

    def first_pass(self) -> Round:
        """All data of the source, and what may not be zero at the target."""
        data, holes = self._passes.parts()
        size = self._source.size
        # The last block carries the exact size, so it goes in any case.
        if not data or data[-1][1] < size:
            data.append((max(size - 1, data[-1][1] if data else 0), size))
            # So it is no hole any more: what was written there since then
            # must not be followed by zeroes, its mark is gone.
            holes = [(a, min(b, size - 1)) for a, b in holes if a < size - 1]
        extents = Extents.of(data if size else [])
        self._report.event("phase", phase="first pass", bytes=extents.bytes)
        start = self._passes.window_start = time.monotonic()
        sent = self._passes.send([Batch(extents)], _core.PASS_LAST | _core.PASS_HOOK)
        if holes:
            # The target may hold something there (Output.prepare).
            sent += self._passes.send([Batch(Extents.of(holes), holes=True)])
        seconds = time.monotonic() - start
        self.summary.first_pass = seconds
        self._report.info(
            f"First pass: {format_size(sent)} in {seconds:.3f} s, {_rate(sent, seconds)}"
        )
        self._report.event("round", number=0, sent=sent, seconds=seconds, verdict="")
        self._first = Round(sent, seconds, seconds)
        return self._first

    def converge(self) -> None:
        """Rounds until the policy says that the rest is for the freeze."""
        assert self._first is not None, "after first_pass"
        rounds: list[Round] = []
        while True:
            decision = decide(self._first, rounds, self._options.policy)
            if decision.freeze:
                self._report.info(f"Stop iterating after round {len(rounds)}: {decision.why}")
                return
            rounds.append(self.round())

    def round(self) -> Round:
        """What was dirtied until now, the file systems' page cache included."""
        start = time.monotonic()
        run_cancellable(self._write_back)
        batches = self._tracker.take()
        window_start, self._passes.window_start = self._passes.window_start, time.monotonic()
        number = len(self.summary.rounds) + 1
        total = sum(b.extents.bytes for b in batches)
        self._report.event("phase", phase=f"round {number}", bytes=total)
        send_start = time.monotonic()
        sent = self._passes.send(batches)
        seconds = time.monotonic() - send_start
        verdict = self._tracker.check(quiesced=False)
        repaired = self._repair(quiesced=False) if verdict.state == "lossy" else 0
        result = Round(sent, seconds, send_start - window_start)
        self.summary.rounds.append(
            {
                "number": number,
                "sent": sent,
                "seconds": seconds,
                "sync_seconds": send_start - start,
                "dirty_rate": result.dirty_rate,
                "verdict": verdict.state,
                "missed": verdict.missed,
                "repaired": repaired,
            }
        )
        self._report.event("round", **self.summary.rounds[-1])
        self._report.info(
            f"Round {number}: {format_size(sent)} in {seconds:.3f} s, "
            f"dirtied at {format_size(result.dirty_rate)}/s"
            + ("" if verdict.state == "unknown" else f", tracking {_words(verdict)}")
        )
        return result

    def _write_back(self) -> None:
        """What is dirty in page caches becomes writes, which trackers see."""
        self._mounts.sync()
        self._source.write_back()

    def _repair(self, quiesced: bool) -> int | None:
        """Compare what may have been missed; returns the bytes that differed,
        None when the tracker has no way to tell."""
        repair = self._tracker.repair(quiesced)
        if repair is None:
            return None if quiesced else 0
        sent = self._passes.send(repair.batches)
        self.summary.repairs += 1
        self.summary.repaired_bytes += sent
        self._report.note(
            f"Lost events: compared {repair.scope} by hash, sent {format_size(sent)} that differed"
        )
        self._report.event("repair", scope=repair.scope, sent=sent, frozen=quiesced)
        return sent

    @property
    def sent(self) -> int:
        """Bytes of payload so far."""
        return self._passes.stats.data

    def sync_target(self) -> str:
        """What was sent is durable at the target when this returns, as far as
        that can be known: the answer says how (`Output.sync`)."""
        first_bytes = self._passes.first_bytes(4)
        return self._out.sync(self._passes.pump, waiting=True, start=first_bytes)

    def prepare_freeze(self) -> None:
        """The target durable so far, the watchdog ready, and one more round;
        nothing when there is nothing to freeze or stop."""
        if not self._stops:
            return
        self._report.event("phase", phase="sync", bytes=None)
        start = time.monotonic()
        how = self.sync_target()
        self._report.info(
            f"Target synced before the freeze ({how}, {time.monotonic() - start:.3f} s)"
        )
        self._hold.prepare()
        # What was dirtied meanwhile must not wait for the freeze.
        self.round()
        self._mounts.warm_up()

    # ---- frozen

    @property
    def _stops(self) -> bool:
        return bool(self._hold)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stopped and frozen while the body runs `last_blocks` and `finish`."""
        report, step = self._report, self._time_line.step
        report.event("phase", phase="frozen", bytes=None)
        before = self._passes.stats.data
        with contextlib.ExitStack() as held:
            held.enter_context(report.held())
            held.enter_context(self._hold.undone())
            self._stop_and_freeze()
            yield
            if self._options.before_thaw:
                with step("before thaw"):
                    what = "the target is complete, but the command before the thaw"
                    run_command(self._options.before_thaw, what, self._time_left())
            with step("thaw"):
                self._hold.release(self._options.resume)
            self._passes.deadline = None
            self._tell(self._passes.stats.data - before)

    def _stop_and_freeze(self) -> None:
        options, step = self._options, self._time_line.step
        scanned = self._tracker.name == "scan" and not self._mounts
        limits = None
        if options.freeze_limit and self._stops and not scanned:
            # A scan compares all there is after the stop: as long as it takes.
            limits = Limits.of(options.freeze_limit)
            self._passes.deadline = time.monotonic() + limits.own
            self._passes.watch = self._plan.watch
            self._out.deadline = min(self._out.deadline, self._passes.deadline)
        with step("stop command") if self._specs() else contextlib.nullcontext():
            self._hold.stop(limits)
        self._source.check_same()
        with step("source sync"):
            run_cancellable(self._write_back)
        with step("freeze"):
            self._mounts.freeze()

    def last_blocks(self) -> None:
        """Send what is dirty until nothing is, and no event is missing."""
        limit = FINAL_PASSES if self._stops else UNSTOPPED_PASSES
        stamp = self._stamp()
        for _ in range(limit):
            if self._last_pass():
                break
        else:
            raise self._still_written()
        if self._stops and self._stamp() != stamp:
            raise self._still_written()
        self._source.check_same()
        self._hold.check()

    def finish(self) -> None:
        """The end of the image; returns when the target is durable, as far as
        that can be known (`summary.acknowledged`)."""
        pump, step = self._passes.pump, self._time_line.step
        with step("last blocks"):
            start = self._passes.first_bytes(self._out.header_size)
            # Before END: the ploop driver refuses when blocks are unread.
            self._tracker.stop(True)
            if self._source.image_format == "ploop1":
                self._out.header(pump, clear_in_use(start))
        with step("target commit"):
            self._hold.commit()
            if self._hold.last is not None:
                self._passes.extend(self._hold.last)
            size = self._source.size
            self.summary.acknowledged = self._out.finish(pump, size, start[:4])

    def _tell(self, sent: int) -> None:
        """The summary's figures, and the events about them."""
        s, report, stats = self.summary, self._report, self._passes.stats
        s.frozen = self._time_line.steps
        s.frozen_total = sum(s.frozen.values())
        s.frozen_bytes = sent
        report.event("frozen", steps=s.frozen, total=s.frozen_total, sent=sent)
        report.info(
            f"Frozen for {s.frozen_total:.3f} s ({format_size(sent)} sent): "
            + ", ".join(f"{k} {v:.3f}" for k, v in s.frozen.items())
        )
        s.data_bytes, s.wire_bytes, s.read_bytes = stats.data, stats.wire, stats.read
        s.frames = stats.frames
        report.event("summary", **vars(s))

    def _time_left(self) -> float | None:
        """Seconds of the freeze that are left to a command."""
        if self._passes.deadline is None:
            return None
        return max(self._passes.deadline - time.monotonic(), 0.0)

    def _last_pass(self) -> bool:
        """One pass over what is dirty; true when it was the last."""
        with self._time_line.step("prove"):
            verdict = self._tracker.check(quiesced=True)
        if verdict.state == "busy":
            raise self._still_written()
        with self._time_line.step("last blocks"):
            sent = self._passes.send(self._tracker.take())
        if verdict.state in ("complete", "unknown"):
            self.summary.completeness = verdict.state
            # A stopped scan has compared everything: once is enough.
            return sent == 0 or (self._stops and self._tracker.name == "scan")
        with self._time_line.step("repair"):
            if self._repair(quiesced=True) is None:
                raise DeviceControlError(
                    f"tracking of {self._source.path} lost events ({_words(verdict)}) and cannot "
                    "tell which; no target was made"
                )
        return False  # prove again, from the new base

    def _still_written(self) -> LoopError:
        who = (
            "although it should be stopped" if self._stops else "and nothing stops its writer (-F)"
        )
        return LoopError(f"{self._source.path} is still being written {who}; no target was made")

    def _stamp(self) -> int:
        """Modification time of a plain file: scan has no other witness."""
        return os.fstat(self._source.fd).st_mtime_ns if self._source.kind == "file" else 0


def _rate(n: int, seconds: float) -> str:
    return f"{format_size(n / seconds if seconds else 0)}/s"


def _words(verdict: Verdict) -> str:
    if verdict.state == "lossy":
        return f"lossy, at least {format_size(verdict.missed)} missed"
    return verdict.state + (f" ({verdict.why})" if verdict.why else "")
