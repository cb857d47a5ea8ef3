# SPDX-License-Identifier: Apache-2.0
"""The stages of a migration, each of which returns the next:

    begin -> Copies, entered -> ahead -> Ahead.suspended -> Committed.recorded     (live)
                             -> stopped                                       (not live)

`Move` is what the stages share.  Its `lost` or `arrived` ends the migration.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.migration import deadlines, image_chain
from pyploop.migration.source import dump_stream, lazy, memory, post_copy, tmpfs_images
from pyploop.migration.source.checks import Checked
from pyploop.migration.source.disks import Disks
from pyploop.migration.source.move import Move
from pyploop.migration.source.payload import Copies
from pyploop.migration.source.static_files import send_items
from pyploop.migration.source.suspend_limit import SuspendLimit
from pyploop.migration.source.suspend_plan import SuspendPlan
from pyploop.migration.source.trees import Trees
from pyploop.report.timings import Moments
from pyploop.system.jobs import Job, end_all


def begin(move: Move, checked: Checked) -> Copies:
    """Let the target make its journal, and copy the static files.  Returns the copies of
    disks and trees, which the caller enters."""
    runtime, options = move.runtime, move.request.copy
    kept = move.begin()
    send_items(runtime.items(), move.remote, options, move.report, kept)
    disks = Disks(
        move.remote, checked.sources, options, move.report, kept, trees=len(runtime.trees())
    )
    trees = Trees(
        move.remote,
        runtime.trees(),
        command=move.host.rsync,
        words=move.request.rsync_options,
        options=options,
        report=move.report,
        kept=kept,
    )
    return Copies(disks, trees, runtime.dump_writes)


def ahead(move: Move, copies: Copies, checked: Checked, plan: SuspendPlan) -> Ahead:
    """Copy all that is copied while the container runs.  MigrateError(6): it may not be
    suspended (--max-suspend)."""
    rounds = move.begin_memory(checked.rounds, checked.memory)
    memory.approach(copies, rounds)
    plan.wait(copies, rounds)
    return Ahead(move, copies, rounds, plan)


@dataclass(frozen=True)
class Ahead:
    """The stage in which little is left to copy, and the container still runs."""

    move: Move
    copies: Copies
    memory: memory.Memory
    plan: SuspendPlan

    def _choose_post_copy(self) -> bool:
        """Whether the pages follow.  It is said before the container is suspended."""
        choice, request = self.plan.choice, self.move.request
        if request.post_copy != "never":
            timeout = request.post_copy_timeout
            post_copy.report_choice(self.move.report, choice, self.plan.in_use, timeout)
        return choice.chosen

    def suspended(self) -> Committed:
        """Suspend the container, send the dump and the last blocks at the same time, and
        restore it on the target."""
        move, ahead = self.move, self.memory
        runtime, remote = move.runtime, move.remote
        images, parent = image_chain.folder_of(move.folder, 0), ahead.parent_folder
        images.mkdir(mode=0o700)
        folders = runtime.image_folders(images)
        later = self._choose_post_copy()
        self.copies.settle_lanes()
        if later and "lazy-rounds" not in remote.capabilities:
            # The page server would be asked for a parent's pages, too, and has none of them.
            ahead.drop_rounds()
            parent = None
        channel, out = remote.open_images(move.request.copy.stall)
        limit = SuspendLimit(move.request.suspend_limit, remote.cut)
        with out, limit, remote.explained():
            dump = Job(lambda: (move.pages or runtime).dump(images, parent))
            sent: list[str] = []
            stream = Job(lambda: dump_stream.stream_dump(folders, out, dump, sent))
            # An agent that does not know memory rounds does not know this argument.
            after: dict[str, Any] = {"parent": ahead.parent} if ahead.parent else {}
            if "memory" in remote.capabilities:
                after["room"] = ahead.room
            image_chain.check_room(move.folder, ahead.room)
            why = ""
            if later:
                after["post_copy"] = move.request.post_copy_timeout
            elif why := runtime.prepare_dump(images, parent):
                move.report.info(f"The dump is not started ahead: {why}")
            remote.call("dump", deadlines.REQUEST, **channel, **after)
            move.log_undo("resume")
            if later:
                move.start_pages(self.plan.in_use)
            _compare_clocks(move)
            runtime.before_suspend()
            if not later and not why:
                sent += dump_stream.send_first(folders, out)
            move.quiet.enter_context(move.report.deferred())
            start = time.monotonic()
            limit.start()
            runtime.suspend()
            suspended = time.monotonic()
            move.jobs += [dump, stream]
            try:
                dump.start()
                stream.start()
                move.result.disks = self.copies.finish(dump)
                copied = time.monotonic()
                dump.join()
                dump_stream.explained(remote, "dump", stream.join)
            except BaseException:
                # The target must not decide when this ends: its channel is about to be closed.
                end_all([stream], out.cancel)
                raise
            answer = move.ask("restore", timeout=limit.ask(deadlines.RESTORING))
            there = answer["moments"]
        moments = Moments(start, copied, dump.ended, stream.ended, time.monotonic())
        move.quiet.close()
        tmpfs_images.report(folders.values(), move.report)
        move.result.lazy = lazy.report_outcome(move.report, answer.get("lazy"), move.request.host)
        return Committed(self, moments, suspended, there, out.sent, out.zeroes)


@dataclass(frozen=True)
class Committed:
    """The stage in which the container runs on the target."""

    ahead: Ahead
    moments: Moments
    """Times of time.monotonic() on the source, as `suspended` is."""
    suspended: float
    there: dict[str, float]
    """Times of the restore, by the target's clock."""
    dump_bytes: int
    dump_zero_bytes: int

    def recorded(self) -> None:
        """Put into the result, and into an event, how long each step took."""
        move, moments, there = self.ahead.move, self.moments, self.there
        disks_there = max(
            (at for name, at in there.items() if name.startswith(("disk ", "tree "))), default=0.0
        )
        move.result.moments = moments
        move.result.steps = {
            "suspend": self.suspended - moments.suspend,
            "dump": moments.dumped - self.suspended,
            "dump sent": moments.sent - self.suspended,
            "disks": moments.copied - self.suspended,
            # How much later than the dump the disks were durable and mounted on the target.
            "disks waited for": max(0.0, disks_there - there["dump ended"]),
            "restore": there["running"] - there["restore"],
            "total": moments.resumed - moments.suspend,
        }
        self._record_spans()
        plan = self.ahead.plan
        move.result.forecast = plan.total
        plan.compare(moments, self.suspended, self.dump_bytes, move.result.lazy.lazy)
        memory = self.ahead.memory
        move.report.event(
            "moved",
            steps=move.result.steps,
            dump_bytes=self.dump_bytes,
            dump_zero_bytes=self.dump_zero_bytes,
            memory_rounds=[vars(r) for r in memory.rounds],
            parent=memory.parent,
            lazy=move.result.lazy.lazy,
            why_not_lazy=move.result.lazy.why,
            post_copy=move.pages is not None,
        )

    def _record_spans(self) -> None:
        moments, there, suspended = self.moments, self.there, self.suspended
        record = self.ahead.move.result.recorder
        record.stage = "frozen"
        record.add("suspend", moments.suspend, suspended)
        record.add("dump", suspended, moments.dumped)
        record.add("dump sent", suspended, moments.sent)
        record.add("disks", suspended, moments.copied)
        record.add("restore", max(moments.copied, moments.sent), moments.resumed)
        here = record.clock.here
        for name in ("disk 0 ended", "dump ended", "committed", "running"):
            if name in there:
                record.add(name, here(there["restore"]), here(there[name]), "target")
        record.spans += self.ahead.copies.spans()


def _compare_clocks(move: Move) -> None:
    for _ in range(5):
        sent = time.monotonic()
        there = move.remote.call("clock", deadlines.REQUEST)["monotonic"]
        move.result.recorder.clock.exchange(sent, there, there, time.monotonic())


def stopped(move: Move, copies: Copies, running: bool) -> None:
    """A migration that is not live: stop the container, send the last blocks, and start it
    on the target.  running: whether it runs now."""
    copies.copy_while_running()
    copies.settle_lanes()
    if running:
        move.log_undo("start")
        move.quiet.enter_context(move.report.deferred())
        move.runtime.stop()
    move.result.disks = copies.finish()
    if move.runtime.state().running:
        name = move.runtime.container
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"container {name} was started during the migration, so its copy is out of date",
            hint="keep the container stopped during the migration, or migrate it with --live",
        )
    move.ask("start", timeout=deadlines.RESTORING, run=running)
    move.quiet.close()
