# SPDX-License-Identifier: Apache-2.0
"""The target's side of one migration: what was made for it, and how that is undone.

Invariants: whatever is made is in the journal first.  Paths and commands come from this
host's configuration; of the peer's names only labels and positions are used, and they are
checked.  Nothing that is committed is undone here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, ProtocolError, PyploopError, VzExitCode
from pyploop.migration import commit_record, deadlines, undo_kinds
from pyploop.migration.commit_record import ABORTED, COMMITTED, RAN, CommitRecord
from pyploop.migration.image_chain import check_room, folder_of
from pyploop.migration.image_channels import ImageReader
from pyploop.migration.target import checks, resumable_files, resumable_trees
from pyploop.migration.target.early_restore import EarlyRestore
from pyploop.migration.target.incoming_disks import IncomingDisks, Stream
from pyploop.migration.target.incoming_files import IncomingFiles
from pyploop.migration.target.incoming_items import IncomingItems
from pyploop.migration.target.incoming_memory import IncomingMemory
from pyploop.migration.target.incoming_trees import IncomingTrees
from pyploop.migration.target.settle import complete
from pyploop.report.events import Reporter
from pyploop.runtimes import Facts, Runtime
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.lazy_policy import UNABLE, Choice
from pyploop.runtimes.lazy_record import LazyRecord
from pyploop.system import private_folder
from pyploop.system.jobs import Job
from pyploop.undo.journal import Journal

TREE_PASSES = 4
"""Passes over one tree at a time.  The last one has two servers, and may be repeated."""


class Incoming:
    """One migration to this host."""

    def __init__(
        self,
        host: HostConfig,
        runtime: Runtime,
        migration: str,
        facts: Facts,
        *,
        stall: float,
        keep: bool,
        report: Reporter,
    ) -> None:
        """facts: the source facts.  stall: seconds without a byte after which a stream is
        given up.  keep: copied data are kept after a failure (--keep-dst)."""
        self._host, self._runtime, self._facts = host, runtime, facts
        self.migration = migration
        self.stall, self._report = (
            min(stall or deadlines.LONGEST_STALL, deadlines.LONGEST_STALL),
            report,
        )
        self._disks = runtime.disks(source=False)
        self._jobs: dict[str, Job[None]] = {}
        self.committed = False
        """True from the commit on, unless the commit is withdrawn."""
        self.ran = False
        """Whether the container was seen running here."""
        self._early = EarlyRestore(runtime, self._jobs, self._wait_for_disks)
        folder = commit_record.make_folder(Path(host.state_dir))
        self._journal = Journal.create(
            f"migration of {runtime.container} to this host",
            folder,
            migration=migration,
            side="target",
            keep=keep,
            source=resumable_files.source_of(facts),
            **undo_kinds.naming(host, runtime),
        )
        # The contents come from another host, programs with the set-user-ID bit too.
        mode = 0o700 if host.policy_of(runtime.container).private else 0o755
        made = contextlib.ExitStack()
        try:
            self.record = CommitRecord.create(folder, migration)
            made.callback(self.record.close, remove=True)
            runtime.keep_fds = (self.record.fd,)
            self._folder = Path(host.images_dir) / f"pyploop-{migration}"
            self._log("remove-tree", path=str(self._folder), transient=True)
            private_folder.make_new(self._folder)
            if runtime.instance:  # `placed` may make more than files
                self._log("abandon", first=True, **undo_kinds.naming(host, runtime))
            self._memory = IncomingMemory(self._folder, facts.get("memory"))
            self._files = IncomingFiles(host, runtime, self._journal, self._disks, report)
            made.callback(self._files.close)
            self._items = IncomingItems(
                runtime, self._files, self._journal, facts, stall=self.stall, mode=mode
            )
            self._incoming_disks = IncomingDisks(
                runtime,
                self._disks,
                self._files,
                self._journal,
                facts,
                stall=self.stall,
                mode=mode,
                report=report,
            )
            self._trees = IncomingTrees(
                host.rsync,
                runtime.trees(),
                folder=self._folder,
                log=self._journal,
                stall=self.stall,
                keep_fds=runtime.keep_fds,
                report=report,
                mode=mode,
            )
        except BaseException:
            # No caller has this object yet, so no other code would undo it.
            for text in undo_kinds.undo_all(self._journal, keep):
                report.note(f"not undone: {text}")
            made.close()
            raise

    def _log(self, kind: str, **fields: Any) -> None:
        self._journal.add({"kind": kind, **fields})

    # ---- what comes through channels

    @property
    def kept_names(self) -> list[str]:
        """Names of the resumable files and trees: the source sends only what differs."""
        return self._files.names + self._trees.kept

    def working(self) -> bool:
        """Whether something is being received."""
        return any(not job.over.is_set() for job in self._jobs.values())

    def placing(self) -> bool:
        """Whether static files are being received.  That writes into the journal, which only
        one job may do at a time."""
        return "items" in self._jobs and not self._jobs["items"].over.is_set()

    def _start(self, name: str, job: Job[None]) -> None:
        self._jobs[name] = job
        job.start()

    def send_digests(self, files: Any, fd: int) -> None:
        """Send digests of resumable files into the channel.  files: a list of [name, size]."""
        out = socket.socket(fileno=fd)
        out.settimeout(self.stall or None)
        try:
            work = self._files.send_digests(files, out)
        except BaseException:
            out.close()
            raise
        self._start(f"digests {len(self._jobs)}", Job(work, out.close))

    def take_items(self, fd: int) -> None:
        """Receive the static files, once."""
        if "items" in self._jobs:
            raise ProtocolError("agent protocol: the request `items` came twice")
        self._start("items", Job(self._items.receive(fd), lambda: os.close(fd)))

    def take_disk(self, index: int, stream: Stream, reuse: bool) -> None:
        """Receive one disk, and mount it as soon as it is durable.  reuse: the source sends
        only what differs from the resumable file."""
        self._incoming_disks.check(index)
        if f"disk {index}" in self._jobs:
            raise ProtocolError(f"agent protocol: disk {index} was sent twice")
        work = self._incoming_disks.receive(index, stream, reuse)
        self._start(f"disk {index}", Job(work, stream.close))

    def take_tree(self, index: int, fd: int, last: bool) -> str:
        """Receive one pass over a directory tree.  Returns its name for `join`."""
        busy = [n for n, job in self._jobs.items() if not job.over.is_set()]
        if sum(n.startswith(f"tree {index}.") for n in busy) >= TREE_PASSES:
            os.close(fd)
            raise ProtocolError(
                f"agent protocol: {TREE_PASSES} passes over tree {index} are under way, which is "
                "the limit"
            )
        name, job = self._trees.take(index, fd, last)
        self._start(name, job)
        return name

    def take_dump(
        self, channel: ImageReader, number: int, parent: int, room: int, post_copy: float
    ) -> None:
        """Receive memory images into tmpfs, as the source writes them.  number: of the
        pre-dump; 0: the dump.  room: bytes that must be free for them and for what follows.
        post_copy: the pages come later; seconds for which the source may be away meanwhile."""
        self._memory.check(number, parent)
        self._end_rounds(forget=not parent)
        check_room(self._folder, room)
        if not number:
            if post_copy:
                checks.choose_post_copy(self._host, self._runtime, self._facts, post_copy)
            if self._runtime.lazy is not None:
                self._runtime.lazy.chained = bool(parent)
            self._start_guard()
        completed = self._early.complete
        work = self._memory.receive(channel, number, parent, self._dumped, completed)
        name = f"memory {number}" if number else "dump"
        if number:
            self._start(name, Job(work, channel.close))
            return
        self._log_abandon()
        why = self._runtime.prepare_undump(folder_of(self._folder, 0))
        self._start(name, Job(work, channel.close))
        if why:
            self._report.info(f"The restore is not started ahead: {why}")
        else:
            self._early.start()

    def _wait_for_disks(self) -> None:
        for n in range(len(self._disks)):
            self._wait(f"disk {n}", self.stall)

    def _start_guard(self) -> None:
        lazy = self._runtime.lazy
        if lazy is None or not lazy.choice.lazy:
            return
        name = self._runtime.name, self._runtime.container
        record = LazyRecord.path_of(self._host.state_dir, *name)
        what = "the guard of its lazy restore"
        self._log("lazy-guard", what=what, record=str(record), images=str(self._folder))
        lazy.start(
            self._folder,
            self.record.path,
            record,
            runtime=name[0],
            container=name[1],
            migration=self.migration,
        )

    def _log_abandon(self) -> None:
        entries = self._journal.entries
        if not any(e["kind"] == "abandon" and not e.get("first") for e in entries):
            self._log("abandon", **undo_kinds.naming(self._host, self._runtime))

    def _dumped(self, images: Path) -> None:
        self._runtime.check_images(images)
        if self._runtime.lazy is not None:
            self._runtime.lazy.serve(images)

    def _end_rounds(self, forget: bool) -> None:
        """Wait for the memory rounds: they come one after the other.  forget: one of them
        failed, and the dump will contain all of the memory."""
        for name in [n for n in self._jobs if n.startswith("memory ")]:
            if not self._jobs[name].over.wait(self.stall):
                raise ProtocolError(
                    f"agent protocol: more memory images were announced, and {name} is still "
                    f"being received after {self.stall:g} s"
                )
            if forget:
                del self._jobs[name]

    def join(self, name: str, timeout: float) -> float:
        """Wait for one of these jobs.  Returns when it ended (time.monotonic()), or raises
        its failure."""
        ended = self._wait(name, timeout)
        self._trees.check(name)
        return ended

    def _wait(self, name: str, timeout: float) -> float:
        if name not in self._jobs:
            raise ProtocolError(f"agent protocol: nothing with the name {name!r} is received here")
        try:
            self._jobs[name].join(timeout)
        except TimeoutError as e:
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"{name!r} has not arrived on this host within {timeout:g} s",
            ) from e
        return self._jobs[name].ended

    # ---- the commit

    def restore(self, alive: Callable[[], None], timeout: float) -> dict[str, float]:
        """Let the container run here.  alive: raises when the connection to the source has
        ended, because the source may then have rolled back.  Returns moments (monotonic)."""
        deadline = time.monotonic() + timeout
        moments = {f"{name} ended": self._wait(name, timeout) for name in list(self._jobs)}
        self._need_disks()
        self._log_abandon()  # it is there already, unless the source sent no dump
        moments["restore"] = time.monotonic()

        def commit() -> None:
            alive()
            if time.monotonic() > deadline:
                raise MigrateError(
                    VzExitCode.RESTORE_FAILED,
                    f"the container was not restored within {timeout:.0f} s, which is all that "
                    "the source allows; it does not run here",
                )
            self.record.write(COMMITTED)
            self.committed = True
            moments["committed"] = time.monotonic()

        try:
            self._early.finish(timeout)
            self._runtime.undump(folder_of(self._folder, 0), commit)
        except BaseException as e:
            if not (self.committed and self._runs_after(e)):
                self._withdraw()
                raise
        moments["running"] = time.monotonic()
        if self._runtime.lazy is not None:
            self._runtime.lazy.keep()
        self._came_to_run()
        return moments

    def start(self, alive: Callable[[], None], timeout: float, run: bool) -> None:
        """The same without a dump.  run: the container ran on the source, so start it."""
        for name in list(self._jobs):
            self._wait(name, timeout)
        self._need_disks()
        self._log("abandon", **undo_kinds.naming(self._host, self._runtime))
        alive()
        try:
            self._runtime.release()
            if run:
                self._runtime.start()
        except BaseException as e:
            if not self._runs_after(e):
                self._withdraw()
                raise
        self._came_to_run()

    def _came_to_run(self) -> None:
        self.committed = True
        self.record.write(RAN)
        self.ran = True

    def _runs_after(self, failure: BaseException) -> bool:
        """Whether the container runs here although the last step failed.  Its network peers
        may rely on what it has sent since, so it is not taken back.  When the runtime
        cannot say whether it runs, that failure is raised, and the commit record stays as
        it is."""
        if not undo_kinds.runs(self._runtime):
            return False
        self._report.note(f"The container runs here, although the restore failed: {failure}")
        return True

    def _need_disks(self) -> None:
        for n in range(len(self._disks)):
            if f"disk {n}" not in self._jobs:
                raise ProtocolError(f"agent protocol: disk {n} was not sent before the restore")
        self._trees.check_whole()

    def _withdraw(self) -> None:
        """The restore failed before the container could run."""
        self._runtime.give_up()
        with contextlib.suppress(OSError, PyploopError):  # undo() tries it again, and reports
            self._runtime.abandon()
        if self._runtime.lazy is not None:
            self._runtime.lazy.stop()
        self.record.write(ABORTED)
        self.committed = False

    # ---- ends

    def lazy(self) -> dict[str, Any]:
        """Whether it was restored lazily, and why not."""
        choice = self._runtime.lazy.choice if self._runtime.lazy else Choice(UNABLE)
        return {"lazy": choice.lazy, "why": choice.why}

    def complete(self) -> list[str]:
        """The container stays: forget how it is undone, and remove what only the migration
        needed.  Returns what could not be removed."""
        self._files.close()
        failed = complete(self._journal, self._runtime)
        self.record.close()
        return failed

    def undo(self) -> list[str]:
        """Remove what came, or keep the copied data (--keep-dst).  Returns what could not be
        undone; a later process may try it again."""
        for job in (*self._jobs.values(), self._early.job):
            job.end(deadlines.UNMOVED)  # all that it made is in the journal
            job.interrupt(deadlines.INTERRUPTED)
        self._runtime.give_up()
        if self._runtime.lazy is not None:
            self._runtime.lazy.stop()
        self._files.close()
        failed = undo_kinds.undo_all(self._journal, self._journal.get("keep"))
        what = resumable_files.described(self._host, self._journal) + resumable_trees.described(
            self._journal
        )
        if what:
            self._report.note(f"Kept for the next migration from the same host: {', '.join(what)}")
        if not failed:
            self.record.write(ABORTED)
        self.record.close(remove=not failed)
        return failed
