# SPDX-License-Identifier: Apache-2.0
"""The story of one migration, top to bottom; the only module that sees both hosts.

    checks of both sides -> files, disks and, where the kernel tracks it, memory
    copied while it runs -> suspended: dump, streamed as it is written, at the same
    time as the last blocks -> the target restores, and says that it runs -> the
    source is killed

Invariants: the source's container stays as it is until the target has said that
it runs; after the target was asked to restore, only its verdict lets the source
run again (commit_record.py).  docs/internals/migrate.md has the order and the commit point.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyploop.diskcopy.options import Options, Summary
from pyploop.errors import DeviceControlError, MigrateError, PyploopError, VzExitCode
from pyploop.migration import commit_record, deadlines, file_stream, image_chain, undo_kinds
from pyploop.migration.memory_policy import MemoryPolicy
from pyploop.migration.source import host_identity, memory, recover, trees
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.disks import Disks, opened
from pyploop.migration.source.payload import Copies, check_number
from pyploop.migration.source.static_files import send_items
from pyploop.migration.source.suspend_limit import SuspendLimit
from pyploop.report.events import Reporter
from pyploop.report.timeline import Recorder
from pyploop.report.timings import Moments
from pyploop.runtimes import Copied, Runtime
from pyploop.runtimes.config import HostConfig
from pyploop.system import cpu, private_folder, signals
from pyploop.system.jobs import Job, end_all
from pyploop.undo.journal import Journal
from pyploop.wire.messages import clipped


@dataclass(frozen=True)
class Wish:
    """What the user asked for."""

    host: str
    live: bool
    remove_area: bool = True
    keep_dst: bool = False
    check_only: bool = False
    nodeps: frozenset[str] = frozenset()
    drop_exec: bool = False
    """See Runtime."""
    pre_dumps: int = MemoryPolicy.max_rounds
    """Rounds of memory before the freeze at most."""
    suspend_limit: float = 60.0
    """Seconds after which a suspended container goes on here, unless the target was
    asked to restore it and may have done so; 0: no limit."""
    ssh_options: tuple[str, ...] = ()
    rsync_options: tuple[str, ...] = ()
    copy: Options = field(default_factory=Options)


@dataclass
class Result:
    """What a migration was; moments are of time.monotonic() here."""

    moments: Moments | None = None
    steps: dict[str, float] = field(default_factory=dict)
    """Name -> seconds of a step of the suspended time; they overlap."""
    disks: list[Summary] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)
    """What happened when, on both hosts."""
    failed: list[str] = field(default_factory=list)
    """What is left to do by hand on either side."""


def connect(host: HostConfig, wish: Wish, report: Reporter) -> Remote:
    """The agent; its events become ours."""

    def on_event(name: str, at: float, fields: dict[str, Any]) -> None:
        if name == "line":
            level = fields.get("level")
            if isinstance(level, int):
                report.line(level, f"{wish.host}: {clipped(fields.get('text'))}")
        else:
            report.event("target", name=name, monotonic=at, fields=fields)

    return Remote(wish.host, host.ssh, wish.ssh_options, host.agent, on_event)


def migrate(host: HostConfig, runtime: Runtime, wish: Wish, report: Reporter) -> Result:
    """Move the container; when this returns it runs on the target (or would,
    check_only).  On an exception it runs here as before, unless the message
    says that the target could not be asked."""
    state = runtime.state()
    if not state.exists:
        raise MigrateError(VzExitCode.NO_CONTAINER, f"there is no container {runtime.container}")
    if wish.live and not state.running:
        raise MigrateError(VzExitCode.STOPPED, f"container {runtime.container} is stopped")
    if state.suspended:
        raise MigrateError(
            VzExitCode.STOPPED,
            f"container {runtime.container} is suspended (pyploop migrate --recover?)",
        )
    runtime.drop_exec = wish.drop_exec
    facts = runtime.check_source(wish.live)
    facts |= {"machine": platform.machine(), "cpu": cpu.flags()}
    facts["source"] = host_identity.identity(host.state_dir)
    facts["trees"] = trees.check_source(runtime.trees(), host.rsync)
    for text in runtime.left_behind():
        report.note(text)
    disks = runtime.disks(source=True)
    with opened(disks) as sources, connect(host, wish, report) as remote:
        copied = runtime.copied(disks)
        facts["images"] = [0 if s.is_image else s.size for s in sources]
        sizes = [_allocated(s.sparse_fd if s.sparse_fd is not None else s.fd) for s in sources]
        checked = remote.call(
            "check",
            deadlines.CHECKING,
            container=runtime.container,
            runtime=runtime.name,
            live=wish.live,
            facts=facts,
            sizes=sizes,
            nodeps=sorted(wish.nodeps),
        )
        takes = remote.capabilities = checked.get("takes", [])  # an older agent tells nothing
        if runtime.trees() and "tree" not in takes:
            raise MigrateError(
                VzExitCode.CANNOT_CONNECT,
                f"pyploop {remote.version} on {wish.host} is too old to take directories",
            )
        report.info(f"Both sides are checked; {wish.host} has pyploop {remote.version}")
        rounds = memory.policy_for(
            runtime, wish.pre_dumps if wish.live else None, report, "memory" in takes
        )
        most = rounds.max_rounds if rounds else 0
        check_number(remote, len(sources), len(runtime.trees()), most)
        if wish.check_only:
            return Result()
        move = _Move(host, runtime, wish, report, remote, copied=copied)
        try:
            kept = move.begin()
            send_items(runtime.items(), remote, wish.copy, report, kept)
            copies = Copies(
                Disks(
                    remote,
                    sources,
                    wish.copy,
                    report,
                    kept,
                    trees=len(runtime.trees()),
                ),
                trees.Trees(
                    remote,
                    runtime.trees(),
                    command=host.rsync,
                    words=wish.rsync_options,
                    options=wish.copy,
                    report=report,
                    kept=kept,
                ),
                runtime.dump_writes,
            )
            with copies as steps:
                if wish.live:
                    move.live(steps, move.begin_memory(rounds, int(facts.get("memory") or 0)))
                else:
                    steps.copy_while_running()
                    move.stopped(steps, state.running)
            move.too_late()
        except BaseException as e:
            if not move.lost(e):
                raise
        for text in runtime.left_behind():
            report.note(text)
        move.arrived()
        return move.result


def _allocated(fd: int) -> int:
    """Bytes that a copy without holes needs."""
    st = os.fstat(fd)
    return st.st_blocks * 512


class _Move:
    """From the first change on either side to the last."""

    def __init__(
        self,
        host: HostConfig,
        runtime: Runtime,
        wish: Wish,
        report: Reporter,
        remote: Remote,
        *,
        copied: Copied,
    ) -> None:
        self._host, self._runtime, self._wish = host, runtime, wish
        self._report, self._remote = report, remote
        self.result = Result()
        self.id = commit_record.new_id()
        folder = commit_record.make_folder(Path(host.state_dir))
        with contextlib.ExitStack() as made:
            with signals.held_back():
                self._journal = Journal.create(
                    f"migration of {runtime.container} to {wish.host}",
                    folder,
                    migration=self.id,
                    side="source",
                    host=wish.host,
                    ssh_options=list(wish.ssh_options),
                    remove_area=wish.remove_area,
                    copied=copied,
                    stage=recover.COPYING,
                    **undo_kinds.naming(host, runtime),
                )
                made.callback(self._journal.close)
                self._lock = commit_record.Verdict.create(folder, self.id, "source")
                made.callback(self._lock.close, remove=True)
            made.pop_all()
        runtime.keep_fds = (self._lock.fd,)
        self._jobs: list[Job[Any]] = []
        self._quiet = contextlib.ExitStack()
        """Nothing is told while the container stands still: that waits for its reader."""
        # Not by the ID, which is the name of the target's: who sees that there, and has
        # somebody here, would make this one first.
        self._folder = Path(host.images_dir) / f"pyploop-{commit_record.new_id()}-out"

    def begin(self) -> list[str]:
        """The target makes its journal and its verdict.  Returns the names of
        what it has kept of this container, from this host."""
        wish = self._wish
        args = {"migration": self.id, "stall": wish.copy.stall, "keep": wish.keep_dst}
        kept: list[str] = self._remote.call("begin", deadlines.REQUEST, **args).get("kept", [])
        return kept

    def _log(self, kind: str) -> None:
        self._journal.add({"kind": kind, **undo_kinds.naming(self._host, self._runtime)})

    def begin_memory(self, policy: MemoryPolicy | None, used: int) -> memory.Memory:
        """The container's, of which `used` bytes are in use."""
        self._journal.add({"kind": "remove-tree", "path": str(self._folder)})
        private_folder.make_new(self._folder)
        return memory.Memory(
            self._runtime,
            self._remote,
            self._folder,
            undo=(
                self._journal,
                {"kind": "resume", **undo_kinds.naming(self._host, self._runtime)},
            ),
            jobs=self._jobs,
            memory=used,
            policy=policy,
            stall=self._wish.copy.stall,
            rate=self._wish.copy.rate,
            recorder=self.result.recorder,
            report=self._report,
        )

    def live(self, disks: Copies, ahead: memory.Memory) -> None:
        """All while it runs; then suspend, dump and last blocks at once, restore on
        the target."""
        runtime, remote = self._runtime, self._remote
        memory.approach(disks, ahead)
        images, parent = image_chain.folder_of(self._folder, 0), ahead.parent_folder
        images.mkdir(mode=0o700)
        number, fd = remote.open_channel()
        limit = SuspendLimit(self._wish.suspend_limit, remote.cut)
        with file_stream.Writer(fd, self._wish.copy.stall) as out, limit, remote.explained():
            dump = Job(lambda: runtime.dump(images, parent))
            stream = Job(lambda: file_stream.stream_dump(images, out, dump))
            # An agent that knows no rounds knows no such argument.
            after = {"parent": ahead.parent} if ahead.parent else {}
            remote.call("dump", deadlines.REQUEST, channel=number, **after)
            self._compare_clocks()
            self._log("resume")
            self._quiet.enter_context(self._report.held())
            start = time.monotonic()
            limit.start()
            runtime.suspend()
            suspended = time.monotonic()
            self._jobs += [dump, stream]
            try:
                dump.start()
                stream.start()
                self.result.disks = disks.finish(dump)
                copied = time.monotonic()
                dump.join()
                stream.join()
            except BaseException:
                # Not when the target likes: its channel is about to be closed.
                end_all([stream], out.cancel)
                raise
            moments = self._ask("restore", timeout=limit.ask(deadlines.RESTORING))["moments"]
        resumed = time.monotonic()
        self._quiet.close()
        self.result.moments = Moments(start, copied, dump.ended, stream.ended, resumed)
        running, asked = moments["running"], moments["restore"]
        there = max(
            (at for name, at in moments.items() if name.startswith(("disk ", "tree "))), default=0.0
        )
        self.result.steps = {
            "suspend": suspended - start,
            "dump": dump.ended - suspended,
            "dump sent": stream.ended - suspended,
            "disks": copied - suspended,
            # Beyond the dump, on the target: durable and mounted there.
            "disks waited for": max(0.0, there - moments["dump ended"]),
            "restore": running - asked,
            "total": resumed - start,
        }
        record = self.result.recorder
        record.stage = "frozen"
        record.add("suspend", start, suspended)
        record.add("dump", suspended, dump.ended)
        record.add("dump sent", suspended, stream.ended)
        record.add("disks", suspended, copied)
        record.add("restore", max(copied, stream.ended), resumed)
        here = record.clock.here
        for name in ("disk 0 ended", "dump ended", "committed", "running"):
            if name in moments:
                record.add(name, here(asked), here(moments[name]), "target")
        record.spans += disks.spans()
        self._report.event(
            "moved",
            steps=self.result.steps,
            dump_bytes=out.sent,
            memory_rounds=[vars(r) for r in ahead.rounds],
            parent=ahead.parent,
        )

    def _compare_clocks(self) -> None:
        for _ in range(5):
            sent = time.monotonic()
            there = self._remote.call("clock", deadlines.REQUEST)["monotonic"]
            self.result.recorder.clock.exchange(sent, there, there, time.monotonic())

    def stopped(self, disks: Copies, running: bool) -> None:
        """Stop, last blocks, start on the target."""
        if running:
            self._log("start")
            self._quiet.enter_context(self._report.held())
            self._runtime.stop()
        self.result.disks = disks.finish()
        if self._runtime.state().running:
            name = self._runtime.container
            raise MigrateError(
                VzExitCode.COPY_FAILED, f"container {name} was started during the migration"
            )
        self._ask("start", timeout=deadlines.RESTORING, run=running)
        self._quiet.close()

    def _ask(self, op: str, timeout: float, **args: Any) -> dict[str, Any]:
        """From here on the target decides."""
        self._journal.set(stage=recover.ASKED)
        return self._remote.call(op, timeout, timeout=timeout, **args)

    def lost(self, cause: BaseException) -> bool:
        """After a failure: false when it runs here again, true when it turns
        out that it runs on the target.  MigrateError: that cannot be known."""
        signals.ignore(self._report, "the migration has already failed and is being rolled back")
        with self._quiet:
            return self._lost(cause)

    def _lost(self, cause: BaseException) -> bool:
        end_all(self._jobs)  # CRIU, ended in the midst of a dump, spoils the container
        try:
            moved = self._journal.get("stage") == recover.ASKED and self._settle(cause)
        except BaseException:
            self._lock.close()  # --recover's from now on
            raise
        if moved:
            self._report.note(f"Went wrong after the target had it: {cause}")
            return True
        self._tell(undo_kinds.undo_all(self._journal))
        self._quiet.close()
        self._lock.close(remove=True)
        # What the connection's end would do anyway, but now its result is known.
        self._there("undo")
        return False

    def _settle(self, cause: BaseException) -> bool:
        with contextlib.suppress(PyploopError):
            self._tell_theirs(self._remote.call("undo", deadlines.UNDOING))
            return False  # it was not committed, and will not be
        self._remote.close()
        return recover.settled(self._host, self._journal, cause, self._report)

    def _tell(self, failed: Sequence[str]) -> None:
        for text in failed:
            self.result.failed.append(text)
            self._report.error(f"not undone: {text}")

    def _tell_theirs(self, answer: dict[str, Any]) -> None:
        self._tell([f"{self._wish.host}: {text}" for text in answer.get("failed", [])])

    def _there(self, op: str, **args: Any) -> None:
        """Tidy the target.  An agent that was killed has left that to another one."""
        try:
            self._tell_theirs(self._remote.call(op, deadlines.REQUEST, **args))
        except PyploopError:
            self._remote.close()
            try:
                if op == "forget":
                    recover.forget(self._host, self._journal)
                else:
                    self._tell_theirs(recover.ask(self._host, self._journal))
            except PyploopError as e:
                self._report.note(f"Something of it may be left on {self._wish.host}: {e}")

    def too_late(self) -> None:
        """There is no way back, and what is left takes seconds."""
        signals.ignore(self._report, "the container has already moved")

    def arrived(self) -> None:
        """It runs on the target: end it here, and tidy both sides."""
        self.too_late()
        # A full folder: the record says that the target was asked, and it knows.
        with contextlib.suppress(DeviceControlError):
            self._journal.set(stage=recover.MOVED)
        self._there("finish")
        wish = self._wish
        self._tell(
            recover.finish_source(
                self._journal, self._runtime, wish.remove_area, stopped=not wish.live
            )
        )
        self._lock.close(remove=True)
        self._there("forget", migration=self.id)
