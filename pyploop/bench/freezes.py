# SPDX-License-Identifier: Apache-2.0
"""Freezing the source's file systems, and how much is written to it."""

from __future__ import annotations

import contextlib
import time

from pyploop.api.tracking import track
from pyploop.bench.stages import LEAST, Stage
from pyploop.disks.source import Source
from pyploop.errors import PyploopError
from pyploop.freeze.deadline import Deadline
from pyploop.freeze.filesystems import FileSystems
from pyploop.freeze.session import FreezeSession
from pyploop.report.events import Reporter
from pyploop.undo.ledger import UndoLedger

COLD, WARM, WRITTEN = "freeze, cold", "freeze, warm", "written meanwhile"
COOLED = 0.2
"""Seconds after a freeze until the next one is as slow as a first one."""


def freeze(source: Source) -> list[Stage]:
    """LEAST freezes of each kind; each one is thawed at once.  A copy warms them up."""
    if not source.mounts:
        return [Stage(COLD, "s", (), "nothing is mounted from it")]
    report = Reporter()
    plan = UndoLedger(f"bench of {source.path}", report)
    with contextlib.ExitStack() as undo:
        undo.callback(plan.close)
        systems = FileSystems(source.mounts, report, plan)
        undo.callback(systems.close)
        session = FreezeSession((), systems, plan, report, Deadline(time.monotonic))
        try:
            systems.try_out()
            session.prepare()
            cold, warm = [], []
            with session.undo_on_failure():
                for _ in range(LEAST):
                    systems.sync()
                    time.sleep(COOLED)
                    began = time.monotonic()
                    systems.freeze()
                    cold.append(time.monotonic() - began)
                    systems.thaw()
                    warm.append(systems.warm_up())
                    systems.cool_down()
        except PyploopError as e:
            return [Stage(COLD, "s", (), str(e))]
    return [Stage(COLD, "s", tuple(cold)), Stage(WARM, "s", tuple(warm))]


def written(path: str, seconds: float) -> Stage:
    """Bytes per second that are written to it, by its tracker: in parts of the time."""
    values = []
    try:
        with track(path) as tracker:
            tracker.changed()
            for _ in range(LEAST):
                began = time.monotonic()
                time.sleep(seconds / LEAST)
                values.append(tracker.changed().bytes / (time.monotonic() - began))
    except PyploopError as e:
        return Stage(WRITTEN, "bytes/s", (), str(e))
    return Stage(WRITTEN, "bytes/s", tuple(values), "blocks of 4 KiB or more, each once")
