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
import errno
import mmap
import os
import time

from pyploop import _core
from pyploop._core import Extents, Fault, Known, Pump
from pyploop.device import Source
from pyploop.errors import (
    DeviceControlError,
    LoopError,
    OpenError,
    PyploopError,
    ReadError,
    WriteError,
)
from pyploop.events import Reporter
from pyploop.freeze import FileSystems, Timeline, run_command
from pyploop.image import HEADER_FRAME, clear_in_use
from pyploop.outputs import Output, explain_write
from pyploop.rounds import Round, decide
from pyploop.summary import Options, Summary
from pyploop.trackers import Batch, Tracker, Verdict
from pyploop.units import MIB, format_size
from pyploop.worker import run_cancellable

MEMORY = 16 * MIB
"""Bytes of read buffers, whatever the source's size."""
PIECE = 256 * 1024
"""Bytes of one read, and frame, from a page cache."""
HASH_MEMORY = 16 * MIB
"""Bytes of hashes above which a hash covers more than a block (at most 64 KiB)."""
FINAL_PASSES = 3
"""Passes with dirty blocks inside the freeze before it is called a loop."""
UNSTOPPED_PASSES = 20
"""The same when nothing stops the writer."""


class Sender:
    """Copies one source to one output; `run` does it once."""

    def __init__(
        self, source: Source, tracker: Tracker, out: Output, options: Options, report: Reporter
    ) -> None:
        self._source, self._tracker, self._out = source, tracker, out
        self._options, self._report = options, report
        self._known = Known(source.size, _hash_shift(source.size))
        out.prepare(self._known)
        self._window_start = time.monotonic()
        self._deadline: float | None = None
        """Of the freeze, once it has begun."""
        self.summary = Summary(
            source.path,
            source.size,
            tracker.name,
            source.io_mode,
            out.dialect,
            _core.hash_kernel(),
        )

    def run(self) -> Summary:
        source, report = self._source, self._report
        report.event("sending", image=source.image, size=source.size)
        report.info(f"Source: {source.path}, {format_size(source.size)}, read by {source.io_mode}")
        report.info(f"Tracker: {self._tracker.name} ({self._tracker.why})")
        if source.kind == "ploop" and not source.mounts:
            raise OpenError(f"{source.path} has no mount point, so it cannot be frozen")
        mounts = FileSystems(source.mounts, report)
        self._out.check_apart(mounts)
        with contextlib.ExitStack() as undo:
            undo.callback(mounts.close)
            self._tracker.start()
            undo.callback(self._tracker.stop, False)
            self._pump = self._make_pump()
            self._out.hello(self._pump)
            self.summary.dialect = self._out.dialect
            first = self._first_pass()
            self._rounds(first, mounts)
            if mounts or self._options.stop_command:
                self._sync_before_freeze(mounts)
            with contextlib.ExitStack() as held:
                held.enter_context(report.held())
                held.callback(mounts.thaw)
                self._freeze_and_finish(mounts)
        stats = self._pump.stats
        s = self.summary
        s.data_bytes, s.wire_bytes, s.read_bytes = stats.data, stats.wire, stats.read
        s.frames = stats.frames
        report.event("summary", **vars(s))
        return s

    def _make_pump(self) -> Pump:
        source, options = self._source, self._options
        # A buffered source in pieces that stay in the core's cache; the peer
        # then writes in such pieces too, which needs no large folios.
        cluster = PIECE if source.align == 1 else MIB
        if source.kind == "ploop":
            cluster = min(max(source.cluster, MIB), 64 * MIB)
        # Buffered reads copy in the reader itself, so one helper keeps two
        # cores busy; O_DIRECT needs requests in flight.
        readers = options.readers
        if readers is None:
            readers = 1 if source.align == 1 else 4
        return Pump(
            src_fd=source.fd,
            src_base=source.base,
            size=source.size,
            align=source.align,
            out_fd=self._out.fd,
            sink=self._out.sink,
            cluster=cluster,
            slots=max(4, min(MEMORY // cluster, 8 if cluster == PIECE else 16)),
            readers=readers,
            stall_ms=int(options.stall * 1000),
            rate=options.rate,
            known=self._known,
            hook=self._tracker.hook(),
        )

    # ---- passes

    def _send(self, batches: list[Batch], flags: int = 0) -> int:
        """Send the batches; returns the bytes of payload that this took."""
        before = self._pump.stats.data
        for batch in batches:
            bits = flags | _core.PASS_SKIP_ZERO
            bits |= _core.PASS_CHANGED if batch.changed else 0
            bits |= _core.PASS_HOLES if batch.holes else 0
            self._run_pass(batch.extents, bits)
        return self._pump.stats.data - before

    def _run_pass(self, extents: Extents, flags: int) -> None:
        pump = self._pump
        try:
            run_cancellable(lambda: pump.run(extents, flags), pump.cancel, self._tick)
        except Fault as fault:
            raise self._explain(fault) from fault

    def _tick(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise LoopError(
                f"frozen for more than {self._options.freeze_limit:g} s (--freeze-limit); thawed, "
                "no target was made"
            )
        pending = self._tracker.pending()
        dirty = ""
        if pending is not None:
            seconds = max(time.monotonic() - self._window_start, 1e-3)
            dirty = f"dirty {format_size(pending)} ({format_size(pending / seconds)}/s)"
        self._report.event("progress", done=self._pump.stats.done, dirty=dirty)

    def _explain(self, fault: Fault) -> PyploopError:
        path = self._source.path
        if fault.stage == "hook":
            return DeviceControlError.of(f"tracking {path} failed at {fault.pos}", fault)
        if fault.stage == "read" and fault.errno == errno.ENODATA:
            return ReadError(
                f"{path} ends at or after byte {fault.pos}: shorter than its {self._source.size} "
                "bytes at the start"
            )
        if fault.stage == "read":
            return ReadError.of(f"cannot read {path} at byte {fault.pos}", fault)
        if self._out.sink == _core.SINK_FILE:
            return WriteError.of(f"cannot write the target at byte {fault.pos}", fault)
        return explain_write(fault)

    def _first_pass(self) -> Round:
        data, holes = self._source.holes()
        size = self._source.size
        # The last block carries the exact size, so it goes in any case.
        if not data or data[-1][1] < size:
            data.append((max(size - 1, data[-1][1] if data else 0), size))
            # So it is no hole any more: what was written there since then
            # must not be followed by zeroes, its mark is gone.
            holes = [(a, min(b, size - 1)) for a, b in holes if a < size - 1]
        extents = Extents.of(data if size else [])
        self._report.event("phase", phase="first pass", bytes=extents.bytes)
        start = self._window_start = time.monotonic()
        sent = self._send([Batch(extents)], _core.PASS_LAST | _core.PASS_HOOK)
        if holes:
            # The target may hold something there (Output.prepare).
            sent += self._send([Batch(Extents.of(holes), holes=True)])
        seconds = time.monotonic() - start
        self.summary.first_pass = seconds
        self._report.info(
            f"First pass: {format_size(sent)} in {seconds:.3f} s, {_rate(sent, seconds)}"
        )
        self._report.event("round", number=0, sent=sent, seconds=seconds, verdict="")
        return Round(sent, seconds, seconds)

    def _rounds(self, first: Round, mounts: FileSystems) -> None:
        rounds: list[Round] = []
        while True:
            decision = decide(first, rounds, self._options.policy)
            if decision.freeze:
                self._report.info(f"Stop iterating after round {len(rounds)}: {decision.why}")
                return
            rounds.append(self._round(mounts))

    def _round(self, mounts: FileSystems) -> Round:
        """What was dirtied until now, file system's page cache included."""
        start = time.monotonic()
        run_cancellable(lambda: self._write_back(mounts))
        batches = self._tracker.take()
        window_start, self._window_start = self._window_start, time.monotonic()
        number = len(self.summary.rounds) + 1
        total = sum(b.extents.bytes for b in batches)
        self._report.event("phase", phase=f"round {number}", bytes=total)
        send_start = time.monotonic()
        sent = self._send(batches)
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

    def _write_back(self, mounts: FileSystems) -> None:
        """What is dirty in page caches becomes writes, which trackers see."""
        mounts.sync()
        self._source.write_back()

    def _repair(self, quiesced: bool) -> int | None:
        """Compare what may have been missed; returns the bytes that differed,
        None when the tracker has no way to tell."""
        repair = self._tracker.repair(quiesced)
        if repair is None:
            return None if quiesced else 0
        sent = self._send(repair.batches)
        self.summary.repairs += 1
        self.summary.repaired_bytes += sent
        self._report.note(
            f"Lost events: compared {repair.scope} by hash, sent {format_size(sent)} that differed"
        )
        self._report.event("repair", scope=repair.scope, sent=sent, frozen=quiesced)
        return sent

    def _sync_before_freeze(self, mounts: FileSystems) -> None:
        self._report.event("phase", phase="sync", bytes=None)
        start = time.monotonic()
        how = self._out.sync(self._pump, waiting=True, start=self._first_sector()[:4])
        self._report.info(
            f"Target synced before the freeze ({how}, {time.monotonic() - start:.3f} s)"
        )
        mounts.guard()
        # What was dirtied meanwhile must not wait for the freeze.
        self._round(mounts)

    # ---- frozen

    def _freeze_and_finish(self, mounts: FileSystems) -> None:
        options, report = self._options, self._report
        report.event("phase", phase="frozen", bytes=None)
        before = self._pump.stats.data
        time_line = Timeline()
        stopped = bool(mounts or options.stop_command)
        if options.freeze_limit and (mounts or (stopped and self._tracker.name != "scan")):
            # A scan compares all there is after the stop: as long as it takes.
            self._deadline = self._out.deadline = time.monotonic() + options.freeze_limit
        if options.stop_command:
            with time_line.step("stop command"):
                run_command(options.stop_command, "the stop command", self._time_left())
        self._source.check_same()
        with time_line.step("source sync"):
            run_cancellable(lambda: self._write_back(mounts))
        with time_line.step("freeze"):
            mounts.freeze()
        self._last_blocks(time_line, stopped)
        self._source.check_same()
        mounts.check_frozen()
        with time_line.step("last blocks"):
            start = self._first_sector()[:4]
            # Before END: the ploop driver refuses when blocks are unread.
            self._tracker.stop(True)
            if self._source.image_format == "ploop1":
                self._out.header(self._pump, self._ploop1_header())
        with time_line.step("target sync"):
            self._out.sync(self._pump, waiting=False, start=start)
        with time_line.step("target commit"):
            self.summary.acknowledged = self._out.finish(self._pump, self._source.size)
        if options.before_thaw:
            with time_line.step("before thaw"):
                what = "the target is complete, but the command before the thaw"
                run_command(options.before_thaw, what, self._time_left())
        with time_line.step("thaw"):
            mounts.thaw()
        s = self.summary
        s.frozen = time_line.steps
        s.frozen_total = sum(time_line.steps.values())
        s.frozen_bytes = self._pump.stats.data - before
        report.event("frozen", steps=s.frozen, total=s.frozen_total, sent=s.frozen_bytes)
        report.info(
            f"Frozen for {s.frozen_total:.3f} s ({format_size(s.frozen_bytes)} sent): "
            + ", ".join(f"{k} {v:.3f}" for k, v in time_line.steps.items())
        )

    def _time_left(self) -> float | None:
        """Seconds of the freeze that are left to a command."""
        if self._deadline is None:
            return None
        return max(self._deadline - time.monotonic(), 0.0)

    def _last_blocks(self, time_line: Timeline, stopped: bool) -> None:
        """Send what is dirty until nothing is, and no event is missing."""
        limit = FINAL_PASSES if stopped else UNSTOPPED_PASSES
        stamp = self._stamp()
        for _ in range(limit):
            if self._last_pass(time_line, stopped):
                break
        else:
            raise self._still_written(stopped)
        if stopped and self._stamp() != stamp:
            raise self._still_written(stopped)

    def _last_pass(self, time_line: Timeline, stopped: bool) -> bool:
        """One pass over what is dirty; true when it was the last."""
        with time_line.step("prove"):
            verdict = self._tracker.check(quiesced=True)
        if verdict.state == "busy":
            raise self._still_written(stopped)
        with time_line.step("last blocks"):
            sent = self._send(self._tracker.take())
        if verdict.state in ("complete", "unknown"):
            self.summary.completeness = verdict.state
            # A stopped scan has compared everything: once is enough.
            return sent == 0 or (stopped and self._tracker.name == "scan")
        with time_line.step("repair"):
            if self._repair(quiesced=True) is None:
                raise DeviceControlError(
                    f"tracking of {self._source.path} lost events ({_words(verdict)}) and cannot "
                    "tell which; no target was made"
                )
        return False  # prove again, from the new base

    def _still_written(self, stopped: bool) -> LoopError:
        who = "although it should be stopped" if stopped else "and nothing stops its writer (-F)"
        return LoopError(f"{self._source.path} is still being written {who}; no target was made")

    def _stamp(self) -> int:
        """Modification time of a plain file: scan has no other witness."""
        return os.fstat(self._source.fd).st_mtime_ns if self._source.kind == "file" else 0

    def _first_sector(self) -> bytes:
        """The first 512 bytes, zeroes where there are fewer."""
        base = self._source.base
        lead = base % self._source.align
        with mmap.mmap(-1, 8192) as page:  # aligned, as O_DIRECT wants it
            try:
                os.preadv(self._source.fd, [page], base - lead)
            except OSError as e:
                raise ReadError.of(f"cannot read {self._source.path} at byte 0", e) from e
            return page[lead : lead + HEADER_FRAME]

    def _ploop1_header(self) -> bytes:
        """The first sector of the image, not in use."""
        return clear_in_use(self._first_sector())


def _hash_shift(size: int) -> int:
    shift = 12
    while shift < 16 and (size >> shift) * 8 > HASH_MEMORY:
        shift += 1
    return shift


def _rate(n: int, seconds: float) -> str:
    return f"{format_size(n / seconds if seconds else 0)}/s"


def _words(verdict: Verdict) -> str:
    if verdict.state == "lossy":
        return f"lossy, at least {format_size(verdict.missed)} missed"
    return verdict.state + (f" ({verdict.why})" if verdict.why else "")
