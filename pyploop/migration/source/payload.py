# SPDX-License-Identifier: Apache-2.0
"""The payload of one migration: the container's disks and directory trees.  Each kind has
its own steps, and both are copied at the same time where that is right."""

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
    """MigrateError(6) when the connection has too few channels for so many disks,
    trees, and memory rounds."""
    if disks + 2 * trees + channels.OTHERS > channels.AT_ONCE:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{disks} disks and {trees} trees are too many for one migration: each disk needs a "
            f"channel, each tree two, and a connection has {channels.AT_ONCE - channels.OTHERS}",
        )
    if channels.needed(disks, trees, rounds) > remote.channels_left:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{disks} disks, {trees} trees and {rounds} memory rounds are too many for pyploop "
            f"{remote.version} on {remote.host}, which takes {remote.channels_left} channels",
            hint="install a newer pyploop there, or allow fewer memory rounds (--pre-dumps)",
        )


class Copies:
    """The copies of all disks and trees; a context manager, in which the disks are tracked.
    It has the steps of `Disks`.  In each step the disks come last, because their forecast
    is for the moment after it."""

    def __init__(self, disks: Disks, trees: Trees, dump_writes: bool) -> None:
        """dump_writes: whether a dump may write to the trees."""
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
        """What was done when, for the timeline."""
        return self._disks.spans() + self._trees.spans

    def copy_while_running(self) -> None:
        """Copy all that can be copied before the container is suspended."""
        self._trees.copy_while_running()
        self._disks.copy_while_running()
        self._trees.prepare_last()

    # ---- the same in steps

    def first_pass(self) -> float:
        """As Disks.first_pass."""
        self._trees.copy_while_running()
        return self._disks.first_pass()

    def converge(self) -> None:
        """Copy what was written since the last step."""
        self._trees.again()
        self._disks.converge()

    def prepare_freeze(self) -> None:
        self._disks.prepare_freeze()
        self._trees.prepare_last()

    def settle_lanes(self) -> None:
        """Before the suspension: the lanes that are open stay, and no other is opened."""
        self._disks.settle_lanes()

    @property
    def wire(self) -> float:
        """As Disks.wire."""
        return self._disks.wire

    def forecast(self) -> float:
        """Seconds that `finish` takes beside a dump, as far as is known."""
        return max(self._disks.forecast(), self._trees.last_seconds)

    # ---- suspended

    def finish(self, dump: Job[None] | None = None) -> list[Summary]:
        """Copy what is left.  It is durable at the target when this returns.  dump: the
        dump that is being made meanwhile."""
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
