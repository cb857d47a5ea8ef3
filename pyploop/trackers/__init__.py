# SPDX-License-Identifier: Apache-2.0
"""Dirty-block trackers behind one small protocol.

Invariant: clear, then read.  `take` clears the marks it hands out, and the
caller reads the blocks after that; a write that completes later sets its mark
again.  In the first pass the pump's hook does the same for each range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from pyploop._core import Extents, Hook
from pyploop.disks.source import Source
from pyploop.undo.ledger import Plan
from pyploop.units import format_size

TRACKERS = ("auto", "bpf", "ploop", "dm", "scan")

State = Literal["complete", "undecided", "lossy", "busy", "unknown"]


@dataclass(frozen=True)
class Completeness:
    """What a tracker can prove about its own completeness.

    complete: the kernel's counters agree with the events, nothing was missed.
    lossy: events were missed, at least `missed` bytes of them.
    undecided: writes were going on during the check; between `missed` and
    `at_most` bytes may be missing.
    busy: writes stay in flight although nothing should write any more.
    unknown: this tracker has nothing to compare with.
    """

    state: State
    missed: int = 0
    at_most: int = 0
    why: str = ""
    needs_repair: bool = False
    """No later look can tell: only a comparison (`Tracker.repair`) does."""

    def __str__(self) -> str:
        if self.state == "lossy":
            return f"lossy, at least {format_size(self.missed)} missed"
        return self.state + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class Batch:
    """Blocks to send.  changed: send only what differs from what was sent
    last; holes: the extents are holes of the source."""

    extents: Extents
    changed: bool = False
    holes: bool = False


@dataclass(frozen=True)
class Repair:
    """Blocks that may have been missed, to be compared by hash and sent when
    they differ.  `scope` says in words what they are."""

    batches: list[Batch] = field(default_factory=list)
    scope: str = ""


def whole(source: Source) -> list[Batch]:
    """The whole source, to be compared."""
    data, holes = source.holes()
    batches = [Batch(Extents.of(data), changed=True)]
    if holes:
        batches.append(Batch(Extents.of(holes), changed=True, holes=True))
    return batches


class Tracker(Protocol):
    """One way to learn which blocks were written."""

    name: str
    why: str
    """Why this one was taken, for the log."""
    needs_hashes: bool
    """The pump must keep hashes of what it sent."""
    stop_before_end: bool
    """`stop` may refuse, when blocks are unread: so it comes before END."""
    compares_everything: bool
    """It sees no writes.  Each `take` hands out the whole source, to be compared by
    hash: so it takes as long as reading all of it, also inside the freeze."""
    drains_like_ploop: bool
    """Each `take` goes on until nothing is dirty, as the only round of the C tool
    does."""

    def start(self, plan: Plan | None = None) -> None:
        """Begin to track, before the first block is read.  plan: for what
        must be undone also after SIGKILL; None: its own."""

    def hook(self) -> Hook | None:
        """What the pump calls before each read of the first pass."""

    def mark_all(self) -> bool:
        """Before a first pass that leaves blocks out: from now on a write to any
        block is marked, also where that pass has not been.  Returns whether its
        hook is of use then."""

    def pending(self) -> int | None:
        """Bytes that are dirty now, without taking them; None: not known."""

    def take(self) -> list[Batch]:
        """Hand out and clear what is dirty."""

    def check(self, quiesced: bool) -> Completeness:
        """Prove completeness so far; `quiesced`: nothing is being written."""

    def repair(self, quiesced: bool) -> Repair | None:
        """After a check that is not `complete`: what to compare, or None
        when nothing can be done about it."""

    def stop(self, ok: bool) -> None:
        """End tracking; `ok`: everything was handed out.  Never raises when
        ok is false."""
