# SPDX-License-Identifier: Apache-2.0
"""The objects that all stages of one copy share."""

from __future__ import annotations

from dataclasses import dataclass

from pyploop.diskcopy.hot_blocks import HotBlocks
from pyploop.diskcopy.options import Options, Summary
from pyploop.diskcopy.repairs import Repairs
from pyploop.diskcopy.source_pump import SourcePump
from pyploop.diskcopy.target import Output
from pyploop.disks.source import Source
from pyploop.disks.write_counters import Writes
from pyploop.freeze import FileSystems
from pyploop.freeze.deadline import Deadline
from pyploop.freeze.session import FreezeSession
from pyploop.report.events import Reporter
from pyploop.report.timeline import Recorder
from pyploop.trackers import Repair, Tracker, whole
from pyploop.undo.ledger import UndoLedger


@dataclass(frozen=True)
class Context:
    """The parts of one copy.  The sender makes and closes them."""

    source: Source
    tracker: Tracker
    out: Output
    options: Options
    report: Reporter
    plan: UndoLedger
    mounts: FileSystems
    session: FreezeSession
    source_pump: SourcePump
    writes: Writes
    """Whether the source was written, by the kernel's accounting."""
    hot: HotBlocks
    repairs: Repairs
    summary: Summary
    recorder: Recorder

    @property
    def deadline(self) -> Deadline:
        """Of the freeze; the output has the same one."""
        return self.out.deadline

    @property
    def stops(self) -> bool:
        """Something will be frozen or stopped."""
        return bool(self.session)

    def write_back(self) -> None:
        """What is dirty in page caches becomes writes, which trackers see."""
        self.mounts.sync()
        self.source.write_back()

    def beside(self, frozen: bool = False) -> list[str]:
        """The writes that no tracker sees, described for messages."""
        monitor = self.source.monitor
        return [] if monitor is None else monitor.untracked_writes(frozen)

    def compare_all(self, beside: list[str]) -> Repair:
        """Compare the whole source, because of the writes that `beside` describes."""
        return Repair(whole(self.source), f"the whole source ({'; '.join(beside)})")
