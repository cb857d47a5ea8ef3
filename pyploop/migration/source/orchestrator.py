# SPDX-License-Identifier: Apache-2.0
"""The story of one migration, from top to bottom; the only module that sees both hosts.

    checks of both sides -> files, disks and, where the kernel tracks it, memory
    copied while the container runs -> suspended: the dump is streamed as it is written,
    at the same time as the last blocks -> the target restores, and says that it runs ->
    the container on the source is killed

Invariants: the source's container stays as it is until the target has said that it runs.
After the target was asked to restore, only its commit record lets the source run the
container again (commit_record.py).  docs/internals/migrate.md has the order and the commit
point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pyploop.errors import MigrateError, PyploopError, VzExitCode
from pyploop.migration.source import checks, stages
from pyploop.migration.source.disks import opened
from pyploop.migration.source.move import Move
from pyploop.migration.source.request import Request, Result
from pyploop.migration.source.suspend_plan import SuspendPlan
from pyploop.report.events import Reporter
from pyploop.runtimes import Runtime
from pyploop.runtimes.checks import Checks, ChecksFailedError, naming, of
from pyploop.runtimes.config import HostConfig


def migrate(host: HostConfig, runtime: Runtime, request: Request, report: Reporter) -> Result:
    """Move the container.  When this returns, it runs on the target (with check_only: it
    would).  After an exception it runs here as before, unless the message says that the
    target could not be asked."""
    with contextlib.ExitStack() as stack:
        with _nothing_changed():
            here = checks.here(host, runtime, request, report)
            with _all_reported(here.found, report):
                if here.facts is None:
                    here.found.end()
                sources = stack.enter_context(opened(here.disks))
                with naming("connection"):
                    remote = stack.enter_context(checks.connect(host, request, report))
                checked = here.there(remote, sources)
                plan = None
                if request.live:
                    plan = SuspendPlan(
                        host, runtime, request, report, remote=remote, checked=checked
                    )
                    with naming("forecast"):
                        plan.check()
        if request.check_only:
            return Result(forecast=plan.total if plan else None)
        move = Move(host, runtime, request, report, remote, copied=checked.copied)
        try:
            with stages.begin(move, checked) as copies:
                if plan is not None:
                    stages.ahead(move, copies, checked, plan).suspended().recorded()
                else:
                    stages.stopped(move, copies, checked.running)
            move.too_late()
        except BaseException as e:
            if not move.lost(e):
                raise
        for text in runtime.left_behind():
            report.note(text)
        move.arrived()
        return move.result


@contextlib.contextmanager
def _all_reported(found: Checks, report: Reporter) -> Iterator[None]:
    """A failure in the body is reported together with the checks that have failed before."""
    try:
        yield
    except PyploopError as e:
        if isinstance(e, ChecksFailedError):
            new = [f for f in e.failed if f not in found.failed]
        elif isinstance(e, MigrateError):
            new = of(e, "other")
        elif not found.failed:
            raise  # it has an exit code of its own
        else:
            new = of(MigrateError(VzExitCode.COPY_FAILED, str(e), path=e.path, hint=e.hint), "disk")
        failed = [*found.failed, *new]
        for one in failed:
            report.event(
                "check-failed",
                check=one.name,
                code=int(one.code),
                message=one.message,
                hint=one.hint,
                host=one.host,
                number=len(failed),
            )
        raise ChecksFailedError(failed) from e


@contextlib.contextmanager
def _nothing_changed() -> Iterator[None]:
    """A failure in the body says that the migration has changed nothing yet."""
    try:
        yield
    except PyploopError as e:
        e.add("the migration has changed nothing on either host")
        raise
