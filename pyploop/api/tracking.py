# SPDX-License-Identifier: Apache-2.0
"""Following what is written to a device: `track`, for backup tools."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pyploop.api.reporting import make_reporter
from pyploop.disks.opening import open_source
from pyploop.errors import ParameterError
from pyploop.freeze.filesystems import FileSystems
from pyploop.system.worker import run_cancellable
from pyploop.trackers import Batch, State, whole
from pyploop.trackers.registry import choose_marking
from pyploop.undo.ledger import UndoLedger

if TYPE_CHECKING:
    from pyploop.disks.source import Source
    from pyploop.report.event_types import Event
    from pyploop.trackers import Tracker as Marks


class Extent(NamedTuple):
    """Bytes of the device, from `start` up to, and without, `end`."""

    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What was written since the last call."""

    extents: tuple[Extent, ...]
    """Ascending and disjoint.  They may hold more than was written (blocks of 4 KiB or
    larger), and with `complete` never less."""
    completeness: State
    """`complete`: it is proven that no write until now is missing, in this call or an earlier
    one.  `unknown`: the device tracks by itself and has nothing to compare with.
    `undecided`: writes were going on, a later call can tell.  `lossy`: some were missed, and
    which is not known yet.  `busy`: with `quiesced`, writes are still going on."""
    missed: int
    """Bytes of writes that are missing, at least."""
    why: str
    """Why it is not complete, or why `extents` holds more than what was seen, in words."""

    @property
    def bytes(self) -> int:
        """Of all extents."""
        return sum(end - start for start, end in self.extents)


def track(
    device: str | os.PathLike[str],
    *,
    cluster: int | None = None,
    unsafe_in_use: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Tracker:
    """Track what is written to a block device, in a `with` statement.

        with pyploop.track("/dev/sdb1") as tracker:
            back_up_everything()
            for start, end in tracker.changed().extents:
                back_up(start, end)

    device: a block device, /dev/ploopN, or the image file of a loop device.  cluster: bytes
    of a cluster of a device-mapper target that tracks by itself.  unsafe_in_use: track
    although something writes to it in a way that cannot be seen.  on_event: as for copy.

    Entering it raises DeviceError (no device), OpenError (it is used in a way that cannot be
    tracked), or DeviceControlError (this kernel, or this user, cannot track it).
    """
    return Tracker(device, cluster=cluster, unsafe_in_use=unsafe_in_use, on_event=on_event)


class Tracker:
    """Tracks one device while its `with` statement lasts; made by `track`."""

    def __init__(
        self,
        device: str | os.PathLike[str],
        *,
        cluster: int | None,
        unsafe_in_use: bool,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self._path, self._cluster, self._unsafe = os.fspath(device), cluster, unsafe_in_use
        self._report = make_reporter(on_event)
        self._undo = contextlib.ExitStack()
        self._open: tuple[Source, Marks, FileSystems] | None = None

    def __enter__(self) -> Tracker:
        with contextlib.ExitStack() as undo:
            source = open_source(self._path, unsafe=self._unsafe)
            undo.callback(source.close)
            marks = choose_marking(source, self._cluster)
            undo.callback(marks.stop, False)
            plan = UndoLedger(f"tracking of {self._path}", self._report)
            undo.callback(plan.close)
            systems = FileSystems(source.mounts, self._report, plan)
            undo.callback(systems.close)
            if source.monitor is not None:
                source.monitor.account(plan)
            marks.start(plan)
            marks.mark_all()
            self._report.info(f"Tracker: {marks.name} ({marks.why})")
            self._open = source, marks, systems
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._open = None
        self._undo.close()

    @property
    def name(self) -> str:
        """Which tracker it is: `bpf`, `ploop`, or `dm`."""
        return self._opened[1].name

    @property
    def size(self) -> int:
        """Bytes of the device."""
        return self._opened[0].size

    def changed(self, *, quiesced: bool = False) -> Changes:
        """What was written since the last call, or since the tracking began.

        Read the extents after this call: a write that comes meanwhile is in the next one.
        Page caches are written back first, so that what programs have written counts.
        quiesced: nothing is being written now, in `pyploop.frozen` say, so that the proof
        is for this moment.

        ReadError: the device has another size.  LoopError: something has begun to use it in
        a way that cannot be tracked.  DeviceControlError: tracking or writing back failed.
        """
        source, marks, systems = self._opened
        source.check_device()
        source.check_size()
        monitor = source.monitor
        if monitor is not None:
            monitor.changed(last=quiesced)
        if not quiesced:
            run_cancellable(systems.sync)
        run_cancellable(source.write_back)
        beside = [] if monitor is None else monitor.untracked_writes()
        batches = marks.take()
        found = marks.check(quiesced)
        why = found.why
        if found.state == "lossy" or found.needs_repair:
            repair = marks.repair(quiesced)
            if repair is not None:
                # What was missed lies in these blocks, and counting starts anew.
                batches += repair.batches
                found = marks.check(quiesced)
                why = f"events were missed, so it holds {repair.scope} too"
        if beside:
            batches += whole(source)
            why = f"{'; '.join(beside)}: written past what is tracked, so it holds the whole device"
        return Changes(
            extents=_merged(batches), completeness=found.state, missed=found.missed, why=why
        )

    @property
    def _opened(self) -> tuple[Source, Marks, FileSystems]:
        if self._open is None:
            raise ParameterError(
                f"{self._path} is not tracked: use it inside `with pyploop.track(…) as tracker:`"
            )
        return self._open


def _merged(batches: Iterable[Batch]) -> tuple[Extent, ...]:
    found: list[Extent] = []
    for start, end in sorted(pair for batch in batches for pair in batch.extents):
        if found and start <= found[-1].end:
            found[-1] = Extent(found[-1].start, max(end, found[-1].end))
        else:
            found.append(Extent(start, end))
    return tuple(found)
