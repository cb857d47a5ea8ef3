# SPDX-License-Identifier: Apache-2.0
"""The ploop driver's own tracking (OpenVZ 6 and 7 kernels).

The driver keeps the marks of a top delta in clusters; SETPOS before each read
of the first pass tells it how far the pass has come.
"""

from __future__ import annotations

import contextlib

from pyploop._core import Bitmap, Hook, PloopTracking
from pyploop.device import Source
from pyploop.errors import DeviceControlError
from pyploop.trackers import Batch, Repair, Verdict
from pyploop.units import BLOCK


class PloopTracker:
    """`--tracker ploop`."""

    name = "ploop"
    needs_hashes = False

    def __init__(self, source: Source, why: str = "asked for") -> None:
        if source.kind != "ploop":
            raise DeviceControlError(f"{source.path} is not a ploop device")
        self.why = why
        self._path = source.path
        self._size = source.size
        self._tracking = PloopTracking(source.control_fd)
        self._active = False

    def start(self) -> None:
        try:
            self._tracking.start(self._size)
        except OSError as e:
            raise DeviceControlError.of(f"TRACK_INIT failed on {self._path}", e) from e
        self._active = True

    def hook(self) -> Hook | None:
        return self._tracking.hook()

    def pending(self) -> int | None:
        return None

    def take(self) -> list[Batch]:
        dirty = Bitmap(self._size, BLOCK.bit_length() - 1)
        try:
            self._tracking.take(dirty)
        except OSError as e:
            raise DeviceControlError.of(f"TRACK_READ failed on {self._path}", e) from e
        return [Batch(dirty.extents())]

    def check(self, quiesced: bool) -> Verdict:
        if quiesced:
            try:
                self._tracking.sync()
            except OSError as e:
                raise DeviceControlError.of(f"PLOOP_IOC_SYNC failed on {self._path}", e) from e
        return Verdict("unknown", why="the driver marks blocks itself, synchronously")

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
            self._tracking.stop()
        except OSError as e:
            with contextlib.suppress(OSError):
                self._tracking.abort()
            raise DeviceControlError.of(f"TRACK_STOP failed on {self._path}", e) from e
