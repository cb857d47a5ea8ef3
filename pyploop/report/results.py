# SPDX-License-Identifier: Apache-2.0
"""What a finished copy was, as types.  Sizes are bytes, and times are seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Completeness = Literal["complete", "undecided", "lossy", "busy", "unknown"]
"""What a tracker can prove about the writes that it has seen.

complete: the kernel's own accounting agrees, so none was missed.
undecided: writes were going on during the check; a later check can tell.
lossy: some were missed.
busy: writes stay in flight although nothing should write any more.
unknown: this tracker has nothing to compare with.
"""


@dataclass(frozen=True, kw_only=True)
class RoundFigures:
    """One pass over what was written since the pass before."""

    number: int
    """0: the first pass, which has only `sent` and `seconds`."""
    sent: int
    """Bytes."""
    seconds: float
    sync_seconds: float = 0.0
    """The source's own syncfs, at the beginning."""
    flushed: int = 0
    """Bytes that the syncfs wrote, as far as the tracker saw."""
    window: float = 0.0
    """Seconds of writing that the round covers."""
    dirty: int | None = None
    """Bytes that were marked as written; null: not known."""
    dirty_rate: float = 0.0
    """Bytes per second."""
    left: int = 0
    """Bytes of hot blocks that were left for the freeze."""
    forecast: float = 0.0
    """Seconds of a freeze that would begin now."""
    verdict: Literal["", Completeness] = ""
    missed: int = 0
    """Bytes of writes that were missed, at least."""
    repaired: int = 0
    """Bytes that were found by comparing, and sent."""


@dataclass(frozen=True, kw_only=True)
class CopyResult:
    """What a finished copy was."""

    source: str
    size: int
    """Bytes of the image."""
    tracker: str
    io_mode: str
    """How the source was read, in words."""
    dialect: str
    """The protocol that was spoken with the target."""
    hash_kernel: str
    write_mode: str
    """How the target was written, in words; empty: the receiver has written it."""
    direct_bytes: int
    """Written past the page cache."""
    filled_bytes: int
    """Holes of the source that were made zero, since the target had old contents."""
    data_bytes: int
    """Sent, without framing; before they were compressed."""
    wire_bytes: int
    """Sent, with framing; compressed, where they were."""
    read_bytes: int
    frames: int
    compression: str
    """`never`, `auto` or `zstd:LEVEL`, as it was asked for and the receiver agreed."""
    compressed_bytes: int
    """Of `data_bytes`, what was sent compressed."""
    compressed_frames: int
    reused_bytes: int
    """Not sent, since the target had kept them."""
    first_pass: float
    """Seconds."""
    rounds: tuple[RoundFigures, ...]
    frozen: dict[str, float]
    """Step of the freeze -> seconds, in order."""
    frozen_remote: dict[str, float]
    """The same at the target, as the target reports it."""
    frozen_total: float
    """Seconds that the source was stopped or frozen."""
    frozen_window: float
    """Seconds from the stop command's start until the target was durable."""
    predicted: float | None
    """`frozen_window` as it was forecast; null: nothing was frozen."""
    prediction_ratio: float | None
    """`frozen_window` over `predicted`."""
    max_freeze: float | None
    """Seconds that were allowed."""
    target_unsynced: int | None
    """Bytes sent before the stop command and after the target's last sync."""
    target_dirty: int | None
    """Bytes that the target had still to sync at the end, as it reports."""
    clock_offset: float | None
    """Seconds: the target's monotonic clock minus ours."""
    clock_error: float | None
    """Seconds that `clock_offset` may be wrong by."""
    largest_part: str
    """The largest part of the frozen time and what would shorten it, in words."""
    frozen_bytes: int
    """Sent while the source was frozen."""
    freezes_given_up: int
    """Freezes that ended with a thaw and a repair, before the last one."""
    completeness: str
    """`complete`: the tracker has proven that no write was missed.  `unknown`: it has
    nothing to compare with."""
    repaired_bytes: int
    repairs: int
    acknowledged: str
    """`acknowledged`: the target said that it is durable.  `local`: it is a file here, and
    durable.  Anything else: the peer cannot tell."""
    unsafe: tuple[str, ...]
    """Users of the source that were disregarded, in words."""
    root: str | None
    """The root of the proof of what was sent, in hexadecimal; null: none was kept."""
    proven: bool
    """The peer has compared that root with its own, of what it wrote."""
    resent_bytes: int
    """Sent again, since the two were not the same at first."""
    cuts: int = 0
    """Connections for the data that were lost and replaced."""
    source_host: str = ""
    """The other host, as it was named, when the source lies there; empty: it lies here."""
    target_host: str = ""
    """The same of the target."""


@dataclass(frozen=True, kw_only=True)
class ReceiveResult:
    """What a finished receipt was."""

    target: str
    image_size: int
    data_bytes: int
    stream_bytes: int
    frames: int
    written_bytes: int
    hole_bytes: int
    huge_bytes: int
    compressed_bytes: int
    """Of `data_bytes`, what came compressed; its size afterwards."""
    compressed_frames: int
    """Made as huge pages, on tmpfs."""
    direct_bytes: int
    """Written past the page cache."""
    filled_bytes: int
    """Made zero, since the stream left them out and the target had old contents."""
    syncs: int
    native_peer: bool
    """The sender was a pyploop, and has heard that the target is durable."""
    dialect: str
    write_mode: str
    """How the target was written, in words."""
    root: str | None
    """The root of the proof, in hexadecimal, that was compared with the sender's; null: the
    sender asked for none."""


def copy_result(summary: dict[str, Any]) -> CopyResult:
    """The result with the fields of the event `summary`."""
    return CopyResult(**unchangeable(summary))


def unchangeable(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an event with its rounds typed, and without lists."""
    made = dict(fields)
    if "rounds" in made:
        made["rounds"] = [RoundFigures(**r) for r in made["rounds"]]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in made.items()}
