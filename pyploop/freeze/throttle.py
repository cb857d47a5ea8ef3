# SPDX-License-Identifier: Apache-2.0
"""Slow the writer down by its cgroup, when nothing else makes a freeze fit:
blkio.throttle.write_bps_device (v1) or io.max (v2), for the source's disk.

v1 counts what a task submits itself: direct and synchronous writes, and what its
own fsync writes back.  It does not count what the kernel writes back later.  v2
counts all of it on file systems that support it (ext4, xfs, btrfs).

The undo step is in the plan before a limit is written.  The old limit is restored
before the last sync of the freeze, which the limit would slow down, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyploop.errors import DeviceControlError, OpenError, ParameterError
from pyploop.freeze import cgroup
from pyploop.freeze.stoppers import Spec
from pyploop.report.events import Reporter
from pyploop.system.mount_table import cgroup_mounts
from pyploop.system.sysblock import text_of
from pyploop.undo.ledger import UndoLedger, UndoStep
from pyploop.units import format_size


@dataclass(frozen=True)
class Knob:
    """The write limit of one cgroup for one disk ('7:0'), in bytes per second."""

    folder: Path
    v2: bool
    disk: str

    @property
    def path(self) -> Path:
        return self.folder / ("io.max" if self.v2 else "blkio.throttle.write_bps_device")

    def value(self, rate: int | None) -> str:
        """The text that sets this limit; None: no limit."""
        if self.v2:
            return f"{self.disk} wbps={'max' if rate is None else rate}"
        return f"{self.disk} {rate or 0}"

    def read(self) -> int | None:
        """The present limit; None: there is none."""
        for line in self.path.read_text().splitlines():
            words = line.split()
            if words[:1] != [self.disk]:
                continue
            limits = [w.removeprefix("wbps=") for w in words[1:] if w.startswith("wbps=")]
            limit = (limits or ["max"])[0] if self.v2 else words[1]
            return None if limit == "max" else int(limit)
        return None


def find(group: str, disk: str) -> Knob:
    """The knob of a cgroup.  group: its folder, or its name in its hierarchy."""
    folders = [(Path(group), v2) for v2 in (False, True)] if group.startswith("/") else []
    for root, controllers in cgroup_mounts():
        if (controllers is None or "blkio" in controllers) and ".." not in Path(group).parts:
            folder = Path(root) / group.lstrip("/")
            if folder != Path(root):  # the root is the whole machine
                folders.append((folder, controllers is None))
    for folder, v2 in folders:
        knob = Knob(folder, v2, disk)
        if knob.path.exists():
            return knob
    raise OpenError(f"--throttle: no cgroup {group} with blkio.throttle.write_bps_device or io.max")


def find_of(specs: Sequence[Spec], disk: str) -> Knob:
    """The knob of the container that a `cgroup:` or `vzctl:` spec names."""
    for spec in specs:
        if spec.kind == "vzctl":
            return find(spec.argument.partition(",")[0], disk)
        if spec.kind == "cgroup":
            freezer = cgroup.find(spec.argument)
            for pid in freezer.processes():
                try:
                    text = text_of(Path(f"/proc/{pid}/cgroup"))
                except OSError:
                    continue
                if m := re.search(
                    r"^\d+:(?:[^:\n]*,)?blkio(?:,[^:\n]*)?:(.+)$", text, re.MULTILINE
                ):
                    return find(m[1], disk)
                break
            return find(str(freezer.folder), disk)
    raise ParameterError("--throttle RATE needs a cgroup: RATE:CGROUP, or --freeze cgroup:PATH")


class Throttle:
    """`--throttle`: applied by the policy, removed for the last sync."""

    def __init__(self, rate: int, group: str | None, report: Reporter) -> None:
        self._rate, self._group, self._report = rate, group, report
        self._knob: Knob | None = None
        self._plan: UndoLedger | None = None
        self._undo_step: UndoStep | None = None
        self._applied = False

    def prepare(
        self, plan: UndoLedger, disk: tuple[int, int] | None, specs: Sequence[Spec]
    ) -> None:
        """Find the cgroup; disk: of the source (major, minor)."""
        if disk is None:
            raise ParameterError(
                "--throttle: the source is a plain file, which has no disk to limit"
            )
        name = f"{disk[0]}:{disk[1]}"
        self._knob = find(self._group, name) if self._group else find_of(specs, name)
        self._plan = plan

    def apply(self) -> None:
        """Slow the writer down.  A second call changes nothing."""
        if self._applied:
            return
        assert self._knob is not None and self._plan is not None, "prepared"
        knob, self._applied = self._knob, True
        try:
            old = knob.read()
            if old is not None and old <= self._rate:
                self._report.info(f"{knob.folder} is already limited to {format_size(old)}/s")
                return
            self._undo_step = self._plan.add(
                {
                    "kind": "write",
                    "path": str(knob.path),
                    "inode": knob.path.stat().st_ino,
                    "value": knob.value(old),
                    "what": f"take the throttle off cgroup {knob.folder}",
                    "by_hand": f"echo {knob.value(old)} > {knob.path}",
                }
            )
            knob.path.write_text(knob.value(self._rate))
        except OSError as e:
            raise DeviceControlError.of(
                f"--throttle: cannot write {knob.path}", e, path=str(knob.path)
            ) from e
        self._report.note(f"Throttled {knob.folder} to {format_size(self._rate)}/s of writes")

    def remove(self) -> None:
        """Restore the limit that was there before `apply`."""
        self._applied = False
        step, self._undo_step = self._undo_step, None
        if step is not None and self._plan is not None:
            self._plan.undo(step)
