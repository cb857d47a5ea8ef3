# SPDX-License-Identifier: Apache-2.0
"""No tracking at all: read everything again and compare hashes with what was
sent last.  For files, and for users without privileges.

Authoritative only once writing has stopped: a round sees each block at a
moment of its own.  The last pass, after the freeze or the stop command, is the
one that counts; nothing here can prove that nobody writes any more.
"""

from __future__ import annotations

from pyploop._core import Extents, Hook
from pyploop.device import Source
from pyploop.plan import Plan
from pyploop.trackers import Batch, Repair, Verdict


class ScanTracker:
    """`--tracker scan`."""

    name = "scan"
    needs_hashes = True
    stop_before_end = False

    def __init__(self, source: Source, why: str = "asked for") -> None:
        self._source = source
        self.why = why

    def start(self, plan: Plan | None = None) -> None:
        pass

    def hook(self) -> Hook | None:
        return None

    def mark_all(self) -> bool:
        return True

    def pending(self) -> int | None:
        return None

    def take(self) -> list[Batch]:
        data, holes = self._source.holes()
        batches = [Batch(Extents.of(data), changed=True)]
        if holes:
            batches.append(Batch(Extents.of(holes), changed=True, holes=True))
        return batches

    def check(self, quiesced: bool) -> Verdict:
        return Verdict("unknown", why="scan compares contents, it has no events to count")

    def repair(self, quiesced: bool) -> Repair | None:
        return None

    def stop(self, ok: bool) -> None:
        pass
