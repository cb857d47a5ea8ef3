# SPDX-License-Identifier: Apache-2.0
"""One migration from its first change on either side to its last: its journal, its
lock, what must have ended before anything is undone, and how it ends.

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
from pyploop.migration.source import memory, recover
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.request import Request, Result
from pyploop.report.events import Reporter
from pyploop.runtimes import Copied, Runtime
from pyploop.runtimes.config import HostConfig
from pyploop.system import private_folder, signals
from pyploop.system.jobs import Job, end_all
from pyploop.undo.journal import Journal


class Move:
    """From the first change on either side to the last; what the stages share."""

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
            with signals.held_back():
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
        self.quiet = contextlib.ExitStack()
        """Nothing is logged while the container stands still: logging waits for the log's
        reader."""
        # Not named by the ID, which names the target's folder: a user who sees that name
        # there could make this folder first, by a process here.
        self.folder = Path(host.images_dir) / f"pyploop-{commit_record.new_id()}-out"

    def begin(self) -> list[str]:
        """The target makes its journal and its commit record.  Returns the names of
        what it has kept of this container, from this host."""
        request = self.request
        args = {"migration": self.id, "stall": request.copy.stall, "keep": request.keep_dst}
        kept: list[str] = self.remote.call("begin", deadlines.REQUEST, **args).get("kept", [])
        return kept

    def log_undo(self, kind: str) -> None:
        self._journal.add({"kind": kind, **undo_kinds.naming(self.host, self.runtime)})

    def begin_memory(self, policy: MemoryPolicy | None, used: int) -> memory.Memory:
        """The container's, of which `used` bytes are in use."""
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

    def ask(self, op: str, timeout: float, **args: Any) -> dict[str, Any]:
        """From here on the target decides."""
        self._journal.set(stage=recover.ASKED)
        return self.remote.call(op, timeout, timeout=timeout, **args)

    def lost(self, cause: BaseException) -> bool:
        """After a failure: false when it runs here again, true when it turns
        out that it runs on the target.  MigrateError: that cannot be known."""
        signals.ignore(self.report, "the migration has already failed and is being rolled back")
        with self.quiet:
            return self._lost(cause)

    def _lost(self, cause: BaseException) -> bool:
        end_all(self.jobs)  # CRIU, ended in the midst of a dump, spoils the container
        try:
            moved = self._journal.get("stage") == recover.ASKED and self._settle(cause)
        except BaseException:
            self._lock.close()  # --recover's from now on
            raise
        if moved:
            self.report.note(
                f"The container runs on the target, but afterwards this failed: {cause}"
            )
            return True
        self._log_failed(undo_kinds.undo_all(self._journal))
        self.quiet.close()
        self._lock.close(remove=True)
        # What the connection's end would do anyway, but now its result is known.
        self._there("undo")
        return False

    def _settle(self, cause: BaseException) -> bool:
        with contextlib.suppress(PyploopError):
            self._log_theirs(self.remote.call("undo", deadlines.UNDOING))
            return False  # it was not committed, and will not be
        self.remote.close()
        return recover.settled(self.host, self._journal, cause, self.report)

    def _log_failed(self, failed: Sequence[str]) -> None:
        for text in failed:
            self.result.failed.append(text)
            self.report.error(f"not undone: {text}")

    def _log_theirs(self, answer: dict[str, Any]) -> None:
        self._log_failed([f"{self.request.host}: {text}" for text in answer.get("failed", [])])

    def _there(self, op: str, **args: Any) -> None:
        """Tidy the target.  An agent that was killed has left that to another one."""
        try:
            self._log_theirs(self.remote.call(op, deadlines.REQUEST, **args))
        except PyploopError:
            self.remote.close()
            try:
                if op == "forget":
                    recover.forget(self.host, self._journal)
                else:
                    self._log_theirs(recover.ask(self.host, self._journal))
            except PyploopError as e:
                self.report.note(f"Files of the migration may be left on {self.request.host}: {e}")

    def too_late(self) -> None:
        """There is no way back, and what is left takes seconds."""
        signals.ignore(self.report, "the container has already moved")

    def arrived(self) -> None:
        """It runs on the target: end it here, and tidy both sides."""
        self.too_late()
        # A full folder: the record says that the target was asked, and it knows.
        with contextlib.suppress(DeviceControlError):
            self._journal.set(stage=recover.MOVED)
        self._there("finish")
        request = self.request
        self._log_failed(
            recover.finish_source(
                self._journal, self.runtime, request.remove_area, stopped=not request.live
            )
        )
        self._lock.close(remove=True)
        self._there("forget", migration=self.id)
