# SPDX-License-Identifier: Apache-2.0
"""Which tracker a copy uses.  `auto` says which it took and why; a tracker
that was asked for by name and cannot work is an error, never a fallback."""

from __future__ import annotations

from pyploop.device import Source
from pyploop.errors import DeviceControlError, ParameterError
from pyploop.trackers import TRACKERS, Tracker, bpf, dm
from pyploop.trackers.ploop import PloopTracker
from pyploop.trackers.scan import ScanTracker


def choose(name: str, source: Source) -> Tracker:
    """The tracker called `name`, made for the source, not started."""
    if name not in TRACKERS:
        raise ParameterError(f"unknown tracker {name!r} (one of {', '.join(TRACKERS)})")
    if name == "bpf":
        reason = bpf.usable(source)
        if reason:
            raise DeviceControlError(f"--tracker bpf cannot follow {source.path}: {reason}")
        return bpf.BpfTracker(source)
    if name == "ploop":
        return PloopTracker(source)
    if name == "dm":
        return dm.DmTracker(source)
    if name == "scan":
        return ScanTracker(source)
    return _auto(source)


def _auto(source: Source) -> Tracker:
    if source.kind == "ploop":
        return PloopTracker(source, "a ploop device has its own tracking")
    if source.block and source.block.disk.startswith("dm-") and dm.has_tracking(source):
        return dm.DmTracker(source, "the device-mapper target has its own tracking")
    reason = bpf.usable(source)
    if not reason:
        return bpf.BpfTracker(source, "a block device, and the kernel has BPF with BTF")
    return ScanTracker(source, f"BPF cannot be used: {reason}")
