# SPDX-License-Identifier: Apache-2.0
"""The kernel's accounting of a disk (queue/iostats).  The proof of completeness compares
the tracker's events with it.

It must stay on during the whole copy.  Writes are not counted while it is off, and a
tracker's event that is lost in that time is never noticed.  An administrator, tuned or
another copy can switch it off.  So its value is read before each proof, and inotify
reports writes to the switch in between (only those through this mount of sysfs).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from pyploop.errors import DeviceControlError
from pyploop.system import kernel
from pyploop.system.sysblock import BlockDevice
from pyploop.undo.ledger import UndoLedger, UndoStep

QUIET_DEADLINE = 5.0
"""Seconds to wait for the writes in flight after the freeze."""
EVENTS = 4096
"""Bytes of inotify events to read at once."""


def _folder(block: BlockDevice) -> Path:
    disk = Path("/sys/block") / block.disk
    return disk / block.name if block.is_partition else disk


def writes_in_flight(block: BlockDevice) -> int:
    """Writes in flight on this device; other partitions of its disk do not count."""
    return int((_folder(block) / "inflight").read_text().split()[1])


def wait_quiet(in_flight: Callable[[], int], seconds: float) -> bool:
    """Wait until no write is in flight; false when some still are after `seconds`."""
    deadline = time.monotonic() + seconds
    while in_flight():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.0005)
    return True


class Accounting:
    """The accounting of one disk ('loop0')."""

    def __init__(self, disk: str) -> None:
        self._disk = disk
        self._path = f"/sys/block/{disk}/queue/iostats"
        self._ledger: UndoLedger | None = None
        self._step: UndoStep | None = None
        self._watch = self._switch = -1

    def problem(self) -> str:
        """Why it cannot be switched on; empty when it is on or can be."""
        try:
            if Path(self._path).read_text().strip() != "0" or os.access(self._path, os.W_OK):
                return ""
        except OSError:
            return ""
        return f"the accounting of {self._disk} is off, and {self._path} cannot be written"

    def start(self, ledger: UndoLedger) -> None:
        """Switch it on until `stop`.  DeviceControlError when that is refused."""
        self._ledger = ledger
        with contextlib.suppress(OSError):  # no inotify left: reading the value still finds most
            self._watch = kernel.watch_writes(self._path)
        with contextlib.suppress(OSError):  # no such switch: the accounting is always on
            # Kept open: it is read inside the freeze, where opening it takes too long.
            self._switch = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._switch_on()

    def interrupted(self) -> bool:
        """True when it was off at some time since the last call.  It is on again when this
        returns."""
        if self._ledger is None:
            return False
        touched = self._was_touched()
        return self._switch_on() or touched

    def _was_touched(self) -> bool:
        if self._watch < 0:
            return False
        touched = False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._watch, EVENTS):
                touched = True
        return touched

    def _switch_on(self) -> bool:
        """Switch it on; true when it was off."""
        assert self._ledger is not None
        if self._switch < 0:
            return False
        try:
            if os.pread(self._switch, 8, 0).strip() != b"0":
                return False
            if self._step is None:
                what = f"switch the accounting of {self._disk} off again"
                self._step = self._ledger.set_file(self._path, "1", what)
            else:
                Path(self._path).write_text("1")
        except OSError as e:
            raise DeviceControlError.of(
                f"cannot switch on the accounting of {self._disk} ({self._path}), which is needed "
                "to prove that all writes were tracked",
                e,
            ) from e
        self._was_touched()  # ignore our own write
        return True

    def stop(self) -> None:
        """Put back what was there; never raises."""
        for fd in (self._watch, self._switch):
            if fd >= 0:
                os.close(fd)
        self._watch = self._switch = -1
        step, ledger = self._step, self._ledger
        self._step = self._ledger = None
        if step is not None and ledger is not None:
            with contextlib.suppress(DeviceControlError):
                ledger.undo(step)
