# SPDX-License-Identifier: Apache-2.0
"""No tracking at all: read everything again and compare hashes with what was
sent last.  For files, and for users without privileges.

It is right only once writing has stopped, since a round sees each block at a
different moment.  So the last pass counts, after the freeze or the stop command.
Nothing here can prove that writing has stopped; `pyploop.disks.write_counters` can
show that it has not.
"""

from __future__ import annotations

import contextlib

from pyploop._core import Hook
from pyploop.disks.source import Source
from pyploop.errors import DeviceControlError
from pyploop.trackers import Batch, Completeness, Repair, whole
from pyploop.undo.ledger import UndoLedger
from pyploop.usage.io_accounting import (
    QUIET_DEADLINE,
    Accounting,
    wait_quiet,
    writes_in_flight,
)


class ScanTracker:
    """`--tracker scan`."""

    name = "scan"
    needs_hashes = True
    stop_before_end = False
    compares_everything = True
    drains_like_ploop = False

    def __init__(self, source: Source, why: str = "asked for") -> None:
        self._source = source
        self.why = why
        self._accounting = None if source.queue is None else Accounting(source.queue.disk)

    def start(self, plan: UndoLedger | None = None) -> None:
        if self._accounting is not None and plan is not None:
            with contextlib.suppress(DeviceControlError):  # only a check that is missing then
                self._accounting.start(plan)

    def hook(self) -> Hook | None:
        return None

    def mark_all(self) -> bool:
        return True

    def pending(self) -> int | None:
        return None

    def take(self) -> list[Batch]:
        return whole(self._source)

    def check(self, quiesced: bool) -> Completeness:
        block = self._source.queue
        # A write submitted before the stop may reach the disk after the scan has read.
        if quiesced and block and not wait_quiet(lambda: writes_in_flight(block), QUIET_DEADLINE):
            return Completeness("busy", why="writes stay in flight")
        return Completeness("unknown", why="scan compares contents, it has no events to count")

    def repair(self, quiesced: bool) -> Repair | None:
        return None

    def stop(self, ok: bool) -> None:
        if self._accounting is not None:
            self._accounting.stop()
