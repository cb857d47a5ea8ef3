# SPDX-License-Identifier: Apache-2.0
"""The source pump: passes over parts of the source, from its disk to the output.

Invariant: clear, then read (the tracker hands out and clears, the pump reads
after that).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from pyploop import _core
from pyploop._core import Bitmap, Extents, Fault, Known, Prior, Proof, Pump, PumpStats
from pyploop.diskcopy import target_room
from pyploop.diskcopy.compression import NEVER, Compression
from pyploop.diskcopy.framing import PIECE, Extent
from pyploop.diskcopy.lanes import LANE_STALL
from pyploop.diskcopy.options import Options
from pyploop.diskcopy.proof import Ask, descend
from pyploop.diskcopy.relink import LinkLost, attempt
from pyploop.diskcopy.target import Output, explain_write
from pyploop.diskcopy.target_room import Watched
from pyploop.diskcopy.write_mode import WRITERS
from pyploop.disks import small_reads
from pyploop.disks.source import Source
from pyploop.errors import (
    CancelledError,
    DeviceControlError,
    ParameterError,
    PyploopError,
    ReadError,
    WriteError,
)
from pyploop.report.events import Reporter
from pyploop.trackers import Batch, Tracker
from pyploop.units import BLOCK, MIB, SECTOR, format_size
from pyploop.wire.d1 import Feature

if TYPE_CHECKING:
    from pyploop.diskcopy.delta import Reused
    from pyploop.diskcopy.digests import Reader
    from pyploop.diskcopy.prior import Contents

MEMORY = 16 * MIB
"""Bytes of read buffers, whatever the source's size."""
DIRECT_PIECE = MIB
"""Bytes of one read, when it is written with O_DIRECT: a disk takes large pieces faster."""
LANES_SLOTS = 24
"""Each lane keeps one buffer, and others are being read meanwhile."""
HASH_MEMORY = 16 * MIB
"""Bytes of all hashes, above which one covers more than a block (at most 64 KiB)."""


class SourcePump:
    """The native pump (`pump`) from one source to one output, and what stops it."""

    def __init__(
        self, source: Source, tracker: Tracker, out: Output, options: Options, report: Reporter
    ) -> None:
        self._source, self._tracker, self._out = source, tracker, out
        self._options, self._report = options, report
        self._known: Known | None = None
        self.proof: Proof | None = None
        """Of what was sent; None: none is kept."""
        self._notes = 0
        """So many of the source's notes are logged."""
        self._greeting = 0
        self._gone = threading.Event()
        self.window_start = time.monotonic()
        """time.monotonic() since which the present marks are collected."""
        self._shared: list[Watched] = []
        self._left: list[tuple[Extents, int]] = []
        """Passes, with their flags, that a connection did not take in a freeze."""
        self._passed = 0
        """Bytes of earlier passes over parts of the same extents."""
        self._table: Prior | None = None
        """Of what the target had."""
        self.pump: Pump
        self.compression = NEVER
        """As it was agreed; known after `begin`."""

    def greet(self) -> None:
        """Before all else: greet the peer, which decides on the framing."""
        self._greeting = self._out.hello()
        compare = self._options.reserve != 0
        self._greeting += self._out.announce(self._source, compare_room=compare)

    def begin(self) -> None:
        """After `greet`, when all checks are done.  The target may be touched from now
        on."""
        framing = self._out.framing
        unit = BLOCK
        if framing.needs_hashes(self._tracker.needs_hashes):
            self._known = Known(self._source.size, _hash_shift(self._source.size))
            unit = self._known.chunk
        if self._keeps_proof():
            self.proof = Proof(self._source.size)
        self._out.prepare(self._known)
        if self._out.prior is not None:
            self._table = self._out.prior.begin(self._source.size)
        self.compression = self._agreed_compression()
        cluster = framing.cluster(self._source, unit)
        if self._out.write_mode.direct:
            cluster = max(cluster, DIRECT_PIECE)
        self.pump = self._make_pump(cluster)
        if self._out.lanes is not None and self._out.features & Feature.LANES:
            self._out.lanes.open(self.pump, lambda: self.pump.stats.wire)
        if self._out.resend is not None:
            self._out.resend.begin(self.pump)
        if self._gone.is_set():
            self.pump.cancel()

    def _agreed_compression(self) -> Compression:
        wanted = self._options.compression
        if wanted and not self._out.features & Feature.COMPRESSED:
            self._report.info("Compression: never (the target does not take compressed frames)")
            return NEVER
        if wanted:
            self._report.info(f"Compression: {wanted.name}")
        return wanted

    def _keeps_proof(self) -> bool:
        """ParameterError when one is asked for, and cannot be kept or compared."""
        options, out = self._options, self._out
        if options.proof == "never":
            return False
        if Feature.PROOF in out.features:
            return True
        if options.proof == "always" and out.sink != _core.SINK_FILE:
            raise ParameterError(
                f"--proof always: the receiver does not compare a proof ({out.dialect}); nothing "
                "was sent",
                hint="use a receiver that is a pyploop of this version, with a way back (-f)",
            )
        return options.proof == "always" or options.receipt is not None

    def watch_room(self) -> None:
        """From now on a pass fails before the target fills a file system on which the
        source grows.  WriteError when the copy does not fit there."""
        things, reserve = self._out.things(), self._options.reserve
        if things is None or reserve == 0:
            return
        try:
            has = os.fstat(self._out.fd).st_blocks * SECTOR  # of an output in place
            self._shared = target_room.shared(self._source, things, reserve, has)
        except WriteError as e:
            self._out.refuse(e)
            raise
        for watched in self._shared:
            self._report.detail(
                f"The target grows on {watched.name}, as the source does: "
                f"{format_size(watched.reserve)} are left free there (--reserve)"
            )

    def pause(self, seconds: float) -> None:
        """Wait so long, or until a cancel."""
        self._gone.wait(seconds)

    def limit(self, running: bool) -> None:
        """--bwlimit applies only while the source runs.  And what is compressed in the
        freeze depends on what was the bottleneck before."""
        self.pump.limit(self._options.rate if running else 0)
        self.pump.frozen(not running)
        if self._out.resend is not None:
            self._out.resend.frozen = not running

    @property
    def stats(self) -> PumpStats:
        stats = self.pump.stats
        return stats._replace(wire=stats.wire + self._greeting)

    def cancel(self) -> None:
        """From any thread: the present pass, and each one after it, fails at once."""
        self._gone.set()
        self._out.deadline.cancel()
        with contextlib.suppress(AttributeError):  # not begun yet
            self.pump.cancel()

    def _make_pump(self, cluster: int) -> Pump:
        source, options = self._source, self._options
        if self.compression:
            cluster = min(cluster, MIB)  # larger frames are not compressed
        # Buffered reads copy in the reader itself, so one helper keeps two
        # cores busy; O_DIRECT, here or there, needs requests in flight.
        readers, mode = options.readers, self._out.write_mode
        if readers is None:
            readers = 1 if source.align == 1 and not mode.direct else WRITERS
        return Pump(
            src_fd=source.fd,
            src_base=source.base,
            size=source.size,
            align=source.align,
            out_fd=self._out.fd,
            sink=self._out.sink,
            direct=mode.direct,
            ahead=mode.ahead,
            zero_holes=self._out.old_contents,
            cluster=cluster,
            slots=self._slots(cluster),
            readers=readers,
            stall_ms=int(options.stall * 1000),
            lane_stall_ms=int(LANE_STALL * 1000),
            rate=options.rate,
            known=self._known,
            prior=self._table,
            proof=self.proof,
            hook=self._tracker.hook(),
            async_packets=self._out.packets.unanswered,
            window=self._out.packets.window,
            digests=self._out.packets.digests,
            features=self._out.features,
            compress=self.compression.mode,
            level=self.compression.level,
            tail=0 if source.tail is None else source.tail.size,
            tail_fd=-1 if source.tail is None else source.tail.fd,
            tail_pos=0 if source.tail is None else source.tail.pos,
        )

    def _slots(self, cluster: int) -> int:
        most = 8 if cluster == PIECE else 16
        if self._out.features & Feature.LANES:
            most = LANES_SLOTS
        return max(4, min(MEMORY // cluster, most))

    def send(self, batches: list[Batch], flags: int = 0) -> int:
        """Send the batches.  Returns the bytes of payload sent."""
        before = self.pump.stats.data
        self._run([(b.extents, flags | self._out.framing.flags(b)) for b in batches])
        return self.pump.stats.data - before

    def _run(self, passes: list[tuple[Extents, int]]) -> None:
        """Several passes.  LinkLost, only in the freeze: those that are left are kept for
        `bridge`."""
        for n, (extents, flags) in enumerate(passes):
            try:
                self._run_pass(extents, flags)
            except LinkLost:
                self._left += [(_above(extents, self.pump.floor), flags), *passes[n + 1 :]]
                raise

    @property
    def cut_seconds(self) -> float:
        """Seconds so far without a connection."""
        return 0.0 if self._out.resend is None else self._out.resend.seconds

    def bridge(self, why: LinkLost) -> bool:
        """After the freeze, and a failure of the connection in it: as Resend.bridge.  What
        the passes of the freeze did not come to is sent, too."""
        assert self._out.resend is not None
        if self._out.resend.bridge(self.pump, why):
            return True
        left, self._left = self._left, []
        self._run(left)
        return False

    def send_differences(self, prior: Contents, extents: Extents, flags: int) -> int:
        """Send what differs from what the target had.  Returns the bytes of payload sent."""
        assert self._known is not None  # our own frames always need it
        before = self.pump.stats.data
        left = list(extents)
        left.reverse()
        bits = flags | self._out.framing.flags(Batch(extents)) | _core.PASS_PRIOR
        for _, end in prior.parts(self._known):
            part = []
            while left and left[-1][0] < end:
                first, last = left.pop()
                part.append((first, min(last, end)))
                if last > end:
                    left.append((end, last))
            if part:
                self._run_pass(Extents.of(part), bits)
                self._passed += self.pump.stats.done
        self._passed = 0
        return self.pump.stats.data - before

    def parts(self) -> tuple[list[Extent], list[Extent]]:
        """(data, holes) of the source, as the first pass treats them."""
        framing = self._out.framing
        data, holes = framing.parts(self._source)
        self.log_notes()
        if framing.as_ploop and framing.holes_left_out and self._known is not None:
            # A block of zeroes that is not a hole is sent, as the C tool does.
            for start, end in data:
                self._known.assume_data(start, end)
        return data, holes

    def log_notes(self) -> None:
        """Log what the user should know about the source, each note once."""
        for note in self._source.notes[self._notes :]:
            self._report.note(note)
        self._notes = len(self._source.notes)

    def compare(self, digests: Reader) -> tuple[Bitmap, Reused]:
        """What the target has kept and is the same here.  Tracking must be on."""
        from pyploop.diskcopy import delta  # what it needs takes time to load, and few use it

        assert self._known is not None  # our own frames always need it
        return delta.compare_disk(self._source, self._known, digests, self._check_gone)

    def _check_gone(self) -> None:
        if self._gone.is_set():
            raise CancelledError(f"the copy of {self._source.path} was cancelled")

    def _run_pass(self, extents: Extents, flags: int) -> None:
        pump, resend = self.pump, self._out.resend
        while True:
            fault = attempt(partial(pump.run, extents, flags), pump, self._tick)
            if fault is None:
                return
            lost = None if resend is None else resend.lost(fault)
            if resend is None or lost is None:
                raise self._explain(fault) from fault
            if resend.frozen:
                raise lost from fault
            floor = pump.floor
            resend.bridge(pump, lost)
            extents = _above(extents, floor)

    def _tick(self) -> None:
        self._out.deadline.check()
        for file_system in self._shared:
            file_system.check()
        pending = self._tracker.pending()
        dirty = ""
        if pending is not None:
            seconds = max(time.monotonic() - self.window_start, 1e-3)
            dirty = f"dirty {format_size(pending)} ({format_size(pending / seconds)}/s)"
        self._report.event("progress", done=self._passed + self.pump.stats.done, dirty=dirty)

    def _explain(self, fault: Fault) -> PyploopError:
        path = self._source.path
        if fault.errno == errno.ECANCELED:
            return CancelledError(f"the copy of {path} was cancelled; no target was made")
        if fault.stage == "hook":
            return DeviceControlError.of(
                f"tracking {path} failed at byte {fault.pos}", fault, path=path
            )
        if fault.stage == "read" and fault.errno == errno.ENODATA:
            return ReadError(
                f"{path} has become shorter during the copy: it had {self._source.size} bytes, and "
                f"ends near byte {fault.pos}; no target was made",
                path=path,
                hint="start the copy again",
            )
        if fault.stage == "read":
            return ReadError.of(f"cannot read {path} at byte {fault.pos}", fault, path=path)
        if self._out.sink == _core.SINK_FILE:
            return WriteError.of(f"cannot write the target at byte {fault.pos}", fault)
        return explain_write(fault)

    def note_header(self, header: bytes) -> None:
        """The target's first bytes are these, and the rest of the first block is the
        source's."""
        if self.proof is not None:
            block = self.first_bytes(min(BLOCK, self._source.size))
            self.proof.note(0, header + block[len(header) :])

    def send_again(self, ask: Ask) -> int:
        """Send the blocks in which the peer's proof differs.  Returns the bytes sent.
        TargetDiffers: they are too many."""
        assert self.proof is not None
        before = self.pump.stats.data
        self._run([(Extents.of(descend(self.proof, ask)), 0)])
        return self.pump.stats.data - before

    def first_bytes(self, size: int) -> bytes:
        """The first `size` bytes, 4096 at most; zeroes where there are fewer."""
        with (
            mmap.mmap(-1, small_reads.room(self._source, size)) as page,
            memoryview(page) as memory,
        ):
            return bytes(small_reads.read(self._source, memory, 0, size)).ljust(size, b"\0")


def _above(extents: Extents, floor: int) -> Extents:
    """Those parts that lie at `floor` or past it."""
    return Extents.of([(max(start, floor), end) for start, end in extents if end > floor])


def _hash_shift(size: int) -> int:
    shift = 12
    while shift < 16 and (size >> shift) * 8 > HASH_MEMORY:
        shift += 1
    return shift
