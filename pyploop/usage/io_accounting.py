# SPDX-License-Identifier: Apache-2.0
"""The kernel's accounting of a disk (queue/iostats), against which completeness
is proven.  It must be on all the time: what is written while it is off is not
counted, and an event that is lost meanwhile is never noticed.

Anybody may switch it off: an administrator, tuned, another copy that restores
what it found.  So its value is read before each proof, and a watch tells of
writes to the switch in between (inotify sees those made in this mount of sysfs).
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
"""Seconds to wait for writes in flight after the freeze."""
EVENTS = 4096
"""Bytes of inotify events that are read at once."""


def _folder(block: BlockDevice) -> Path:
    disk = Path("/sys/block") / block.disk
    return disk / block.name if block.is_partition else disk


def writes_in_flight(block: BlockDevice) -> int:
    """On the device alone: another partition may stay busy."""
    return int((_folder(block) / "inflight").read_text().split()[1])


def wait_quiet(in_flight: Callable[[], int], seconds: float) -> bool:
    """No write is in flight any more; false: still after so many seconds."""
    deadline = time.monotonic() + seconds
    while in_flight():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.0005)
    return True


class Accounting:
    """Of one disk ('loop0')."""

    def __init__(self, disk: str) -> None:
        self._disk = disk
        self._path = f"/sys/block/{disk}/queue/iostats"
        self._ledger: UndoLedger | None = None
        self._step: UndoStep | None = None
        self._watch = self._switch = -1

    def problem(self) -> str:
        """Why it cannot be on; empty: it is, or can be switched on."""
        try:
            if Path(self._path).read_text().strip() != "0" or os.access(self._path, os.W_OK):
                return ""
        except OSError:
            return ""
        return f"the accounting of {self._disk} is off, and {self._path} cannot be written"

    def start(self, ledger: UndoLedger) -> None:
        """Switch it on until `stop`.  DeviceControlError when that is refused."""
        self._ledger = ledger
        with contextlib.suppress(OSError):  # no inotify left: the value tells most
            self._watch = kernel.watch_writes(self._path)
        with contextlib.suppress(OSError):  # none: it accounts always
            # Kept open: it is read inside the freeze, where opening would show.
            self._switch = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._switch_on()

    def interrupted(self) -> bool:
        """It was off at some time since the last call; it is on again when this
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
        """True when it was off."""
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
                f"cannot switch on the accounting of {self._disk}, against which tracking is "
                f"proven ({self._path})",
                e,
            ) from e
        self._was_touched()  # that was us
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
