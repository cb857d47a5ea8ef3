# SPDX-License-Identifier: Apache-2.0
"""The events of a run as types: what `on_event` gets, and what a line of NDJSON holds.

A program imports them as `pyploop.events`.  Sizes are bytes, and times are seconds.
`events.schema.json` is made from these classes:

    python -m pyploop.report.schema > pyploop/report/events.schema.json

A new event is a class here, a line in docs/reference/events.md, and a new schema.  A plain copy by
the command line does not import this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pyploop.report.results import CopyResult, ReceiveResult, RoundFigures, unchangeable


@dataclass(frozen=True, kw_only=True)
class MemoryRoundFigures:
    """One round of the container's memory."""

    sent: int
    """Bytes."""
    seconds: float
    """Until the target had it."""
    window: float
    """Seconds of writing that it covers; 0 for the first, which has all memory."""
    frozen: float | None
    """Seconds that the container stood still, as CRIU says; null: not known."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened."""

    EVENT: ClassVar[str]
    """Its name in the NDJSON."""
    time: float
    """Seconds since the start of the run."""
    host: str = ""
    """The other host, as it was named, when it happened there."""


@dataclass(frozen=True, kw_only=True)
class Sending(Event):
    """A copy begins."""

    EVENT: ClassVar = "sending"
    image: str
    size: int
    clock: float
    """CLOCK_MONOTONIC at `time` 0, seconds."""


@dataclass(frozen=True, kw_only=True)
class Phase(Event):
    """What the run does from now on."""

    EVENT: ClassVar = "phase"
    phase: str
    """`comparing`, `first pass`, `round N`, `sync`, `frozen`, or `memory N`."""
    bytes: int | None
    """To go through; null: not known."""


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """How far the phase is; several times a second, and not in the NDJSON."""

    EVENT: ClassVar = "progress"
    done: int
    """Bytes of the phase's `bytes`."""
    dirty: str
    """What is dirty, in words; empty: not known."""


@dataclass(frozen=True, kw_only=True)
class Round(Event, RoundFigures):
    """A round has ended; number 0 is the first pass."""

    EVENT: ClassVar = "round"


@dataclass(frozen=True, kw_only=True)
class Repair(Event):
    """Blocks whose writes may have been missed were compared by hash."""

    EVENT: ClassVar = "repair"
    scope: str
    """What was compared, in words."""
    sent: int
    """Bytes that differed."""
    frozen: bool


@dataclass(frozen=True, kw_only=True)
class Frozen(Event):
    """The freeze has ended."""

    EVENT: ClassVar = "frozen"
    steps: dict[str, float]
    """Name -> seconds, in order."""
    remote: dict[str, float]
    """The same at the target, as the target reports it."""
    total: float
    window: float
    """Seconds from the stop command's start until the target was durable."""
    sent: int


@dataclass(frozen=True, kw_only=True)
class Summary(Event, CopyResult):
    """A copy is complete."""

    EVENT: ClassVar = "summary"


@dataclass(frozen=True, kw_only=True)
class Received(Event, ReceiveResult):
    """An image was received, and is durable."""

    EVENT: ClassVar = "received"


@dataclass(frozen=True, kw_only=True)
class Reused(Event):
    """Of a file that the target of a migration had kept, what need not be sent."""

    EVENT: ClassVar = "reused"
    name: str
    held: int
    """Bytes of clusters that had data."""
    same: int
    """Bytes of these that are the same here."""


@dataclass(frozen=True, kw_only=True)
class Tree(Event):
    """A pass over a directory has ended."""

    EVENT: ClassVar = "tree"
    path: str
    phase: str
    """`first pass`, `round N`, or `frozen`."""
    seconds: float
    files: int
    """Sent."""
    compared: int
    """Compared by contents."""
    left_out: str
    """Why the pass was not complete; empty: it was."""
    everything: bool
    """All files were compared by contents."""


@dataclass(frozen=True, kw_only=True)
class Connection(Event):
    """The other host of a migration or a copy is connected."""

    EVENT: ClassVar = "connection"
    cipher: str
    """Of ssh; empty: it did not say."""
    asked: str
    """The cipher that ssh was asked for first; empty: its own order, or the user's, applies."""
    why: str


@dataclass(frozen=True, kw_only=True)
class Cut(Event):
    """The connection for the data of a copy between two hosts was lost."""

    EVENT: ClassVar = "cut"
    state: Literal["lost", "retried", "bridged"]
    """Now; another one did not come about, and is tried again; the copy goes on over
    another one."""
    why: str
    seconds: float
    """Since it was lost."""


@dataclass(frozen=True, kw_only=True)
class PreDump(Event):
    """Whether memory can be copied ahead."""

    EVENT: ClassVar = "pre-dump"
    works: bool
    why: str
    """Why not; empty: it works."""


@dataclass(frozen=True, kw_only=True)
class LazyRestore(Event):
    """Whether the target will load the container's memory while it runs."""

    EVENT: ClassVar = "lazy-restore"
    lazy: bool
    why: str
    """Why not; empty: it will."""
    private: int
    """Bytes that can be loaded so."""
    whole: int
    """Bytes that must be there before: shared, locked, of a tmpfs."""


@dataclass(frozen=True, kw_only=True)
class PostCopy(Event):
    """Whether memory will follow from the source while the container runs on the target."""

    EVENT: ClassVar = "post-copy"
    chosen: bool
    why: str
    """Why not; empty: it will."""
    memory: int
    """Bytes of memory in use that a dump would have."""
    forecast: float
    """Seconds of suspended time that are expected without it."""
    timeout: float
    """Seconds for which the connection may be cut meanwhile."""
    risk: str
    """What it means for the container; empty: it was not chosen."""


@dataclass(frozen=True, kw_only=True)
class MemoryComplete(Event):
    """The target of a post-copy migration has all memory, or never will."""

    EVENT: ClassVar = "memory complete"
    complete: bool
    why: str
    """How it was lost."""
    sent: int
    """Bytes of pages."""
    requests: int
    """So many requests for them."""


@dataclass(frozen=True, kw_only=True)
class MemoryRound(Event, MemoryRoundFigures):
    """A round of memory has ended."""

    EVENT: ClassVar = "memory round"
    number: int


@dataclass(frozen=True, kw_only=True)
class Tmpfs(Event):
    """Each tmpfs of the container that was packed in the same way."""

    EVENT: ClassVar = "tmpfs"
    packing: Literal["plain", "wrapped", "compressed"]
    """plain, wrapped (in gzip's format): by pyploop's tar.  compressed: by tar and gzip."""
    count: int
    size: int
    """Bytes of their archives."""


@dataclass(frozen=True, kw_only=True)
class Forecast(Event):
    """How long the container would be suspended, if it began now."""

    EVENT: ClassVar = "forecast"
    moment: Literal["check", "suspend"]
    """`check`: before anything was copied; `suspend`: just before the suspension."""
    total: float
    steps: dict[str, float]
    """`suspend`, `dump`, `transfer` (what is left of it after the dump), `disk` (beside dump and
    transfer), `restore` -> seconds."""
    floor: float
    """What of `total` no further round can make shorter."""
    memory: int
    """Bytes in the dump; 0: not known."""
    later: Literal["", "lazy", "post-copy"]
    """How memory comes after the container runs; empty: all comes before."""
    wire: float
    """Bytes per second of the connection; 0: not known."""
    wire_from: str
    """What has shown it: `probe`, `first pass`, `memory rounds`; empty: nothing."""
    busy: float
    """How many times longer work takes on the source than if it were idle."""
    busy_there: float
    """The same on the target."""
    learned: dict[str, int]
    """Step -> number of earlier migrations to this target that it is corrected by; 0: it is
    the model's alone."""
    max_suspend: float | None


@dataclass(frozen=True, kw_only=True)
class Suspended(Event):
    """The forecast against what came of it."""

    EVENT: ClassVar = "suspended"
    forecast: float
    actual: float
    ratio: float | None
    """`actual` over `forecast`."""
    forecast_steps: dict[str, float]
    """As in `forecast`."""
    actual_steps: dict[str, float]
    memory: int
    """Bytes of the dump."""


@dataclass(frozen=True, kw_only=True)
class Moved(Event):
    """The container runs on the target."""

    EVENT: ClassVar = "moved"
    steps: dict[str, float]
    """Name -> seconds of the suspended time; they overlap."""
    dump_bytes: int
    """Sent of the dump's images."""
    dump_zero_bytes: int
    """Of its images, left out because they are zero."""
    memory_rounds: tuple[MemoryRoundFigures, ...]
    parent: int
    """Number of the memory round that the dump builds upon; 0: none."""
    lazy: bool
    """Its memory is being loaded lazily."""
    why_not_lazy: str
    post_copy: bool
    """Its memory is being loaded from the source."""


@dataclass(frozen=True, kw_only=True)
class Target(Event):
    """An event of the migration's target."""

    EVENT: ClassVar = "target"
    name: str
    monotonic: float
    """CLOCK_MONOTONIC of the target, seconds."""
    fields: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CheckFailed(Event):
    """A check of a migration has failed, and nothing was started."""

    EVENT: ClassVar = "check-failed"
    check: str
    """Its name (docs/reference/checks.md)."""
    code: int
    """The exit code, if it is the first one."""
    message: str
    hint: str
    """What to do about it; empty: the message says that already."""
    number: int
    """How many have failed."""


@dataclass(frozen=True, kw_only=True)
class Error(Event):
    """A failure.  What is raised has the same text, as a rule."""

    EVENT: ClassVar = "error"
    message: str
    hint: str | None = None
    """What to do about it, when the message does not say so already."""


@dataclass(frozen=True, kw_only=True)
class Message(Event):
    """A line of the log; not in the NDJSON."""

    EVENT: ClassVar = "message"
    level: Literal["note", "info", "detail"]
    text: str


IN_JSON: tuple[type[Event], ...] = (
    *(Sending, Phase, Round, Repair, Frozen, Summary, Received, Reused, Tree, PreDump),
    *(
        Connection,
        Cut,
        LazyRestore,
        Forecast,
        PostCopy,
        MemoryRound,
        Tmpfs,
        Suspended,
        Moved,
        MemoryComplete,
        Target,
        CheckFailed,
        Error,
    ),
)
"""What `--json` writes; the others are for `on_event` alone."""

_ALL: tuple[type[Event], ...] = (*IN_JSON, Progress)
_BY_NAME = {kind.EVENT: kind for kind in _ALL}


OF_A_COPY: dict[str, type[Event]] = {
    kind.EVENT: kind
    for kind in (Sending, Phase, Progress, Round, Repair, Frozen, Summary, Received)
}
"""What the other host of a remote copy may report."""


def typed(name: str, at: float, fields: dict[str, Any]) -> Event:
    """The event `name` at `at` seconds.  TypeError: its fields are not those of its type."""
    if "memory_rounds" in fields:
        rounds = [MemoryRoundFigures(**r) for r in fields["memory_rounds"]]
        fields = {**fields, "memory_rounds": rounds}
    return _BY_NAME[name](time=at, **unchangeable(fields))
