# SPDX-License-Identifier: Apache-2.0
"""What a copy is asked for, and what it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyploop.diskcopy.freeze_policy import Policy
from pyploop.freeze.stoppers import Spec
from pyploop.freeze.throttle import Throttle


@dataclass
class Options:
    """What the user may choose; times in seconds, sizes in bytes."""

    stop_command: str | None = None
    """What stops the writer; more by `stops`, in order, before it."""
    stops: Sequence[Spec] = ()
    resume: bool = False
    """Resume what was stopped also after success."""
    before_thaw: str | None = None
    policy: Policy = field(default_factory=Policy)
    stall: float = 0.0
    rate: int = 0
    readers: int | None = None
    freeze_limit: float = 60.0
    """From the stop command on the copy fails and everything is undone before
    so many seconds have passed; 0: never."""
    reserve: int | None = None
    """Bytes that are left on a file system where the source and the target both grow;
    None: as target_room.py has it.  0: room is neither compared nor watched."""
    throttle: Throttle | None = None
    """Slows the writer down, when nothing else helps."""

    @property
    def stop_specs(self) -> list[Spec]:
        """All stops in order, the stop command last."""
        command = self.stop_command
        return [*self.stops, *([Spec("cmd", command)] if command else [])]


@dataclass
class Summary:
    """What a finished copy was.  Sizes in bytes, times in seconds."""

    source: str
    size: int
    tracker: str
    io_mode: str
    dialect: str
    hash_kernel: str
    data_bytes: int = 0
    wire_bytes: int = 0
    read_bytes: int = 0
    frames: int = 0
    reused_bytes: int = 0
    """Not sent in the first pass, since the target had kept them."""
    first_pass: float = 0.0
    rounds: list[dict[str, Any]] = field(default_factory=list)
    frozen: dict[str, float] = field(default_factory=dict)
    frozen_remote: dict[str, float] = field(default_factory=dict)
    """What the target did meanwhile, as it says."""
    frozen_total: float = 0.0
    frozen_window: float = 0.0
    """From the stop command's start until the target was durable."""
    predicted: float | None = None
    """The same, as forecast just before; None: nothing was frozen."""
    prediction_ratio: float | None = None
    """frozen_window over predicted."""
    max_freeze: float | None = None
    target_unsynced: int | None = None
    """Bytes sent before the stop command and after the target's last sync."""
    target_dirty: int | None = None
    """Bytes that the target had still to sync at the end, as it says."""
    clock_offset: float | None = None
    """The target's monotonic clock minus ours, and how far off that may be."""
    clock_error: float | None = None
    largest_part: str = ""
    """Which part of the frozen time was the largest, and what would shorten it."""
    frozen_bytes: int = 0
    freezes_given_up: int = 0
    """Freezes that ended with a thaw and a repair, before the last one."""
    completeness: str = "unknown"
    repaired_bytes: int = 0
    repairs: int = 0
    acknowledged: str = "unknown"
    unsafe: list[str] = field(default_factory=list)
    """Users of the source that were disregarded, as the user wanted."""
