# SPDX-License-Identifier: Apache-2.0
"""Dirty-block trackers behind one small protocol: which blocks were written.

    bpf    BPF programs on the kernel's block layer, for every block device
    ploop  the ploop driver's own tracking (OpenVZ 6 and 7)
    dm     messages to a device-mapper target with tracking (OpenVZ 9)
    scan   no tracking: reads everything and compares hashes

Invariant: clear, then read.  `take` clears the marks that it returns, and the
caller reads the blocks after that.  A write that completes later sets its mark
again.  In the first pass the pump's hook does the same for each range.

May import `disks`, `usage` and what is below them.  A new tracker is a class with
the attributes and methods of `Tracker`, a name in TRACKERS, and a line in
`registry.choose`.  No other room asks for a tracker's name: what a caller must
know is a capability, an attribute of the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from pyploop._core import Extents, Hook
from pyploop.disks.source import Source
from pyploop.undo.ledger import UndoLedger
from pyploop.units import format_size

TRACKERS = ("auto", "bpf", "ploop", "dm", "scan")

State = Literal["complete", "undecided", "lossy", "busy", "unknown"]


@dataclass(frozen=True)
class Completeness:
    """What a tracker can prove about the completeness of its marks.

    complete: the kernel's counters agree with the events; nothing was missed.
    lossy: the events of at least `missed` bytes were missed.
    undecided: there were writes during the check; between `missed` and `at_most`
    bytes may be missing.
    busy: writes stay in flight although nothing should write any more.
    unknown: this tracker has no counters to compare with.
    """

    state: State
    missed: int = 0
    at_most: int = 0
    why: str = ""
    needs_repair: bool = False
    """No later check can prove it, only a comparison (`Tracker.repair`)."""

    def __str__(self) -> str:
        if self.state == "lossy":
            return f"lossy, at least {format_size(self.missed)} missed"
        return self.state + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class Batch:
    """Blocks to send.  changed: only those that differ from what was sent last.
    holes: the extents are holes of the source."""

    extents: Extents
    changed: bool = False
    holes: bool = False


@dataclass(frozen=True)
class Repair:
    """Blocks that may have been missed: to be compared by hash, and sent when they
    differ.  scope: what they are, for messages."""

    batches: list[Batch] = field(default_factory=list)
    scope: str = ""


def whole(source: Source) -> list[Batch]:
    """The whole source as batches to be compared."""
    data, holes = source.holes()
    batches = [Batch(Extents.of(data), changed=True)]
    if holes:
        batches.append(Batch(Extents.of(holes), changed=True, holes=True))
    return batches


class Tracker(Protocol):
    """One way to learn which blocks were written."""

    name: str
    why: str
    """Why this tracker was chosen, for the log."""
    needs_hashes: bool
    """The pump must keep the hashes of what it sent."""
    stop_before_end: bool
    """`stop` fails when dirty blocks are unread: so it is called before END."""
    compares_everything: bool
    """It sees no writes.  Each `take` hands out the whole source, to be compared by
    hash: so it takes as long as reading all of it, also inside the freeze."""
    drains_like_ploop: bool
    """Each `take` goes on until nothing is dirty, as the only round of the C tool
    does."""

    def start(self, plan: UndoLedger | None = None) -> None:
        """Begin to track, before the first block is read.  plan: of the copy, for
        undo steps that outlive a SIGKILL; None: the tracker's own.
        DeviceControlError."""

    def hook(self) -> Hook | None:
        """What the pump calls before each read of the first pass; None: nothing."""

    def mark_all(self) -> bool:
        """Before a first pass that leaves blocks out: from now on a write to any
        block is marked, even where that pass has not been yet.  Returns whether the
        hook is still needed."""

    def pending(self) -> int | None:
        """Bytes that are dirty now; clears nothing.  None: not known."""

    def take(self) -> list[Batch]:
        """Return what is dirty, and clear it.  DeviceControlError."""

    def check(self, quiesced: bool) -> Completeness:
        """Prove completeness so far.  quiesced: nothing should be writing."""

    def repair(self, quiesced: bool) -> Repair | None:
        """After a check that is not `complete`: what to compare; None: the tracker
        does not know."""

    def stop(self, ok: bool) -> None:
        """End tracking.  ok: everything was taken; DeviceControlError when blocks are
        left.  Never raises when ok is false."""
