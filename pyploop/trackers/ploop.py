# SPDX-License-Identifier: Apache-2.0
"""The ploop driver's own tracking (OpenVZ 6 and 7 kernels).

The driver keeps the marks of a top delta in clusters; SETPOS before each read
of the first pass tells it how far the pass has come.
"""

from __future__ import annotations

import contextlib
import errno

from pyploop._core import Extents, Hook, PloopTracking
from pyploop.disks.source import Source
from pyploop.errors import DeviceControlError
from pyploop.trackers import Batch, Completeness, Repair
from pyploop.undo.ledger import UndoLedger

MAX_LAPS = 10
"""Times that one `take` goes on when the driver returns to an earlier position: it
would not end on a device that is dirtied faster than it is read."""


class PloopTracker:
    """`--tracker ploop`."""

    name = "ploop"
    needs_hashes = False
    stop_before_end = True
    compares_everything = False
    drains_like_ploop = True

    def __init__(self, source: Source, why: str = "asked for") -> None:
        if source.kind != "ploop":
            raise DeviceControlError(f"{source.path} is not a ploop device", path=source.path)
        self.why = why
        self._path = source.path
        self._size = source.size
        self._tracking = PloopTracking(source.control_fd)
        self._active = False
        self._deferred: tuple[int, int] | None = None
        """Taken from the driver, and deferred to the next `take`."""

    def start(self, plan: UndoLedger | None = None) -> None:
        try:
            self._tracking.start(self._size)
        except OSError as e:
            raise DeviceControlError.of(
                f"cannot start the tracking of {self._path} (PLOOP_IOC_TRACK_INIT)",
                e,
                path=self._path,
            ) from e
        self._active = True

    def hook(self) -> Hook | None:
        return self._tracking.hook()

    def mark_all(self) -> bool:
        # The driver marks only what lies before the position.  Setting an earlier one
        # later would drop the marks after it.
        try:
            self._tracking.set_position(self._size)
        except OSError as e:
            raise DeviceControlError.of(
                f"cannot set the position of the tracking of {self._path} (PLOOP_IOC_TRACK_SETPOS)",
                e,
                path=self._path,
            ) from e
        return False

    def pending(self) -> int | None:
        return None

    def take(self) -> list[Batch]:
        """The extents as the driver returns them, with a new batch each time that it
        returns to an earlier position.  Until it has none, or as long as the C tool
        goes on."""
        batches: list[Batch] = []
        lap: list[tuple[int, int]] = []
        total = 0
        while (extent := self._next()) is not None:
            start, end = extent
            if lap and start < lap[-1][1]:
                batches.append(Batch(Extents.of(lap)))
                lap = []
                n = len(batches)
                if n > MAX_LAPS or (n > 1 and total > self._size):
                    self._deferred = extent
                    break
            lap.append(extent)
            total += end - start
        if lap or not batches:
            batches.append(Batch(Extents.of(lap)))
        return batches

    def _next(self) -> tuple[int, int] | None:
        """The next dirty extent within the image, which the driver has cleared."""
        if self._deferred is not None:
            extent, self._deferred = self._deferred, None
            return extent
        while True:
            try:
                found = self._tracking.next()
            except OSError as e:
                raise DeviceControlError.of(
                    f"cannot read the dirty blocks of {self._path} (PLOOP_IOC_TRACK_READ)",
                    e,
                    path=self._path,
                ) from e
            if found is None:
                return None
            # The driver's last cluster may reach past the end of the file.
            start, end = found[0], min(found[1], self._size)
            if start < end:
                return start, end

    def check(self, quiesced: bool) -> Completeness:
        if quiesced:
            try:
                self._tracking.sync()
            except OSError as e:
                raise DeviceControlError.of(
                    f"cannot sync {self._path} (PLOOP_IOC_SYNC)", e, path=self._path
                ) from e
        return Completeness("unknown", why="the driver marks blocks itself, synchronously")

    def repair(self, quiesced: bool) -> Repair | None:
        return None

    def stop(self, ok: bool) -> None:
        if not self._active:
            return
        self._active = False
        if not ok:
            with contextlib.suppress(OSError):
                self._tracking.abort()
            return
        try:
            if self._deferred is not None:  # as the driver answers for unread blocks
                raise OSError(errno.EBUSY, "dirty blocks are left")
            self._tracking.stop()
        except OSError as e:
            with contextlib.suppress(OSError):
                self._tracking.abort()
            raise DeviceControlError.of(
                f"cannot end the tracking of {self._path} (PLOOP_IOC_TRACK_STOP)",
                e,
                path=self._path,
            ) from e
