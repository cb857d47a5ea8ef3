# SPDX-License-Identifier: Apache-2.0
"""The source's part of a post-copy migration: whether it is one, and what becomes of the
page server (docs/internals/post-copy.md).

Invariant: from the commit on the source's container is a page server and nothing else.  It is
never resumed, and ended when the target has all of its memory, or never will.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop import __version__
from pyploop.errors import MigrateError, VzExitCode
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.request import Request
from pyploop.report.events import Reporter
from pyploop.runtimes import Pages, Runtime, page_record
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.page_record import PageRecord
from pyploop.transport import ssh
from pyploop.units import format_size
from pyploop.wire import mux as wire

LONGEST_WAIT = 5.0
RISK = (
    "While memory is loaded from this host, the container depends on both hosts: if this host "
    "ends, or the connection is cut for more than {timeout:g} s (--post-copy-timeout), the "
    "container is lost, as if its host had lost power"
)


@dataclass(frozen=True)
class Plan:
    """What both hosts can do."""

    want: str
    """never, auto or always."""
    why: str
    """Why it cannot be; empty: it can."""
    most: float | None
    """Seconds of suspended time above which `auto` chooses it."""


NOT_WANTED = Plan("never", "", None)


def plan(request: Request, runtime: Runtime, remote: Remote, answer: dict[str, Any]) -> Plan:
    """Before anything is changed.  answer: the target's to `check`.  MigrateError(14) when it
    is asked for (`always`) and cannot be."""
    want = request.post_copy if request.live else "never"
    why = ""
    if want != "never":
        why = _why_not(runtime, remote, answer)
    if want == "always" and why:
        raise MigrateError(
            VzExitCode.NO_KERNEL,
            f"--post-copy always is not possible: {why}",
            hint="remove the cause, or migrate with --post-copy auto or never",
        )
    return Plan(want, why, request.max_suspend)


def _why_not(runtime: Runtime, remote: Remote, answer: dict[str, Any]) -> str:
    if runtime.pages is None:
        return f"containers of {runtime.name} cannot be"
    if "post-copy" not in remote.capabilities:
        return "the target's pyploop is too old"
    there = answer.get("post_copy")
    if why := str(there.get("why", "")) if isinstance(there, dict) else "no answer":
        return f"{remote.host}: {why}"
    return runtime.pages.problem()


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why not."""

    chosen: bool
    why: str
    seconds: float
    """Forecast of the suspended time without post-copy."""


def choose(plan: Plan, seconds: float) -> Choice:
    """seconds: of suspended time, by the forecast, without post-copy."""
    if plan.want == "never":
        return Choice(False, "not wanted", seconds)
    if plan.why:
        return Choice(False, plan.why, seconds)
    if plan.want == "always":
        return Choice(True, "", seconds)
    if plan.most is None:
        return Choice(False, "--max-suspend is not given", seconds)
    if seconds <= plan.most:
        return Choice(
            False,
            f"{seconds:.2f} s are expected without it, and --max-suspend is {plan.most:g} s",
            seconds,
        )
    return Choice(True, "", seconds)


def report_choice(report: Reporter, choice: Choice, memory: int, timeout: float) -> None:
    risk = RISK.format(timeout=timeout) if choice.chosen else ""
    report.event(
        "post-copy",
        chosen=choice.chosen,
        why=choice.why,
        memory=memory,
        forecast=choice.seconds,
        timeout=timeout,
        risk=risk,
    )
    if choice.chosen:
        report.note(f"Post-copy: up to {format_size(memory)} of memory. {risk}")
    else:
        report.info(f"Post-copy: no ({choice.why})")


def record_path(host: HostConfig, runtime: Runtime) -> Path:
    return PageRecord.path_of(host.state_dir, runtime.name, runtime.container)


def start(
    host: HostConfig,
    runtime: Runtime,
    request: Request,
    migration: str,
    memory: int,
    *,
    ssh_options: Sequence[str],
) -> Pages:
    """Start the page server's keeper, which has a connection of its own.  ssh_options: as
    for the other connection.  The caller has it in the journal."""
    pages = runtime.pages
    assert pages is not None
    config: Sequence[str] = ("--config", os.path.abspath(host.path)) if host.path else ()
    command = [sys.executable, "-I", "-m", "pyploop.cli.main", "migrate", "--recover", *config]
    pages.start(
        record_path(host, runtime),
        runtime.keep_fds,
        runtime=runtime.name,
        container=runtime.container,
        migration=migration,
        host=request.host,
        total=memory,
        timeout=request.post_copy_timeout,
        ssh=[
            *(*host.ssh, *ssh_options, "-oConnectTimeout=5", *ssh.OPTIONS, "--"),
            *(request.host, shlex.join(host.agent)),
        ],
        hello=wire.pages_hello(__version__, migration),
        recover=[*command, "--", request.host, runtime.container],
    )
    return pages


def await_end(pages: Pages, runtime: Runtime, request: Request, report: Reporter) -> str:
    """Until the target has all memory.  Returns why it never will; empty: it has."""
    report.note(f"{runtime.container} runs on {request.host}; its memory follows")
    while (ended := pages.wait(LONGEST_WAIT)) is None:
        pass
    state, why = ended
    sent, requests = pages.served
    report.event(
        "memory complete",
        complete=state == page_record.COMPLETE,
        why=why,
        sent=sent,
        requests=requests,
    )
    if state == page_record.COMPLETE:
        report.note(f"All memory of {runtime.container} is on {request.host}")
        return ""
    return (
        f"the memory of {runtime.container} did not all come to {request.host} ({why}), which "
        "ends the container there; its disks are there as it left them. It was not resumed here, "
        "and what it had here stays"
    )


def record_of(host: HostConfig, runtime: Runtime) -> PageRecord | None:
    return PageRecord.read(record_path(host, runtime))
