# SPDX-License-Identifier: Apache-2.0
"""Passes over parts of the source: what the sender has its pump do.

Invariant: clear, then read (the tracker hands out and clears, the pump reads
after that).
"""

from __future__ import annotations

import errno
import mmap
import os
import time

from pyploop import _core
from pyploop._core import Extents, Fault, Known, Pump, PumpStats
from pyploop.device import Source
from pyploop.errors import (
    CancelledError,
    DeviceControlError,
    LoopError,
    PyploopError,
    ReadError,
    WriteError,
)
from pyploop.events import Reporter
from pyploop.image import HEADER_FRAME
from pyploop.outputs import Output, explain_write
from pyploop.summary import Options
from pyploop.trackers import Batch, Tracker
from pyploop.units import MIB, format_size
from pyploop.worker import run_cancellable

MEMORY = 16 * MIB
"""Bytes of read buffers, whatever the source's size."""
PIECE = 256 * 1024
"""Bytes of one read, and frame, from a page cache."""
HASH_MEMORY = 16 * MIB
"""Bytes of hashes above which a hash covers more than a block (at most 64 KiB)."""


class Passes:
    """The pump from one source to one output, and what stops it."""

    def __init__(
        self, source: Source, tracker: Tracker, out: Output, options: Options, report: Reporter
    ) -> None:
        self._source, self._tracker, self._out = source, tracker, out
        self._options, self._report = options, report
        known = Known(source.size, _hash_shift(source.size))
        out.prepare(known)
        self.window_start = time.monotonic()
        """When the marks that are now set began to be collected."""
        self.deadline: float | None = None
        """time.monotonic() at which a pass fails: the freeze's."""
        self.pump = self._make_pump(known)

    @property
    def stats(self) -> PumpStats:
        return self.pump.stats

    def cancel(self) -> None:
        """From any thread: what runs, and all that would, fails at once."""
        self._out.deadline = 0.0
        self.pump.cancel()

    def _make_pump(self, known: Known) -> Pump:
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
            known=known,
            hook=self._tracker.hook(),
        )

    def send(self, batches: list[Batch], flags: int = 0) -> int:
        """Send the batches; returns the bytes of payload that this took."""
        before = self.pump.stats.data
        for batch in batches:
            bits = flags | _core.PASS_SKIP_ZERO
            bits |= _core.PASS_CHANGED if batch.changed else 0
            bits |= _core.PASS_HOLES if batch.holes else 0
            self._run_pass(batch.extents, bits)
        return self.pump.stats.data - before

    def _run_pass(self, extents: Extents, flags: int) -> None:
        pump = self.pump
        try:
            run_cancellable(lambda: pump.run(extents, flags), pump.cancel, self._tick)
        except Fault as fault:
            raise self._explain(fault) from fault

    def _tick(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise LoopError(
                f"frozen for more than {self._options.freeze_limit:g} s (--freeze-limit); thawed, "
                "no target was made"
            )
        pending = self._tracker.pending()
        dirty = ""
        if pending is not None:
            seconds = max(time.monotonic() - self.window_start, 1e-3)
            dirty = f"dirty {format_size(pending)} ({format_size(pending / seconds)}/s)"
        self._report.event("progress", done=self.pump.stats.done, dirty=dirty)

    def _explain(self, fault: Fault) -> PyploopError:
        path = self._source.path
        if fault.errno == errno.ECANCELED:
            return CancelledError(f"the copy of {path} was cancelled; no target was made")
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

    def first_sector(self) -> bytes:
        """The first 512 bytes, zeroes where there are fewer."""
        base = self._source.base
        lead = base % self._source.align
        with mmap.mmap(-1, 8192) as page:  # aligned, as O_DIRECT wants it
            try:
                os.preadv(self._source.fd, [page], base - lead)
            except OSError as e:
                raise ReadError.of(f"cannot read {self._source.path} at byte 0", e) from e
            return page[lead : lead + HEADER_FRAME]


def _hash_shift(size: int) -> int:
    shift = 12
    while shift < 16 and (size >> shift) * 8 > HASH_MEMORY:
        shift += 1
    return shift
