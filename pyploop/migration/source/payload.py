# SPDX-License-Identifier: Apache-2.0
"""All of a container's files in one migration: its disks, and its directory
trees, each kind by its own steps, at the same time where that is right."""

from __future__ import annotations

import contextlib

from pyploop.diskcopy.options import Summary
from pyploop.errors import MigrateError, VzExitCode
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.disks import Disks
from pyploop.migration.source.trees import Trees
from pyploop.report.timeline import Span
from pyploop.system.jobs import Job, end_all
from pyploop.wire import channels


def check_number(remote: Remote, disks: int, trees: int, rounds: int) -> None:
    """MigrateError when the connection has too few channels for so many disks,
    trees, and rounds of memory."""
    if disks + 2 * trees + channels.OTHERS > channels.AT_ONCE:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{disks} disks and {trees} trees are too many for one migration: it has "
            f"{channels.AT_ONCE} channels at once, one for each disk and two for each tree",
        )
    if channels.needed(disks, trees, rounds) > remote.channels_left:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{disks} disks, {trees} trees and {rounds} rounds of memory (--pre-dumps) are too "
            f"many for pyploop {remote.version} on {remote.host}, which takes "
            f"{remote.channels_left} channels: install a newer one there",
        )


class Copies:
    """A context manager, in which the disks are tracked.  The steps are those of
    the disks; the disks come last in each, for their forecast is of the next moment."""

    def __init__(self, disks: Disks, trees: Trees, dump_writes: bool) -> None:
        """dump_writes: a dump may add something to the trees."""
        self._disks, self._trees, self._dump_writes = disks, trees, dump_writes
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Copies:
        with self._stack:
            self._stack.enter_context(self._disks)
            self._stack.enter_context(self._trees)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def spans(self) -> list[Span]:
        """What was done when."""
        return self._disks.spans() + self._trees.spans

    def copy_while_running(self) -> None:
        """All but what is for the suspended time."""
        self._trees.copy_while_running()
        self._disks.copy_while_running()
        self._trees.prepare_last()

    # ---- the same by steps

    def first_pass(self) -> float:
        """As Disks.first_pass."""
        self._trees.copy_while_running()
        return self._disks.first_pass()

    def converge(self) -> None:
        """After something else has taken time."""
        self._trees.again()
        self._disks.converge()

    def prepare_freeze(self) -> None:
        self._disks.prepare_freeze()
        self._trees.prepare_last()

    # ---- suspended

    def finish(self, dump: Job[None] | None = None) -> list[Summary]:
        """What is left, durable at the target.  dump: the one that is being made."""
        if not self._trees:
            return self._disks.finish()

        def trees() -> None:
            if dump is not None and self._dump_writes:
                dump.join()
            self._trees.finish()

        job = Job(trees)
        try:
            job.start()
            summaries = self._disks.finish()
            job.join()
        except BaseException:
            end_all([job], self._trees.cancel)
            raise
        return summaries
