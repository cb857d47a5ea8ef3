# SPDX-License-Identifier: Apache-2.0
"""Which tracker a copy uses.  `auto` says which one it chose and why.  A tracker that
was named and cannot work is an error: there is no silent fallback.  A tracker is loaded
when it may be used."""

from __future__ import annotations

from pathlib import Path

from pyploop.disks.source import Source
from pyploop.errors import DeviceControlError, ParameterError
from pyploop.trackers import TRACKERS, Tracker
from pyploop.trackers.scan import ScanTracker
from pyploop.units import SECTOR
from pyploop.usage.io_accounting import Accounting


def choose(name: str, source: Source, cluster: int | None = None) -> Tracker:
    """The tracker called `name` for the source, not started.  `stop` ends it, also when
    it was only tried (`auto`).  ParameterError, DeviceControlError.

    cluster: bytes of a cluster of a device-mapper target.  It cannot be found out,
    and a wrong one would lose data, so there is no default.
    """
    if cluster is not None and name not in ("auto", "dm"):
        raise ParameterError(f"--cluster is for --tracker dm, not {name}")
    if name not in TRACKERS:
        raise ParameterError(f"unknown tracker {name!r} (one of {', '.join(TRACKERS)})")
    if name == "auto":
        return _auto(source, cluster)
    if name == "bpf" and (reason := bpf_problem(source)):
        raise DeviceControlError(
            f"--tracker bpf cannot follow {source.path}: {reason}",
            path=source.path,
            hint="use --tracker auto or scan",
        )
    if name == "dm":
        if cluster is None:
            raise ParameterError(
                "--tracker dm needs --cluster: the device-mapper target does not report its "
                "cluster size"
            )
        source.cluster = cluster
    return _made(name, source, "asked for")


def _made(name: str, source: Source, why: str) -> Tracker:
    if name == "bpf":
        from pyploop.trackers.bpf import BpfTracker

        return BpfTracker(source, why)
    if name == "ploop":
        from pyploop.trackers.ploop import PloopTracker

        return PloopTracker(source, why)
    if name == "dm":
        from pyploop.trackers.dm import DmTracker

        return DmTracker(source, why)
    return ScanTracker(source, why)


def choose_marking(source: Source, cluster: int | None = None) -> Tracker:
    """As `auto`, but one that marks what is written.  DeviceControlError: here, only a
    comparison of everything could tell."""
    tracker = _auto(source, cluster)
    if isinstance(tracker, ScanTracker):
        raise DeviceControlError(
            f"{source.path} cannot be tracked: {tracker.why}", path=source.path
        )
    return tracker


def _auto(source: Source, cluster: int | None) -> Tracker:
    if source.kind == "ploop":
        return _made("ploop", source, "a ploop device has its own tracking")
    if cluster is not None and source.block is not None and source.block.disk.startswith("dm-"):
        from pyploop.trackers.dm import has_tracking

        if has_tracking(source):
            source.cluster = cluster
            return _made("dm", source, "the device-mapper target has its own tracking")
    reason = bpf_problem(source)
    if not reason:
        from pyploop.trackers.bpf import BpfTracker

        # Capabilities, seccomp, lockdown, memory: only a trial shows.
        tracker = BpfTracker(source, "a block device, and the kernel has BPF with BTF")
        try:
            tracker.try_out()
            return tracker
        except DeviceControlError as e:
            reason = str(e)
    return _made("scan", source, f"BPF cannot be used: {reason}")


def bpf_problem(source: Source) -> str:
    """Why BPF cannot track this source; empty: only a trial shows whether it can."""
    queue = source.queue
    if queue is None:
        return "a plain file"
    if source.size % SECTOR or queue.start % SECTOR:
        return "its start or size is no multiple of 512 bytes"
    zoned = Path("/sys/block") / queue.disk / "queue/zoned"
    if zoned.exists() and zoned.read_text().strip() != "none":
        return "a zoned device (a zone reset changes data without an event)"
    dax = Path("/sys/block") / queue.disk / "queue/dax"
    if dax.exists() and dax.read_text().strip() == "1":
        return "a DAX device (what is mapped from it is written without an event)"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "the kernel has no BTF (/sys/kernel/btf/vmlinux)"
    return Accounting(queue.disk).problem()
