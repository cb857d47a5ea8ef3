# SPDX-License-Identifier: Apache-2.0
"""One migration from its first change on either host to its last: its journal, its lock,
the jobs that must have ended before anything is undone, and how it ends.

Invariant: after the target was asked to restore (`ask`), only its commit record lets
the source run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyploop.errors import DeviceControlError, PyploopError
from pyploop.migration import commit_record, deadlines, undo_kinds
from pyploop.migration.memory_policy import MemoryPolicy
from pyploop.migration.source import lazy, memory, post_copy, recover
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.request import Request, Result
from pyploop.report.events import Reporter
from pyploop.runtimes import Copied, Pages, Runtime
from pyploop.runtimes.config import HostConfig
from pyploop.system import private_folder, signals
from pyploop.system.jobs import Job, end_all
from pyploop.undo.journal import Journal


class Move:
    """What the stages share, from the first change on either host to the last."""

    def __init__(
        self,
        host: HostConfig,
        runtime: Runtime,
        request: Request,
        report: Reporter,
        remote: Remote,
        *,
        copied: Copied,
    ) -> None:
        self.host, self.runtime, self.request = host, runtime, request
        self.report, self.remote = report, remote
        self.result = Result()
        self.id = commit_record.new_id()
        folder = commit_record.make_folder(Path(host.state_dir))
        with contextlib.ExitStack() as made:
            with signals.deferred():
                self._journal = Journal.create(
                    f"migration of {runtime.container} to {request.host}",
                    folder,
                    migration=self.id,
                    side="source",
                    host=request.host,
                    ssh_options=list(request.ssh_options),
                    remove_area=request.remove_area,
                    copied=copied,
                    stage=recover.COPYING,
                    **undo_kinds.naming(host, runtime),
                )
                made.callback(self._journal.close)
                self._lock = commit_record.CommitRecord.create(folder, self.id, "source")
                made.callback(self._lock.close, remove=True)
            made.pop_all()
        runtime.keep_fds = (self._lock.fd,)
        self.jobs: list[Job[Any]] = []
        self.pages: Pages | None = None
        """The page server of a post-copy migration."""
        self.quiet = contextlib.ExitStack()
        """Closed when logging may go on.  Nothing is logged while the container is
        suspended, because logging waits for the log's reader."""
        # The name has another number than the migration's ID, which names the target's
        # folder.  A user who sees that name there could otherwise make this folder first.
        self.folder = Path(host.images_dir) / f"pyploop-{commit_record.new_id()}-out"

    def begin(self) -> list[str]:
        """Let the target make its journal and its commit record.  Returns the names of the
        resumable files and trees that it has of this container from this host."""
        request = self.request
        args = {"migration": self.id, "stall": request.copy.stall, "keep": request.keep_dst}
        kept: list[str] = self.remote.call("begin", deadlines.REQUEST, **args).get("kept", [])
        return kept

    def log_undo(self, kind: str) -> None:
        self._journal.add({"kind": kind, **undo_kinds.naming(self.host, self.runtime)})

    def begin_memory(self, policy: MemoryPolicy | None, used: int) -> memory.Memory:
        """Prepare the memory rounds.  used: bytes of memory that the container uses."""
        self._journal.add({"kind": "remove-tree", "path": str(self.folder)})
        private_folder.make_new(self.folder)
        return memory.Memory(
            self.runtime,
            self.remote,
            self.folder,
            undo=(
                self._journal,
                {"kind": "resume", **undo_kinds.naming(self.host, self.runtime)},
            ),
            jobs=self.jobs,
            memory=used,
            policy=policy,
            stall=self.request.copy.stall,
            rate=self.request.copy.rate,
            recorder=self.result.recorder,
            report=self.report,
        )

    def start_pages(self, used: int) -> Pages:
        """Post-copy: start the page server's keeper.  What it leaves is undone before the
        container is resumed, so `resume` is in the journal already."""
        record = str(post_copy.record_path(self.host, self.runtime))
        self._journal.add({"kind": "page-server", "record": record})
        # Before it starts: what was started is stopped by the journal's entry.
        self.pages = self.runtime.pages
        return post_copy.start(
            self.host, self.runtime, self.request, self.id, used, ssh_options=self.remote.options
        )

    def ask(self, op: str, timeout: float, **args: Any) -> dict[str, Any]:
        """Send the request after which the target decides which host runs the container."""
        self._journal.set(stage=recover.ASKED)
        return self.remote.call(op, timeout, timeout=timeout, **args)

    def lost(self, cause: BaseException) -> bool:
        """After a failure: roll back.  False: the container is here as before.  True: it
        turned out that it runs on the target.  MigrateError(4): that cannot be known now."""
        signals.ignore(self.report, "the migration has already failed and is being rolled back")
        with self.quiet:
            return self._lost(cause)

    def _lost(self, cause: BaseException) -> bool:
        if self.pages is not None and self._journal.get("stage") != recover.ASKED:
            self.pages.stop()  # a dump that is awaited ends
        end_all(self.jobs)  # killing CRIU during a dump damages the container
        self.runtime.give_up()
        try:
            moved = self._journal.get("stage") == recover.ASKED and self._settle(cause)
        except BaseException:
            self._lock.close()  # from now on --recover may take it
            raise
        if not moved and self.pages is not None:
            self.pages.stop()
        if moved:
            self.report.note(
                f"The container runs on the target, but afterwards this failed: {cause}"
            )
            return True
        self._log_failed("not undone", undo_kinds.undo_all(self._journal))
        self.quiet.close()
        self._lock.close(remove=True)
        # The end of the connection would undo it, too, but without telling the result.
        self._there("undo")
        self._say_state(cause)
        return False

    def _say_state(self, cause: BaseException) -> None:
        """Add to a failure what was rolled back."""
        if not isinstance(cause, PyploopError):
            return
        if self.result.failed:
            cause.add("not all of the migration could be rolled back")
            cause.hint = cause.hint or (
                "remove the cause of each step that was not undone, and run `pyploop migrate "
                "--recover`"
            )
        else:
            cause.add("the migration was rolled back, and the container is on this host as before")

    def _settle(self, cause: BaseException) -> bool:
        with contextlib.suppress(PyploopError):
            self._log_theirs("not undone", self.remote.call("undo", deadlines.UNDOING))
            return False  # the target has not committed, and never will
        self.remote.close()
        return recover.settled(self.host, self._journal, cause, self.report)

    def _log_failed(self, what: str, failed: Sequence[str]) -> None:
        for text in failed:
            self.result.failed.append(text)
            self.report.error(f"{what}: {text}")

    def _log_theirs(self, what: str, answer: dict[str, Any]) -> None:
        failed = answer.get("failed", [])
        self._log_failed(what, [f"{self.request.host}: {text}" for text in failed])

    def _there(self, op: str, **args: Any) -> None:
        """Let the target clean up.  When its agent was killed, a new one does it."""
        what = "not undone" if op == "undo" else "not finished"
        try:
            self._log_theirs(what, self.remote.call(op, deadlines.REQUEST, **args))
        except PyploopError:
            self.remote.close()
            try:
                if op == "forget":
                    recover.forget(self.host, self._journal)
                else:
                    self._log_theirs(what, recover.ask(self.host, self._journal))
            except PyploopError as e:
                self.report.note(f"Files of the migration may be left on {self.request.host}: {e}")

    def too_late(self) -> None:
        """From now on ignore signals: the migration cannot be undone, and what is left takes
        seconds."""
        signals.ignore(self.report, "the container has already moved")

    def arrived(self) -> None:
        """The container runs on the target: end it here, and clean up on both hosts."""
        self.too_late()
        # Fails when the file system is full.  Then the record still says that the target was
        # asked, and the target knows the rest.
        request, remove = self.request, self.request.remove_area
        pages = self.pages
        with contextlib.suppress(DeviceControlError):
            self._journal.set(stage=recover.SERVING if pages else recover.MOVED)
        self._there("finish")
        if pages is not None:
            if why := post_copy.await_end(pages, self.runtime, request, self.report):
                self._log_failed("lost", [why])
                remove = False
            with contextlib.suppress(DeviceControlError):
                self._journal.set(stage=recover.MOVED, remove_area=remove)
        self._log_failed(
            "not finished",
            recover.finish_source(self._journal, self.runtime, remove, stopped=not request.live),
        )
        if pages is not None:
            pages.bye()
        lazy.forget(self.host, self.runtime, self.report)
        self._lock.close(remove=True)
        self._there("forget", migration=self.id)
