# SPDX-License-Identifier: Apache-2.0
"""What a copy does while its source runs: the first pass, then rounds.

A round is a sync of the source, then what that and the writer dirtied.  Each
is measured; `freeze_policy` decides on the measurements.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pyploop import _core
from pyploop._core import Bitmap, Extents
from pyploop.diskcopy.context import Context
from pyploop.diskcopy.framing import Extent
from pyploop.diskcopy.freeze_policy import Decision, Round, decide, forecast
from pyploop.diskcopy.measurements import Measurements
from pyploop.errors import LoopError
from pyploop.system.worker import run_cancellable
from pyploop.trackers import Batch, Completeness
from pyploop.units import MIB, format_size

if TYPE_CHECKING:
    from pyploop.diskcopy.delta import Reused
    from pyploop.diskcopy.digests import Reader

WORTH_SIFTING = 4 * MIB
"""Dirty bytes from which on hot blocks are left for last.  With fewer, of a large
source, looking for them costs more than sending them."""
REPAIR_TRIES = 20
"""More rounds to try when the tracker needs a comparison and has no exact base."""
RETRY = 0.2
"""Seconds to the next attempt after one that did not lead to a freeze: each stalls
the writer."""


class PreCopy:
    """The part of one copy while its source runs."""

    def __init__(self, context: Context, measurements: Measurements) -> None:
        self._context, self._measurements = context, measurements
        self._same: Bitmap | None = None
        """What the target has kept and is the same here."""
        self._hooked = True
        """The tracker's hook is called during the first pass."""
        self._unproven = 0
        """Rounds in a row that needed a repair which was not possible."""

    # ---- the first pass, and rounds

    def reuse(self, digests: Reader) -> Reused:
        """Compare what the target has kept, and leave out of the first pass what is the
        same.  What is written from now on is marked, and sent in a round."""
        c = self._context
        c.source_pump.window_start = time.monotonic()
        c.report.event("phase", phase="comparing", bytes=None)
        self._hooked = c.tracker.mark_all()
        with c.recorder.step("compare"):
            self._same, found = c.source_pump.compare(digests)
        c.summary.reused_bytes = found.same
        return found

    def first_pass(self) -> Round:
        """Send all data of the source, except what the target has kept, and the holes
        that may not be zero at the target."""
        c, measurements = self._context, self._measurements
        data, holes = c.source_pump.parts()
        if self._same is not None:
            data = _without(data, self._same)
        size = c.source.size
        # The last block carries the exact size, so it goes in any case.
        if not data or data[-1][1] < size:
            data.append((max(size - 1, data[-1][1] if data else 0), size))
            # So it is not a hole any more.  The hook has cleared its mark, so zeroes
            # must not overwrite what was written there meanwhile.
            holes = [(a, min(b, size - 1)) for a, b in holes if a < size - 1]
        extents = Extents.of(data if size else [])
        c.report.event("phase", phase="first pass", bytes=extents.bytes)
        start = time.monotonic()
        prior = c.out.prior
        if self._same is None:
            c.source_pump.window_start = start
        with c.recorder.step("first pass"):
            flags = _core.PASS_LAST | (_core.PASS_HOOK if self._hooked else 0)
            if not (c.tracker.compares_everything or prior) and c.out.end_is_answered:
                # A change while it is sent is marked.  A scan would have to know
                # exactly what was sent.  And a page that was not read from the pipe
                # before the end would show what is written after the thaw.
                flags |= _core.PASS_LIVE
            if prior is None:
                sent = c.source_pump.send([Batch(extents)], flags)
            else:
                sent = c.source_pump.send_differences(prior, extents, flags)
                c.summary.reused_bytes = same = c.source_pump.stats.same
                c.report.info(
                    f"The target had {format_size(prior.bytes)} of data, of which "
                    f"{format_size(same)} are the same"
                )
            if holes:
                # The target may have data there (Output.prepare).
                sent += c.source_pump.send([Batch(Extents.of(holes), holes=True)])
        measurements.first_end = time.monotonic()
        seconds = measurements.first_end - start - c.source_pump.cut_seconds
        c.summary.first_pass = seconds
        c.report.info(
            f"First pass: {format_size(sent)} in {seconds:.3f} s, "
            f"{format_size(sent / seconds if seconds else 0)}/s"
        )
        c.report.event("round", number=0, sent=sent, seconds=seconds, verdict="")
        measurements.first = Round(sent, seconds, seconds)
        return measurements.first

    def round(self, last: bool = False, paused: bool = False) -> Round:
        """Send what was dirtied until now, the page cache of the file systems included.
        last: this may be the last round, so hot blocks are sent, too."""
        c, measurements = self._context, self._measurements
        number = len(measurements.rounds) + 1
        c.source.check_device()
        self.look_around(last)
        start = time.monotonic()
        before = c.tracker.pending()
        with c.recorder.step("source sync"):
            run_cancellable(c.write_back)
        beside = c.beside()
        after = c.tracker.pending()
        batches = c.tracker.take()
        window_start, c.source_pump.window_start = c.source_pump.window_start, time.monotonic()
        dirty = None
        if not any(b.changed for b in batches):
            dirty = sum(b.extents.bytes for b in batches)
            sift = not last and not c.out.framing.as_ploop and dirty >= WORTH_SIFTING
            batches = c.hot.sift(batches) if sift else c.hot.all(batches)
        total = sum(b.extents.bytes for b in batches)
        c.report.event("phase", phase=f"round {number}", bytes=total)
        send_start, cut = time.monotonic(), c.source_pump.cut_seconds
        sent = c.source_pump.send(batches)
        end = time.monotonic()
        c.recorder.add(f"round {number}", send_start, end)
        # Without a connection nothing is measured, and --deadline stands still.
        cut = c.source_pump.cut_seconds - cut
        measurements.first_end += cut
        end -= cut
        completeness = c.tracker.check(quiesced=False)
        repaired = self._repair(completeness)
        if beside:
            repaired += c.repairs.run(c.compare_all(beside), frozen=False) or 0
        result = Round(
            sent,
            end - send_start,
            send_start - window_start,
            dirty=dirty,
            sync=send_start - start,
            flushed=max(after - before, 0) if before is not None and after is not None else 0,
            left=c.hot.left,
            paused=paused,
        )
        measurements.rounds.append(result)
        self._report_round(result, completeness, repaired)
        return result

    def _report_round(self, r: Round, completeness: Completeness, repaired: int | None) -> None:
        c, measurements = self._context, self._measurements
        fields = {
            "number": len(measurements.rounds),
            "sent": r.sent,
            "seconds": r.seconds,
            "sync_seconds": r.sync,
            "flushed": r.flushed,
            "window": r.window,
            "dirty": r.dirty,
            "dirty_rate": r.dirty_rate,
            "left": r.left,
            "forecast": forecast(measurements.measured()).total,
            "verdict": completeness.state,
            "missed": completeness.missed,
            "repaired": repaired,
        }
        c.summary.rounds.append(fields)
        c.report.event("round", **fields)
        c.report.info(
            f"Round {fields['number']}: {format_size(r.sent)} in {r.seconds:.3f} s, "
            f"dirtied at {format_size(r.dirty_rate)}/s"
            + (f", {format_size(r.left)} of hot blocks left for last" if r.left else "")
            + ("" if completeness.state == "unknown" else f", tracking {completeness}")
        )

    def _repair(self, completeness: Completeness) -> int:
        """After a round: compare what may have been missed, if the tracker has an exact
        base.  Returns the bytes that differed."""
        c = self._context
        if completeness.state != "lossy" and not completeness.needs_repair:
            self._unproven = 0
            return 0
        repair = c.tracker.repair(quiesced=False)
        if repair is None:
            self._unproven += 1
            return 0
        self._unproven = 0
        return c.repairs.run(repair, frozen=False) or 0

    # ---- who else uses the source

    def look_around(self, last: bool) -> None:
        """Between rounds: report now, and not inside the freeze, a source that has grown
        or has a new user.  A file system that was mounted meanwhile is frozen, too."""
        c = self._context
        c.source.check_size()
        monitor = c.source.monitor
        for user in monitor.changed(last) if monitor is not None else []:
            c.report.note(f"The source has a new user: {user}")
        known = {m.device() for m in c.source.mounts}
        for mount in monitor.found.mounts if monitor is not None else []:
            if mount.device() not in known:
                c.mounts.adopt(mount)
                c.source.mounts.append(mount)

    # ---- decisions

    def _decide(self) -> Decision:
        return decide(self._measurements.measured(), self._context.options.policy)

    def converge(self) -> None:
        """Rounds until the policy leaves the rest to the freeze.  At least one when
        called again."""
        if self._measurements.rounds:
            self.round()
        else:
            # What the caller did in between does not count for --deadline.
            self._measurements.first_end = time.monotonic()
        self.iterate(last=False)

    def iterate(self, last: bool) -> None:
        """Rounds until the policy says freeze.  LoopError: it says abort.
        last: the freeze may follow, so hot blocks are sent, too."""
        c = self._context
        paused = False
        while (decision := self._decide()).action == "round" or self._must_repair(decision):
            if decision.throttle and c.options.throttle is not None:
                c.options.throttle.apply()
            if pause := RETRY if decision.freeze else decision.pause:
                c.source_pump.pause(pause)
            paused = bool(decision.pause)
            self.round(last, paused)
        c.report.info(
            f"Stop iterating after round {len(self._measurements.rounds)}: {decision.why}"
        )
        self.give_up(decision)

    def _must_repair(self, decision: Decision) -> bool:
        """A needed repair would cost frozen time, so try a few more rounds."""
        return decision.freeze and 0 < self._unproven < REPAIR_TRIES

    def give_up(self, decision: Decision) -> None:
        """LoopError when the decision is to abort."""
        if decision.action == "abort":
            raise LoopError(
                f"{self._context.source.path} is written too fast to be frozen as asked: "
                f"{decision.why}; nothing was frozen, no target was made",
                path=self._context.source.path,
                hint="allow a longer freeze (--max-freeze), slow the writers down (--throttle), "
                "or freeze in any case (--on-deadline freeze)",
            )


def _without(data: list[Extent], same: Bitmap) -> list[Extent]:
    left = Bitmap(same.size)
    left.add(Extents.of(data))
    left.subtract(same)
    return list(left.extents())
