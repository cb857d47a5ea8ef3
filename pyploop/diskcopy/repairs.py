# SPDX-License-Identifier: Apache-2.0
"""Comparisons by hash of what a tracker may have missed.

While the source runs they may take long.  Inside a freeze they are done in slices,
and given up as soon as the rest would take longer than allowed.  The rest is then
compared after the thaw.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from pyploop._core import Extents
from pyploop.diskcopy.options import Summary
from pyploop.diskcopy.relink import LinkLost
from pyploop.diskcopy.source_pump import SourcePump
from pyploop.errors import LoopError
from pyploop.report.events import Reporter
from pyploop.trackers import Batch, Repair
from pyploop.units import MIB, format_size

SLICE = 8 * MIB
"""Bytes that are compared between two looks at the clock: about 10 ms."""
MEANINGFUL = MIB
"""A comparison of fewer bytes does not measure a rate."""


class FreezeGivenUp(LoopError):
    """The source was thawed: a repair would have taken too long inside the freeze."""


class Repairs:
    """The repairs of one copy."""

    def __init__(
        self, source_pump: SourcePump, report: Reporter, summary: Summary, *, limited: bool = False
    ) -> None:
        """limited: --bwlimit limits the rate while the source runs."""
        self._source_pump, self._report, self._summary = source_pump, report, summary
        self._limited = limited
        self.rate = 0.0
        """Bytes per second of the last comparison; 0: not known."""
        self.left: Repair | None = None
        """The rest of a repair that was given up."""

    @property
    def seconds_left(self) -> float:
        """Seconds that the rest of a repair would take."""
        left = 0 if self.left is None else sum(_cost(b) for b in self.left.batches)
        return left / self.rate if self.rate else 0.0

    def run(self, repair: Repair, *, frozen: bool, until: float | None = None) -> int | None:
        """Compare, and send what differs.  Returns the bytes sent.

        until: time.monotonic() at which it must be done.  Returns None when it would
        take longer; the rest is in `left` then."""
        parts = list(repair.batches)
        if until is not None:
            parts = [s for b in repair.batches for s in ([b] if b.holes else _slices(b))]
        costs = [_cost(b) for b in parts]
        rest, compared, sent, begin = sum(costs), 0, 0, time.monotonic()
        self.left = None
        for n, part in enumerate(parts):
            if until is not None and self.rate and time.monotonic() + rest / self.rate > until:
                self.left = Repair(parts[n:], repair.scope)
                break
            try:
                sent += self._source_pump.send([part])
            except LinkLost:  # in the freeze: this part goes by SourcePump.bridge
                self.left = Repair(parts[n + 1 :], repair.scope)
                raise
            rest -= costs[n]
            compared += costs[n]
            if compared >= MEANINGFUL and (frozen or not self._limited):
                self.rate = compared / max(time.monotonic() - begin, 1e-6)
        if compared or self.left is None:
            self._report_repair(repair.scope, compared, sent, frozen)
        return sent if self.left is None else None

    def run_left(self) -> None:
        """After the thaw: the rest of a repair that was given up inside the freeze."""
        if self.left is not None:
            self.run(self.left, frozen=False)

    def _report_repair(self, scope: str, compared: int, sent: int, frozen: bool) -> None:
        self._summary.repairs += 1
        self._summary.repaired_bytes += sent
        part = f", {format_size(compared)} of it inside the freeze" if self.left else ""
        self._report.note(
            f"Tracking was not proven complete: compared {scope} by hash{part}, "
            f"sent {format_size(sent)} that differed"
        )
        self._report.event("repair", scope=scope, sent=sent, frozen=frozen)


def _cost(batch: Batch) -> int:
    """The bytes that it reads."""
    return 0 if batch.holes else batch.extents.bytes


def _slices(batch: Batch) -> Iterator[Batch]:
    part: list[tuple[int, int]] = []
    room = SLICE
    for start, end in batch.extents:
        at = start
        while at < end:
            cut = min(end, at + room)
            part.append((at, cut))
            room -= cut - at
            at = cut
            if not room:
                yield Batch(Extents.of(part), changed=batch.changed)
                part, room = [], SLICE
    if part:
        yield Batch(Extents.of(part), changed=batch.changed)
