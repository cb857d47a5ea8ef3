# SPDX-License-Identifier: Apache-2.0
"""The migration request, and the result."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyploop.diskcopy.options import Options, Summary
from pyploop.migration.memory_policy import MemoryPolicy
from pyploop.report.timeline import Recorder
from pyploop.report.timings import Moments
from pyploop.runtimes.lazy_policy import NOT_LIVE, Choice, Wanted


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    host: str
    live: bool
    remove_area: bool = True
    keep_dst: bool = False
    check_only: bool = False
    nodeps: frozenset[str] = frozenset()
    drop_exec: bool = False
    """See Runtime."""
    networks: tuple[str, ...] = ()
    publish: tuple[str, ...] = ()
    """See Runtime."""
    pre_dumps: int = MemoryPolicy.max_rounds
    """Memory rounds before the freeze, at most."""
    lazy_restore: Wanted = "auto"
    """Whether the target loads memory lazily, unless its configuration says."""
    post_copy: Wanted = "never"
    """Whether memory follows from this host while the container runs on the target."""
    post_copy_timeout: float = 600.0
    """Seconds for which the connection may be cut meanwhile."""
    suspend_limit: float = 60.0
    """Seconds after which a suspended container goes on here, unless the target was
    already asked to restore it.  0: no limit."""
    max_suspend: float | None = None
    """Seconds that the container may be suspended by the forecast; None: any time."""
    ssh_options: tuple[str, ...] = ()
    rsync_options: tuple[str, ...] = ()
    copy: Options = field(default_factory=Options)


@dataclass
class Result:
    """The result of a migration.  Moments are times of time.monotonic() on the source."""

    moments: Moments | None = None
    steps: dict[str, float] = field(default_factory=dict)
    """Name -> seconds of each step of the suspended time.  The steps overlap."""
    forecast: float | None = None
    """Seconds of the suspended time, as forecast last; None: it was not live."""
    disks: list[Summary] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)
    """What happened when, on both hosts."""
    lazy: Choice = field(default_factory=lambda: Choice(NOT_LIVE))
    """Whether the target loaded its memory lazily."""
    failed: list[str] = field(default_factory=list)
    """What must still be done on either host, by hand or with --recover."""
