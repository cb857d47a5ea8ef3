# SPDX-License-Identifier: Apache-2.0
"""The options of a copy, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyploop.diskcopy.compression import NEVER, Compression
from pyploop.diskcopy.freeze_policy import Policy
from pyploop.diskcopy.proof import Wish
from pyploop.freeze.stoppers import Spec

if TYPE_CHECKING:
    from pyploop.freeze.throttle import Throttle


@dataclass
class Options:
    """What the user may choose.  Times in seconds, sizes in bytes."""

    stop_command: str | None = None
    """The shell command that stops the writer (-F); it runs after `stops`."""
    stops: Sequence[Spec] = ()
    resume: bool = False
    """After success, too, resume what was stopped."""
    before_thaw: str | None = None
    policy: Policy = field(default_factory=Policy)
    stall: float = 0.0
    rate: int = 0
    compression: Compression = NEVER
    readers: int | None = None
    freeze_limit: float = 60.0
    """Seconds from the stop command on before which the copy fails and everything is
    undone; 0: no limit."""
    reserve: int | None = None
    """Bytes to leave free on a file system where both source and target grow.  None: the
    default (target_room.py).  0: room is neither checked nor watched."""
    throttle: Throttle | None = None
    """Slows the writer down when no freeze fits otherwise."""
    proof: Wish = "auto"
    """Whether a proof is kept.  `auto`: when the output has agreed to compare it, or for a
    receipt."""
    receipt: str | None = None
    """The file for the receipt; None: there is none."""
    target: str | None = None
    """What the receipt calls the target; None: it is not known here."""
    target_host: str | None = None

    @property
    def stop_specs(self) -> list[Spec]:
        """All stops in order, the stop command last."""
        command = self.stop_command
        return [*self.stops, *([Spec("cmd", command)] if command else [])]


@dataclass
class Summary:
    """What one copy did.  Sizes in bytes, times in seconds."""

    source: str
    size: int
    tracker: str
    io_mode: str
    dialect: str
    hash_kernel: str
    write_mode: str = ""
    """How the target was written, in words; empty: by the receiver, which has said so."""
    direct_bytes: int = 0
    """Written past the page cache."""
    filled_bytes: int = 0
    """Holes of the source that were made zero on a target with old contents."""
    data_bytes: int = 0
    wire_bytes: int = 0
    read_bytes: int = 0
    frames: int = 0
    compression: str = NEVER.name
    """As it was asked for and agreed."""
    compressed_bytes: int = 0
    """Of data_bytes, what was sent compressed; their size before."""
    compressed_frames: int = 0
    reused_bytes: int = 0
    """Not sent in the first pass, since the target had kept the same."""
    first_pass: float = 0.0
    rounds: list[dict[str, Any]] = field(default_factory=list)
    frozen: dict[str, float] = field(default_factory=dict)
    frozen_remote: dict[str, float] = field(default_factory=dict)
    """Seconds of the target's steps meanwhile, as it reports them."""
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
    """Bytes that the target still had to sync at the end, as it reports."""
    clock_offset: float | None = None
    """The target's monotonic clock minus ours, and the error of that."""
    clock_error: float | None = None
    largest_part: str = ""
    """Which part of the frozen time was the largest, and what would shorten it."""
    frozen_bytes: int = 0
    freezes_given_up: int = 0
    """Freezes before the last one, which ended with a thaw for a long repair."""
    cuts: int = 0
    """Connections that were lost and replaced."""
    completeness: str = "unknown"
    repaired_bytes: int = 0
    repairs: int = 0
    acknowledged: str = "unknown"
    source_host: str = ""
    target_host: str = ""
    """Hosts of a remote copy; empty: this one."""
    unsafe: list[str] = field(default_factory=list)
    """Users of the source that --unsafe-in-use disregarded."""
    root: str | None = None
    """Of the proof of what was sent, in hexadecimal; None: none was kept."""
    proven: bool = False
    """The peer has compared that root with its own."""
    resent_bytes: int = 0
    """Sent again, since the two were not the same at first."""
