# SPDX-License-Identifier: Apache-2.0
"""Moving a container to another host: `migrate`, and `recover` after a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pyploop.api import explaining
from pyploop.api.reporting import make_reporter
from pyploop.diskcopy.compression import parse_compression
from pyploop.diskcopy.freeze_policy import OnDeadline, Policy
from pyploop.diskcopy.options import Options
from pyploop.errors import (
    MigrateError,
    VzExitCode,
)
from pyploop.migration import rsync_options
from pyploop.migration.memory_policy import MemoryPolicy
from pyploop.migration.source import orchestrator
from pyploop.migration.source import recover as recovery
from pyploop.migration.source.request import Request, Result
from pyploop.report.events import Reporter
from pyploop.report.results import CopyResult, copy_result
from pyploop.report.timeline import Recorder
from pyploop.report.timings import Moments
from pyploop.runtimes import Runtime, config
from pyploop.runtimes.config import CTID, HostConfig
from pyploop.runtimes.lazy_policy import Wanted
from pyploop.runtimes.registry import completed, make_runtime, split

if TYPE_CHECKING:
    from pyploop.report.event_types import Event

RuntimeName = Literal["vzctl", "runc", "podman", "command"]


@dataclass(frozen=True, kw_only=True)
class MigrationOptions:
    """How a container is moved.  Times are seconds, sizes are bytes."""

    live: bool = False
    """Without stopping it."""
    runtime: RuntimeName | None = None
    """What runs the container; None: as the configuration says."""
    config: str | None = None
    """File that says how containers look on this host; None: /etc/pyploop/migrate.toml."""
    check_only: bool = False
    """Check both sides, and change nothing."""
    explain: bool = False
    """As `check_only`.  Also log what was found, and how it would move."""
    remove_area: bool = True
    """Remove the container from the source afterwards."""
    keep_dst: bool = False
    """Keep what was copied when it fails; the next one goes on from it."""
    skip_checks: Iterable[str] = ()
    """Checks of compatibility to leave out: `cpu`, `ipv6`."""
    ssh_options: Iterable[str] = ()
    """More words for ssh."""
    rsync_options: Iterable[str] = ()
    """More words for rsync, which copies a root that is a directory."""
    drop_exec: bool = False
    """Processes of `runc exec`, which cannot be moved, end with the move."""
    networks: Iterable[str] = ()
    """Of a container of Podman on the target, instead of its own: NAME[:ip=ADDRESS]."""
    publish: Iterable[str] = ()
    """Its published ports there, instead of its own: [ADDRESS:]HOST:CONTAINER[/udp]."""
    memory_rounds: int = MemoryPolicy.max_rounds
    """Copy memory ahead in so many rounds at most; 0: not at all."""
    lazy_restore: Wanted = "auto"
    """Whether the target loads memory after the container has begun to run: where it pays,
    never or always.  The target's configuration wins."""
    post_copy: Wanted = "never"
    """With `live`: memory follows from this host while the container runs on the target:
    never, when more than `max_suspend` is expected without it (auto), or always.  If this
    host ends meanwhile, the container is lost."""
    post_copy_timeout: float = 600.0
    """With post-copy: if the connection is cut for so long, the container is lost."""
    suspend_limit: float | None = None
    """With `live`: after so long a suspended container goes on here, unless the target may
    have restored it already.  None: 60.  0: no limit."""
    max_suspend: float | None = None
    """With `live`: suspended at most, by the forecast; None: any time."""
    max_freeze: float | None = None
    """With `live`: a disk frozen at most."""
    deadline: float = Policy.deadline
    """With `max_suspend`, `max_freeze`: go on with rounds so long at most."""
    on_deadline: OnDeadline = Policy.on_deadline
    """When one of them cannot be kept: `freeze` goes on all the same, `abort` lets the
    container go on here."""
    bandwidth: int = 0
    """Bytes per second of a disk while the container runs; 0: no limit."""
    compress: str = "auto"
    """When blocks of the disks are compressed on their way: as for CopyOptions."""
    timeout: float = 600.0
    """Fail when the peer is silent for so long; 1 at least."""


@dataclass(frozen=True, kw_only=True)
class MigrationResult:
    """What a migration was.  Times are seconds."""

    steps: dict[str, float]
    """Step of the suspended time -> seconds; they overlap.  Empty unless it was live."""
    disks: tuple[CopyResult, ...]
    left_over: tuple[str, ...]
    """What is left to do by hand, on either host; the container has moved all the same."""
    recorder: Recorder
    """What happened when, on both hosts."""
    lazy: bool
    """The target loads the container's memory while it runs there."""
    why_not_lazy: str
    """Empty: it does."""
    forecast: float | None
    """Of the suspended time, the last one; with `check_only`, too.  None: it was not live."""
    moments: Moments | None
    """Of a live migration, as vzmigrate's table has them."""


def migrate(
    host: str,
    container: str,
    *,
    options: MigrationOptions | None = None,
    on_event: Callable[[Event], None] | None = None,
    reporter: Reporter | None = None,
) -> MigrationResult:
    """Move a container to another host, where `pyploop agent` is started by ssh.

    host: `[user@]host`, as ssh takes it.  container: its ID or name.  on_event, reporter: as
    for Copy.  When an earlier migration of this container was killed, it is recovered
    first.

    When it returns, the container runs on the target (with `check_only`: it would).  When it
    raises, it runs here as before, unless the message says that the target could not be
    asked.  It raises a MigrateError, whose `exit_code` is a VzExitCode, or another
    PyploopError when copying failed.
    """
    o = options or MigrationOptions()
    report = reporter or make_reporter(on_event)
    here = completed(config.load(o.config), o.runtime, container)
    request = _request(host, o)
    runtime = make_runtime(here, o.runtime, container)
    if o.explain:
        with explaining.explained(here, runtime, report, host):
            return _checked(here, runtime, request, report)
    return _checked(here, runtime, request, report)


def _checked(
    here: HostConfig, runtime: Runtime, request: Request, report: Reporter
) -> MigrationResult:
    with recovery.lock(here, runtime):
        if failed := recovery.recover(here, runtime.container, report, locked=True):
            raise MigrateError(
                VzExitCode.LOCKED,
                f"an earlier migration of {runtime.container} could not be undone: "
                f"{'; '.join(failed)}; nothing was moved",
                hint="correct what is named, then run `pyploop migrate --recover`",
            )
        return _public(orchestrator.migrate(here, runtime, request, report))


def recover(
    container: str | None = None,
    *,
    runtime: RuntimeName | None = None,
    config_file: str | None = None,
    on_event: Callable[[Event], None] | None = None,
    reporter: Reporter | None = None,
) -> tuple[str, ...]:
    """Undo, or finish, what killed migrations from this host have left: of one container, or
    all.  Returns what could not be undone, in words.

    MigrateError: one is under way, or the target cannot be asked which host runs the
    container, which stays suspended.
    """
    here = config.load(config_file)
    if container:
        _, container = split(runtime, container)
    if runtime == "vzctl" and container and not CTID.fullmatch(container):
        container = make_runtime(here, runtime, container).container
    return tuple(recovery.recover(here, container or None, reporter or make_reporter(on_event)))


def _public(result: Result) -> MigrationResult:
    return MigrationResult(
        steps=result.steps,
        disks=tuple(copy_result(vars(d)) for d in result.disks),
        left_over=tuple(result.failed),
        recorder=result.recorder,
        lazy=result.lazy.lazy,
        why_not_lazy=result.lazy.why,
        forecast=result.forecast,
        moments=result.moments,
    )


def _request(host: str, o: MigrationOptions) -> Request:
    if o.max_freeze is not None and not o.live:
        raise MigrateError(VzExitCode.USAGE, "--max-freeze needs --live")
    if o.suspend_limit is not None and not o.live:
        raise MigrateError(VzExitCode.USAGE, "--suspend-limit needs --live")
    if o.max_suspend is not None and not o.live:
        raise MigrateError(VzExitCode.USAGE, "--max-suspend needs --live")
    if o.post_copy != "never" and not o.live:
        raise MigrateError(VzExitCode.USAGE, "--post-copy needs --live")
    if o.post_copy == "auto" and o.max_suspend is None:
        raise MigrateError(VzExitCode.USAGE, "--post-copy auto needs --max-suspend")
    try:
        compression = parse_compression(o.compress)
    except ValueError as e:
        raise MigrateError(VzExitCode.USAGE, f"--compress: {e}") from e
    limit = Request.suspend_limit if o.suspend_limit is None else o.suspend_limit
    return Request(
        host=host,
        live=o.live,
        remove_area=o.remove_area,
        keep_dst=o.keep_dst,
        check_only=o.check_only or o.explain,
        nodeps=frozenset(o.skip_checks),
        drop_exec=o.drop_exec,
        networks=tuple(o.networks),
        publish=tuple(o.publish),
        pre_dumps=o.memory_rounds,
        lazy_restore=o.lazy_restore,
        post_copy=o.post_copy,
        post_copy_timeout=o.post_copy_timeout,
        suspend_limit=limit,
        max_suspend=o.max_suspend,
        ssh_options=tuple(o.ssh_options),
        rsync_options=rsync_options.check_options(tuple(o.rsync_options)),
        copy=Options(
            stall=o.timeout,
            rate=o.bandwidth,
            compression=compression,
            freeze_limit=limit,  # a disk is frozen while the container is suspended
            policy=Policy(max_freeze=o.max_freeze, deadline=o.deadline, on_deadline=o.on_deadline),
        ),
    )
