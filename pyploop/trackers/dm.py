# SPDX-License-Identifier: Apache-2.0
"""OpenVZ 9's tracking: messages to a device-mapper target (ploop or qcow2).

The messages are `tracking_start`, `tracking_get_next` (answers the next dirty
cluster and clears it, or answers nothing), `tracking_clear N`, `tracking_stop`.
They go through dmsetup(8), the supported way to talk to device-mapper.  Tests
replace `run`, since no stock kernel has the target.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from pyploop._core import Bitmap, Hook
from pyploop.disks.source import Source
from pyploop.errors import DeviceControlError
from pyploop.system.sysblock import attribute
from pyploop.trackers import Batch, Completeness, Repair
from pyploop.undo.ledger import UndoLedger

Run = Callable[[list[str]], str]
TIMEOUT = 30.0
"""Seconds that one message may take."""


def dmsetup(args: list[str]) -> str:
    """Run dmsetup and return what it prints; DeviceControlError when it fails."""
    tool = shutil.which("dmsetup", path="/sbin:/usr/sbin:/bin:/usr/bin")
    if tool is None:
        raise DeviceControlError("--tracker dm needs dmsetup (Debian package dmsetup)")
    try:
        done = subprocess.run(
            [tool, *args], capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as e:
        raise DeviceControlError(
            f"dmsetup {' '.join(args)} did not end within {TIMEOUT:.0f} s"
        ) from e
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DeviceControlError(f"dmsetup {' '.join(args)} failed: {reason}")
    return done.stdout


class DmTracker:
    """`--tracker dm`."""

    name = "dm"
    needs_hashes = False
    stop_before_end = True
    compares_everything = False
    drains_like_ploop = False

    def __init__(self, source: Source, why: str = "asked for", run: Run = dmsetup) -> None:
        self.why = why
        self._run = run
        self._source = source
        self._active = False
        self._shift = source.cluster.bit_length() - 1
        if source.cluster != 1 << self._shift:
            raise DeviceControlError(f"--cluster {source.cluster} is not a power of two")
        self._device = device_name(source)

    def _message(self, *words: str) -> str:
        return self._run(["message", self._device, "0", *words])

    def start(self, plan: UndoLedger | None = None) -> None:
        self._message("tracking_start")
        self._active = True

    def hook(self) -> Hook | None:
        return None

    def mark_all(self) -> bool:
        return True

    def pending(self) -> int | None:
        return None

    def take(self) -> list[Batch]:
        dirty = Bitmap(self._source.size, self._shift)
        while answer := self._message("tracking_get_next").strip():
            try:
                cluster = int(answer)
            except ValueError:
                raise DeviceControlError(
                    f"{self._device}: tracking_get_next answered {answer[:40]!r}, not a number"
                ) from None
            start = cluster << self._shift
            if cluster < 0 or start >= self._source.size:
                raise DeviceControlError(
                    f"{self._device}: dirty cluster {cluster} lies past the end of the device"
                )
            dirty.set(start, start + (1 << self._shift))
        return [Batch(dirty.extents())]

    def check(self, quiesced: bool) -> Completeness:
        return Completeness("unknown", why="the target marks clusters itself, synchronously")

    def repair(self, quiesced: bool) -> Repair | None:
        return None

    def stop(self, ok: bool) -> None:
        if not self._active:
            return
        self._active = False
        if ok:
            self._message("tracking_stop")
            return
        with contextlib.suppress(DeviceControlError):
            self._message("tracking_stop")


def device_name(source: Source) -> str:
    """The device-mapper name of the source."""
    if source.block is None or not source.block.disk.startswith("dm-"):
        raise DeviceControlError(f"{source.path} is not a device-mapper device")
    return attribute(Path("/sys/block") / source.block.disk / "dm/name")


def has_tracking(source: Source, run: Run = dmsetup) -> bool:
    """The device's target is one that tracks (ploop or qcow2)."""
    try:
        table = run(["table", device_name(source)])
    except DeviceControlError:
        return False
    return any(line.split()[2:3] in (["ploop"], ["qcow2"]) for line in table.splitlines())
