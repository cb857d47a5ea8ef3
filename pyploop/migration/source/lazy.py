# SPDX-License-Identifier: Apache-2.0
"""The source's part of a lazy restore: what the target has chosen is said, and a container
whose own memory is still being loaded is waited for."""

from __future__ import annotations

from typing import Any

from pyploop.errors import BusyError, MigrateError, OpenError, VzExitCode
from pyploop.migration import deadlines
from pyploop.report.events import Reporter
from pyploop.runtimes import Runtime, lazy_record
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.lazy_memory import in_words
from pyploop.runtimes.lazy_policy import Choice
from pyploop.runtimes.lazy_record import LazyRecord
from pyploop.units import format_size

OLDER = "the target's pyploop is too old"


def wait_loaded(host: HostConfig, runtime: Runtime, report: Reporter) -> None:
    """Until all memory of the container is on this host, to which it has come.
    MigrateError(20) when that takes too long."""
    path = LazyRecord.path_of(host.state_dir, runtime.name, runtime.container)
    try:
        record = LazyRecord.read(path)
        if record is not None and record.loading:
            report.note(f"The memory of {runtime.container} is still being loaded: waiting for it")
            lazy_record.wait_loaded(path, deadlines.LOADING)
    except (BusyError, OpenError) as e:
        raise MigrateError(VzExitCode.LOCKED, str(e)) from e


def report_choice(report: Reporter, answer: Any, told: dict[str, int] | None) -> Choice:
    """What the target says to `check`."""
    choice = choice_of(answer)
    memory = told or {}
    report.event(
        "lazy-restore",
        lazy=choice.lazy,
        why=choice.why,
        private=memory.get("private", 0),
        whole=memory.get("whole", 0),
    )
    if choice.lazy:
        size = format_size(memory.get("private", 0))
        report.info(f"Memory is loaded lazily on the target: yes, up to {size}")
        if words := in_words(memory):
            report.info(f"Cannot be loaded lazily: {words}")
    else:
        report.info(f"Memory is loaded lazily on the target: no ({choice.why})")
    return choice


def choice_of(answer: Any) -> Choice:
    """Of a target's answer; an older one says nothing."""
    if not isinstance(answer, dict):
        return Choice(OLDER)
    return Choice("" if answer.get("lazy") else str(answer.get("why") or OLDER))


def report_outcome(report: Reporter, answer: Any, host: str) -> Choice:
    """What the target says to `restore`."""
    choice = choice_of(answer)
    if choice.lazy:
        report.info(f"The container runs; its memory is being loaded on {host}")
    else:
        report.info(f"The memory was restored before the container ran ({choice.why})")
    return choice


def forget(host: HostConfig, runtime: Runtime, report: Reporter) -> None:
    """The container has moved away: what is recorded of how it came here is over."""
    path = LazyRecord.path_of(host.state_dir, runtime.name, runtime.container)
    try:
        if (record := LazyRecord.read(path)) and not record.busy:
            record.forget()
    except (BusyError, OpenError) as e:
        report.note(str(e))
