# SPDX-License-Identifier: Apache-2.0
"""Tracking in the kernel by BPF programs, for every block device.

There are two kinds of marks (csrc/bpf.h).  `done` is set when a write has
completed: these blocks are sent.  `queued` is set when a write is submitted: that
is the safety net, since on some machines completion events get lost
(docs/internals/tracking.md).  So the sectors that the programs saw are compared with the
kernel's own accounting in /sys/block/X/stat.  When they agree, nothing was missed.
Otherwise, if the queued sectors agree, the missed blocks are among those queued
since the last proof.  Else they can be anywhere, and everything is compared by
hash.

Invariants:
1. A proof counts only from an exact base: a moment at which counters and
   accounting stood still.
2. Queued marks are dropped only at a moment at which completion is proven and
   nothing is in flight.  Those read at that moment are kept until the next one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from pyploop import _core
from pyploop._core import Bitmap, BpfTracking, Counters, Hook, Snapshot
from pyploop.disks.source import Source
from pyploop.errors import DeviceControlError
from pyploop.report.events import Reporter
from pyploop.system.sysblock import BlockDevice, is_bio_based
from pyploop.trackers import Batch, Completeness, Repair, whole
from pyploop.undo.ledger import UndoLedger
from pyploop.units import SECTOR
from pyploop.usage.io_accounting import (
    QUIET_DEADLINE,
    Accounting,
    wait_quiet,
    writes_in_flight,
)

BASE_DEADLINE = 0.25
"""Seconds to wait for an exact base before the first pass."""
LAGS = 10
"""Snapshots, 2 ms apart, until a kernel sum that lags behind the events counts as
wrong: the events count a request first."""
MAX_BITMAP = 64 << 20
"""Bytes of one bitmap; a larger device gets a coarser granule."""

# Bio-based drivers whose bios complete unchanged.  Others (dm, md) may have advanced
# or remapped them by then, so only their submission can be trusted.
_PLAIN_BIO = ("zram", "ram", "pmem", "btt")


@dataclass
class _Base:
    """Sectors at an exact moment: kernel accounting minus events."""

    done_gap: int
    queued_gap: int | None
    """None: something was in flight, so submissions cannot be balanced."""


class BpfTracker:
    """`--tracker bpf`."""

    name = "bpf"
    needs_hashes = True
    stop_before_end = False
    compares_everything = False
    drains_like_ploop = False

    def __init__(self, source: Source, why: str = "asked for") -> None:
        if source.queue is None:
            raise DeviceControlError(
                f"{source.path} is a plain file, and --tracker bpf follows block devices only",
                path=source.path,
                hint="use --tracker scan",
            )
        self.why = why
        self._block: BlockDevice = source.queue
        self._source = source
        self._size = source.size
        disk = self._block.disk
        if not is_bio_based(disk):
            self._mode = _core.BPF_RQ
        elif disk.startswith(_PLAIN_BIO):
            self._mode = _core.BPF_BIO
        else:
            self._mode = _core.BPF_QUEUE
        self._shift = 12
        while (self._size >> self._shift) // 8 > MAX_BITMAP:
            self._shift += 1
        self._queued_shift = self._shift if self._mode == _core.BPF_QUEUE else self._shift + 4
        # zram completes discards without accounting them.
        self._count_discards = not disk.startswith("zram")
        self._tracking: BpfTracking | None = None
        self._stat_fd = -1
        self._own_plan: UndoLedger | None = None
        self._accounting = Accounting(disk)
        self._suspect = ""
        """Why nothing can be proven since the base, until a repair."""
        self._base: _Base | None = None
        self._owes_proof = False
        self._checked: Counters | None = None
        """Counters of a quiesced check, until the next take."""
        self._taken: Counters | None = None
        """The same counters, at the last take after such a check."""
        self._queued = Bitmap(self._size, self._queued_shift)
        """Queued since the last proof but one (invariant 2)."""
        self._carry: Bitmap | None = None

    # ---- life

    def start(self, plan: UndoLedger | None = None) -> None:
        if plan is None:
            plan = self._own_plan = UndoLedger(f"tracking of {self._source.path}", Reporter())
        try:
            self._accounting.start(plan)
            self._open()
        except DeviceControlError:
            self.stop(ok=False)
            raise
        self._find_base()

    def try_out(self) -> None:
        """Load and attach before `start`, which has less to do then.  `stop` ends it,
        too.  DeviceControlError when the kernel refuses."""
        try:
            self._open()
        except DeviceControlError:
            self.stop(ok=False)
            raise

    def _open(self) -> None:
        if self._tracking is not None:
            return
        try:
            self._tracking = BpfTracking(
                major=self._block.disk_dev[0],
                minor=self._block.disk_dev[1],
                start=self._block.start,
                end=self._block.start + self._size,
                done_shift=self._shift,
                queued_shift=self._queued_shift,
                source=self._mode,
            )
            self._stat_fd = os.open(self._block.stat_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise DeviceControlError(
                f"cannot track {self._source.path} with BPF: {e.strerror}",
                path=self._source.path,
                hint="run as root, or use --tracker scan",
            ) from e

    def _find_base(self) -> None:
        deadline = time.monotonic() + BASE_DEADLINE
        while True:
            shot = self._snapshot()
            if shot.stable:
                quiet = self._writes_in_flight() == 0 and self._same(shot, self._snapshot())
                self._base = _Base(self._done_gap(shot), self._queued_gap(shot) if quiet else None)
                if quiet:
                    return
            if time.monotonic() >= deadline:
                return

    def stop(self, ok: bool) -> None:
        if self._tracking is not None:
            self._tracking.close()
            self._tracking = None
        if self._stat_fd >= 0:
            os.close(self._stat_fd)
            self._stat_fd = -1
        self._accounting.stop()
        if self._own_plan is not None:
            self._own_plan.close()

    @property
    def _t(self) -> BpfTracking:
        assert self._tracking is not None, "not started"
        return self._tracking

    # ---- marks

    def hook(self) -> Hook | None:
        return None if self._mode == _core.BPF_QUEUE else self._t.hook()

    def mark_all(self) -> bool:
        return True

    def pending(self) -> int | None:
        if self._mode == _core.BPF_QUEUE:
            return None
        return self._t.peek_done() << self._shift

    def take(self) -> list[Batch]:
        if self._mode != _core.BPF_QUEUE:
            # A mark is set before its event is counted, so without a new count there
            # is no new mark.  That saves a scan of the bitmap inside the freeze.
            checked, self._checked = self._checked, None
            if checked is not None and checked == self._taken:
                return []
            self._taken = checked
            return [Batch(self._t.take_extents())]
        dirty = Bitmap(self._size, self._shift)
        # A submitted write may reach the disk after the read, so it is sent again
        # until nothing was in flight at some moment.
        fresh = Bitmap(self._size, self._shift)
        quiet = self._writes_in_flight() == 0
        self._t.take_queued(fresh)
        dirty.update(fresh)
        if self._carry is not None:
            dirty.update(self._carry)
            if not quiet:
                fresh.update(self._carry)
        self._carry = fresh
        if quiet and self._writes_in_flight() == 0 and self._t_queued_unchanged(fresh):
            self._carry = None
        return [Batch(dirty.extents())]

    def _t_queued_unchanged(self, taken: Bitmap) -> bool:
        """Nothing was submitted since `taken` was read."""
        late = Bitmap(self._size, self._queued_shift)
        self._t.take_queued(late)
        if late.count == 0:
            return True
        taken.update(late)
        return False

    # ---- completeness

    def _snapshot(self, tries: int = 200) -> Snapshot:
        return self._t.snapshot(self._stat_fd, tries)

    def _accounted(self, shot: Snapshot) -> int:
        return shot.stat_write + (shot.stat_discard if self._count_discards else 0)

    def _done_gap(self, shot: Snapshot, late: bool = True) -> int:
        c = shot.after if late else shot.before
        seen = c.done_write + (c.done_discard if self._count_discards else 0)
        return self._accounted(shot) - seen

    def _queued_gap(self, shot: Snapshot) -> int:
        c = shot.after
        seen = c.queued_write + (c.queued_discard if self._count_discards else 0)
        return self._accounted(shot) - seen

    def _same(self, a: Snapshot, b: Snapshot) -> bool:
        return (
            b.stable
            and a.after == b.after
            and (a.stat_write, a.stat_discard) == (b.stat_write, b.stat_discard)
        )

    def _writes_in_flight(self) -> int:
        """Of the whole disk, which the counters count."""
        path = Path("/sys/block") / self._block.disk / "inflight"
        return int(path.read_text().split()[1])

    def _own_writes_in_flight(self) -> int:
        """Of the source alone: another partition may stay busy."""
        block = self._block
        return writes_in_flight(block) if block.is_partition else self._writes_in_flight()

    def check(self, quiesced: bool) -> Completeness:
        if self._accounting.interrupted():
            self._suspect = (
                "the accounting of the disk (queue/iostats) was switched off or on meanwhile"
            )
        if quiesced and not wait_quiet(self._own_writes_in_flight, QUIET_DEADLINE):
            return Completeness("busy", 0, self._size, "writes stay in flight")
        # Frozen time is expensive, but a failed proof costs more of it.
        shot = self._caught_up(2000 if quiesced else 200)
        self._checked = shot.after if quiesced and shot.stable else None
        if self._base is None:
            self._suspect = self._suspect or "there was no moment without writes to begin to count"
        if self._suspect:
            return Completeness("undecided", 0, self._size, self._suspect, needs_repair=True)
        assert self._base is not None
        if self._mode == _core.BPF_QUEUE:
            return self._check_queued(shot, quiesced)
        low = (self._done_gap(shot, late=True) - self._base.done_gap) * SECTOR
        high = (self._done_gap(shot, late=False) - self._base.done_gap) * SECTOR
        if low > 0:
            return Completeness("lossy", low, high)
        if not shot.stable:
            return Completeness("undecided", 0, max(high, 0), "writes during the check")
        return self._check_still(shot, quiesced)

    def _caught_up(self, tries: int) -> Snapshot:
        """A snapshot.  When the kernel's sum stays below that of the events, nothing
        can be proven with it."""
        base = self._base
        for left in reversed(range(LAGS)):
            shot = self._snapshot(tries)
            if self._mode == _core.BPF_QUEUE or base is None or not shot.stable:
                break
            if self._done_gap(shot) >= base.done_gap:
                break
            if left:
                time.sleep(0.002)
        else:
            self._suspect = (
                self._suspect or "the kernel has accounted less than the tracker has seen"
            )
        return shot

    def _check_still(self, shot: Snapshot, quiesced: bool) -> Completeness:
        """The sums agree; what else this moment proves."""
        assert self._base is not None
        still = self._writes_in_flight() == 0 and self._same(shot, self._snapshot(20))
        if quiesced and not still and not self._balanced_again():
            return Completeness("undecided", 0, self._size, "writes elsewhere on the disk")
        if self._owes_proof:
            # An earlier loss was repaired among the submitted blocks only.  That is
            # right if no submission was missed either.
            if not still:
                return Completeness(
                    "undecided", 0, 0, "repaired; the proof needs a moment without writes"
                )
            if self._queued_gap(shot) != self._base.queued_gap:
                self._base.queued_gap = None
                return Completeness("lossy", SECTOR, self._size, "submissions were missed too")
            self._owes_proof = False
        if still:
            gap = self._queued_gap(shot)
            if self._base.queued_gap is None:
                self._base.queued_gap = gap
            # What this take returns was submitted before or just after the moment.
            # It is kept until the next proof.  What was submitted and is not accounted
            # yet (in a scheduler) may be among the older marks, which stay until the
            # sums agree.
            if gap == self._base.queued_gap:
                self._queued.zero()
            self._t.take_queued(self._queued)
        return Completeness("complete")

    def _balanced_again(self) -> bool:
        """While another partition stays busy: a request between its event and its
        accounting could hide a loss once, but not at three separate moments."""
        assert self._base is not None
        for _ in range(2):
            time.sleep(0.001)
            shot = self._snapshot(2000)
            if not shot.stable or self._done_gap(shot) != self._base.done_gap:
                return False
        return True

    def _check_queued(self, shot: Snapshot, quiesced: bool) -> Completeness:
        assert self._base is not None
        if self._base.queued_gap is None:
            return Completeness("undecided", 0, self._size, "writes were in flight at the start")
        gap = (self._queued_gap(shot) - self._base.queued_gap) * SECTOR
        if shot.stable and gap == 0:
            return Completeness("complete")
        if quiesced and gap > 0:
            return Completeness("lossy", gap, gap)
        return Completeness("undecided", 0, abs(gap), "writes in flight")

    def repair(self, quiesced: bool) -> Repair | None:
        shot = self._snapshot()
        if self._mode == _core.BPF_QUEUE:
            still = self._is_still(shot)
            if not quiesced and not (still and self._suspect):
                return None
            # Counting starts anew here, as below; else no proof could follow.
            self._base = _Base(self._done_gap(shot), self._queued_gap(shot) if still else None)
            return self._compare_all()
        if not quiesced and not shot.stable:
            return None  # there is no exact base: left to the freeze
        queued_gap = self._base.queued_gap if self._base else None
        if quiesced and queued_gap is not None and self._queued_gap(shot) != queued_gap:
            queued_gap = None
        if self._suspect:
            # The sums of submissions use the same accounting.
            queued_gap = None
        # What was missed had completed before this moment.  So the comparison that
        # follows finds it, and counting starts anew.
        self._base = _Base(self._done_gap(shot), queued_gap)
        if queued_gap is None:
            self._owes_proof = False
            return self._compare_all()
        self._t.take_queued(self._queued)
        self._owes_proof = not quiesced
        return Repair(
            [Batch(self._queued.extents(), changed=True)], "blocks submitted since the last proof"
        )

    def _is_still(self, shot: Snapshot) -> bool:
        return (
            shot.stable and self._writes_in_flight() == 0 and self._same(shot, self._snapshot(20))
        )

    def _compare_all(self) -> Repair:
        why, self._suspect = self._suspect or "submissions cannot be proven complete", ""
        return Repair(whole(self._source), f"the whole source ({why})")
