# SPDX-License-Identifier: Apache-2.0
"""What a copy does while its source runs: the first pass, the rounds, and the
approach to the freeze.

A round is a sync of the source, then what that and the writer dirtied.  Each
is measured; `rounds` decides on the measurements.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

from pyploop import _core
from pyploop._core import Bitmap, Extents
from pyploop.diskcopy.framing import Extent
from pyploop.diskcopy.freeze_policy import (
    MEANINGFUL,
    Costs,
    Decision,
    Forecast,
    Measured,
    Round,
    decide,
    forecast,
)
from pyploop.diskcopy.hot_blocks import HotBlocks
from pyploop.diskcopy.options import Options, Summary
from pyploop.diskcopy.repairs import Repairs
from pyploop.diskcopy.source_pump import Passes
from pyploop.diskcopy.target import Output
from pyploop.disks.source import Source
from pyploop.errors import LoopError
from pyploop.freeze import FileSystems
from pyploop.freeze.deadline import Limits
from pyploop.freeze.session import Hold
from pyploop.report.events import Reporter
from pyploop.report.timeline import Recorder
from pyploop.system.worker import run_cancellable
from pyploop.trackers import Batch, Repair, Tracker, Verdict, whole
from pyploop.units import MIB, format_size

if TYPE_CHECKING:
    from pyploop.diskcopy.delta import Reused
    from pyploop.diskcopy.digests import Reader

APPROACHES = 3
"""Target syncs before the freeze, when no --max-freeze asks for more."""
UNSYNCED = 4 * MIB
"""Bytes sent since the target's last sync that are left to the freeze."""
WORTH_SIFTING = 4 * MIB
"""Dirty bytes from which on hot blocks are left for last: looking for them costs
more than sending them, of a large source with little dirty."""
TARGET_WINDOW = 32 * MIB
"""Bytes that a target of ours leaves unwritten while it receives, about."""
COLD_FREEZE = 0.03
"""Seconds of a FIFREEZE that was not rehearsed: RCU grace periods."""
REPAIR_SLACK = 1.0
"""Seconds of a repair inside the freeze, beside twice what was forecast, when no
--max-freeze is given."""
REPAIR_TRIES = 20
"""Rounds that go on, since the tracker wants a comparison and finds no moment to
count from."""
RETRY = 0.2
"""Seconds between two approaches that ended in vain: each stalls the writer."""


class Running:
    """The part of one copy before its freeze."""

    def __init__(
        self,
        source: Source,
        tracker: Tracker,
        out: Output,
        options: Options,
        report: Reporter,
        *,
        hold: Hold,
        mounts: FileSystems,
        passes: Passes,
        summary: Summary,
        recorder: Recorder,
    ) -> None:
        self._source, self._tracker, self._out = source, tracker, out
        self._options, self._report = options, report
        self._hold, self._mounts = hold, mounts
        self._passes, self._summary, self._recorder = passes, summary, recorder
        self._hot = HotBlocks(source.size)
        self._same: Bitmap | None = None
        """What the target has kept as it is here."""
        self._hooked = True
        """The tracker is told how far the first pass is."""
        self._rounds: list[Round] = []
        self._first = Round(0, 0, 0)
        self._first_end = time.monotonic()
        self._sent_at_sync = 0
        self._target_times: list[tuple[int, float]] = []
        self._freeze_time: float | None = None
        self.repairs = Repairs(passes, report, summary, limited=bool(options.rate))
        self._unproven = 0
        """Rounds in a row after which a repair was wanted, and not possible."""

    @property
    def stops(self) -> bool:
        """Something will be frozen or stopped."""
        return bool(self._hold)

    @property
    def allowed(self) -> float:
        """Seconds that one repair may take inside the freeze."""
        if self._options.policy.max_freeze is not None:
            return self._options.policy.max_freeze
        return 2 * (self._summary.predicted or 0.0) + REPAIR_SLACK

    # ---- passes

    def reuse(self, digests: Reader) -> Reused:
        """Leave out of the first pass what the target has kept and is the same.
        What is written from now on is marked, and goes in a round."""
        self._passes.window_start = time.monotonic()
        self._report.event("phase", phase="comparing", bytes=None)
        self._hooked = self._tracker.mark_all()
        with self._recorder.step("compare"):
            self._same, found = self._passes.compare(digests)
        self._summary.reused_bytes = found.same
        return found

    def first_pass(self) -> Round:
        """All data of the source, and what may not be zero at the target; without
        what it has kept."""
        data, holes = self._passes.parts()
        if self._same is not None:
            data = _without(data, self._same)
        size = self._source.size
        # The last block carries the exact size, so it goes in any case.
        if not data or data[-1][1] < size:
            data.append((max(size - 1, data[-1][1] if data else 0), size))
            # So it is no hole any more: what was written there since then
            # must not be followed by zeroes, its mark is gone.
            holes = [(a, min(b, size - 1)) for a, b in holes if a < size - 1]
        extents = Extents.of(data if size else [])
        self._report.event("phase", phase="first pass", bytes=extents.bytes)
        start = time.monotonic()
        if self._same is None:
            self._passes.window_start = start
        with self._recorder.step("first pass"):
            flags = _core.PASS_LAST | (_core.PASS_HOOK if self._hooked else 0)
            if self._tracker.name != "scan" and self._out.end_is_answered:
                # What changes under way is marked; a scan would have to know
                # what exactly was sent.  And a page that nobody has read by the
                # end would show what is written after the thaw.
                flags |= _core.PASS_LIVE
            sent = self._passes.send([Batch(extents)], flags)
            if holes:
                # The target may hold something there (Output.prepare).
                sent += self._passes.send([Batch(Extents.of(holes), holes=True)])
        self._first_end = time.monotonic()
        seconds = self._first_end - start
        self._summary.first_pass = seconds
        self._report.info(
            f"First pass: {format_size(sent)} in {seconds:.3f} s, "
            f"{format_size(sent / seconds if seconds else 0)}/s"
        )
        self._report.event("round", number=0, sent=sent, seconds=seconds, verdict="")
        self._first = Round(sent, seconds, seconds)
        return self._first

    def round(self, last: bool = False, paused: bool = False) -> Round:
        """What was dirtied until now, the file systems' page cache included;
        hot blocks too when it may be the last."""
        number = len(self._rounds) + 1
        self._source.check_device()
        self._look_around(last)
        start = time.monotonic()
        before = self._tracker.pending()
        with self._recorder.step("source sync"):
            run_cancellable(self.write_back)
        beside = self.beside()
        after = self._tracker.pending()
        batches = self._tracker.take()
        window_start, self._passes.window_start = self._passes.window_start, time.monotonic()
        dirty = None
        if not any(b.changed for b in batches):
            dirty = sum(b.extents.bytes for b in batches)
            sift = not last and not self._out.framing.as_ploop and dirty >= WORTH_SIFTING
            batches = self._hot.sift(batches) if sift else self._hot.all(batches)
        total = sum(b.extents.bytes for b in batches)
        self._report.event("phase", phase=f"round {number}", bytes=total)
        send_start = time.monotonic()
        sent = self._passes.send(batches)
        end = time.monotonic()
        self._recorder.add(f"round {number}", send_start, end)
        verdict = self._tracker.check(quiesced=False)
        repaired = self._repair(verdict)
        if beside:
            repaired += self.repairs.run(self.compare_all(beside), frozen=False) or 0
        result = Round(
            sent,
            end - send_start,
            send_start - window_start,
            dirty=dirty,
            sync=send_start - start,
            flushed=max(after - before, 0) if before is not None and after is not None else 0,
            left=self._hot.left,
            paused=paused,
        )
        self._rounds.append(result)
        self._tell(result, verdict, repaired)
        return result

    def _tell(self, r: Round, verdict: Verdict, repaired: int | None) -> None:
        fields = {
            "number": len(self._rounds),
            "sent": r.sent,
            "seconds": r.seconds,
            "sync_seconds": r.sync,
            "flushed": r.flushed,
            "window": r.window,
            "dirty": r.dirty,
            "dirty_rate": r.dirty_rate,
            "left": r.left,
            "forecast": forecast(self.measured()).total,
            "verdict": verdict.state,
            "missed": verdict.missed,
            "repaired": repaired,
        }
        self._summary.rounds.append(fields)
        self._report.event("round", **fields)
        self._report.info(
            f"Round {fields['number']}: {format_size(r.sent)} in {r.seconds:.3f} s, "
            f"dirtied at {format_size(r.dirty_rate)}/s"
            + (f", {format_size(r.left)} hot left for last" if r.left else "")
            + ("" if verdict.state == "unknown" else f", tracking {words(verdict)}")
        )

    def take(self) -> list[Batch]:
        """All that is dirty, for a pass inside the freeze."""
        return self._hot.all(self._tracker.take())

    def write_back(self) -> None:
        """What is dirty in page caches becomes writes, which trackers see."""
        self._mounts.sync()
        self._source.write_back()

    def _repair(self, verdict: Verdict) -> int:
        """After a round: compare what may have been missed, if there is a moment
        to count from; returns the bytes that differed."""
        if verdict.state != "lossy" and not verdict.needs_repair:
            self._unproven = 0
            return 0
        repair = self._tracker.repair(quiesced=False)
        if repair is None:
            self._unproven += 1
            return 0
        self._unproven = 0
        return self.repairs.run(repair, frozen=False) or 0

    # ---- who else uses the source

    def _look_around(self, last: bool) -> None:
        """Between rounds: what has grown, or is used by somebody new, is named now and
        not inside the freeze.  A file system that was mounted since is frozen, too."""
        self._source.check_size()
        lookout = self._source.lookout
        for user in lookout.changed(last) if lookout is not None else []:
            self._report.note(f"New since the last look: {user}")
        known = {m.device() for m in self._source.mounts}
        for mount in lookout.found.mounts if lookout is not None else []:
            if mount.device() not in known:
                self._mounts.adopt(mount)
                self._source.mounts.append(mount)

    def beside(self, frozen: bool = False) -> list[str]:
        """What was written where no tracker sees it, in words."""
        lookout = self._source.lookout
        return [] if lookout is None else lookout.beside(frozen)

    def compare_all(self, beside: list[str]) -> Repair:
        """Everything is to be compared, for what was written `beside` the queue."""
        return Repair(whole(self._source), f"the whole source ({'; '.join(beside)})")

    # ---- decisions

    def measured(self) -> Measured:
        """What is known so far."""
        large = [(n, s) for n, s in self._target_times if n >= MEANINGFUL][-4:]
        quick = [s for _, s in self._target_times[-4:]]
        fixed = Costs.fixed
        if self._tracker.name == "scan" and self._rounds:
            fixed = self._rounds[-1].seconds  # it reads everything, whatever was dirtied
        freeze = COLD_FREEZE if self._out.framing.exact else Costs.freeze
        costs = Costs(
            stop=self._hold.expected,
            freeze=0.0 if not self._mounts else self._freeze_time or freeze,
            target=min(quick) if quick else Costs.target,
            target_rate=sum(n for n, _ in large) / sum(s for _, s in large) if large else 0.0,
            fixed=fixed,
        )
        elapsed = time.monotonic() - self._first_end
        return Measured(self._first, self._rounds, costs, elapsed, self._source.size)

    def _decide(self) -> Decision:
        return decide(self.measured(), self._options.policy)

    def converge(self) -> None:
        """Rounds until the policy says that the rest is for the freeze; called
        again, at least one."""
        if self._rounds:
            self.round()
        else:
            # What came in between is none of the time that the user allows.
            self._first_end = time.monotonic()
        self._iterate(last=False)

    def _iterate(self, last: bool) -> None:
        paused = False
        while (decision := self._decide()).action == "round" or self._must_repair(decision):
            if decision.throttle and self._options.throttle is not None:
                self._options.throttle.apply()
            if pause := RETRY if decision.freeze else decision.pause:
                self._passes.pause(pause)
            paused = bool(decision.pause)
            self.round(last, paused)
        self._report.info(f"Stop iterating after round {len(self._rounds)}: {decision.why}")
        self._give_up(decision)

    def _must_repair(self, decision: Decision) -> bool:
        """Inside the freeze it would cost frozen time."""
        return decision.freeze and 0 < self._unproven < REPAIR_TRIES

    def _give_up(self, decision: Decision) -> None:
        if decision.action == "abort":
            raise LoopError(
                f"{self._source.path} is written too fast to be frozen as asked: {decision.why}; "
                "nothing was frozen, no target was made (--throttle, --max-freeze, --on-deadline)"
            )

    # ---- the approach

    def prepare_freeze(self) -> None:
        """The target durable so far, the watchdog ready, one more round, and a
        freeze that fits what was asked for; nothing when there is nothing to
        freeze or stop."""
        if not self.stops:
            self._look_around(last=True)
        if not self.stops:
            return
        self._hold.prepare()
        for attempt in itertools.count(1):
            how = self.sync_target()
            # What was dirtied meanwhile must not wait for the freeze.
            self.round(last=True)
            if self._out.framing.exact:
                break
            self._iterate(last=True)
            unsynced = self._passes.stats.data - self._sent_at_sync
            if how == "acknowledged" and unsynced > UNSYNCED and attempt < APPROACHES:
                continue
            with self._recorder.step("freeze"):
                self._freeze_time = self._mounts.warm_up()
            if self._fits():
                break
            self._mounts.cool_down()
            self._freeze_time = None  # the next rehearsal may find another
            self._passes.pause(RETRY)
        f = self._forecast()
        self._check_scan(f)
        self._summary.predicted = f.total
        self._summary.target_unsynced = self._passes.stats.data - self._sent_at_sync
        self._summary.max_freeze = self._options.policy.max_freeze

    def _check_scan(self, f: Forecast) -> None:
        """A scan compares everything inside the freeze: refused when that is known
        to be too long, not ended when the limit passes."""
        limit = self._options.freeze_limit
        if self._tracker.name != "scan" or not self._mounts or not limit:
            return
        if f.total > Limits.of(limit).own:
            self._mounts.cool_down()
            raise LoopError(
                f"a scan of {self._source.path} would keep it frozen for about {f.total:.0f} s, "
                f"--freeze-limit allows {limit:g} s; nothing was frozen, no target was made"
            )

    def sync_target(self) -> str:
        self._report.event("phase", phase="sync", bytes=None)
        sent = self._passes.stats.data
        waiting = not self._target_times
        start = time.monotonic()
        with self._recorder.step("target sync"):
            how = self._ask_to_sync(waiting)
        seconds = time.monotonic() - start
        if how in ("acknowledged", "local"):
            # The target writes back as it receives: more than that is not left.
            unsynced = min(sent - self._sent_at_sync, TARGET_WINDOW)
            self._target_times.append((unsynced, seconds))
        else:
            self._target_times.append((0, 0.0))
        self._sent_at_sync = sent
        self._report.info(f"Target synced before the freeze ({how}, {seconds:.3f} s)")
        if self._out.heard is not None:
            # With nothing in between: what a round trip costs, and for the clocks.
            start = time.monotonic()
            self._ask_to_sync(waiting=False)
            self._target_times.append((0, time.monotonic() - start))
        return how

    def _ask_to_sync(self, waiting: bool) -> str:
        first_bytes = self._passes.first_bytes(4)
        how = self._out.sync(self._passes.pump, waiting=waiting, start=first_bytes)
        self._recorder.remote(self._out.heard)
        return how

    def _forecast(self) -> Forecast:
        return forecast(self.measured(), self._tracker.pending())

    def _fits(self) -> bool:
        """The last look before the stop command."""
        policy, f = self._options.policy, self._forecast()
        if policy.max_freeze is None or f.total <= policy.max_freeze:
            return True
        why = f"{f.total * 1000:.0f} ms expected, {policy.max_freeze * 1000:.0f} ms allowed"
        if time.monotonic() - self._first_end < policy.deadline:
            self._report.info(f"Not now: {why}")
            return False
        self._give_up(Decision(policy.on_deadline, f"no moment fitted ({why})", f))
        return True


def _without(data: list[Extent], same: Bitmap) -> list[Extent]:
    left = Bitmap(same.size)
    left.add(Extents.of(data))
    left.subtract(same)
    return list(left.extents())


def words(verdict: Verdict) -> str:
    """A verdict for a person."""
    if verdict.state == "lossy":
        return f"lossy, at least {format_size(verdict.missed)} missed"
    return verdict.state + (f" ({verdict.why})" if verdict.why else "")
