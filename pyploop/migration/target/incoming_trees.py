# SPDX-License-Identifier: Apache-2.0
"""The target's side of a migration's directory trees.  Each pass has one rsync server, and
what it has written is made durable.

Invariant: a tree is whole only when the server of its last pass has succeeded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, ProtocolError, VzExitCode
from pyploop.migration import rsync, undo_kinds
from pyploop.migration.target import resumable_trees
from pyploop.report.events import Reporter
from pyploop.runtimes import Tree, tree_folders
from pyploop.system import kernel
from pyploop.system.jobs import Job
from pyploop.system.stderr_tail import LastWords
from pyploop.undo.journal import Journal


def check(command: str, trees: Sequence[Tree], sizes: Sequence[Any], kept: dict[int, int]) -> None:
    """Check before anything starts: rsync is installed, there is room for the trees, and
    nothing lies in their place.  kept: bytes of each tree that are here already.
    MigrateError."""
    if trees or sizes:
        rsync.check_installed(command)
    if len(trees) != len(sizes):
        raise ProtocolError(
            f"the container has {len(sizes)} trees on the source, and {len(trees)} in the "
            "target's configuration",
            hint="name the same trees in migrate.toml on both hosts",
        )
    for index, (tree, size) in enumerate(zip(trees, sizes, strict=True)):
        tree_folders.check_free(tree, max(int(size) - kept.get(index, 0), 0))


class IncomingTrees:
    """The directory trees of one migration."""

    def __init__(
        self,
        command: str,
        trees: Sequence[Tree],
        *,
        folder: Path,
        log: Journal,
        stall: float,
        keep_fds: Sequence[int],
        report: Reporter,
        mode: int = 0o700,
    ) -> None:
        """command: rsync.  folder: for rsync's configurations.  stall: seconds after which
        a silent client is given up.  keep_fds: see Runtime.  mode: of the folders that are
        made above the trees."""
        self._command, self._trees, self._folder = command, trees, folder
        self._log, self._stall, self._keep_fds = log, stall, keep_fds
        self._passes = 0
        self._mode = mode
        # Computed before anything is made: kept trees lie in folders that stay.
        self._entries = [
            resumable_trees.entry_for(log, n, tree.path) for n, tree in enumerate(trees)
        ]
        self._made = resumable_trees.adopt(log, self._entries, self._make_parent, report)
        self.kept = [f"tree {index}" for index in sorted(self._made)]
        """Names of the trees that an earlier migration has left, and that lie in their place."""
        self._last: dict[int, str] = {}
        self._failed: dict[str, str] = {}

    def _make_parent(self, path: str) -> None:
        undo_kinds.make_folders(self._log, Path(path).parent, self._mode)

    def take(self, index: int, fd: int, last: bool) -> tuple[str, Job[None]]:
        """Start the server of one pass.  Returns the pass's name, and a job that waits for
        its end and never fails.  last: this is the last pass, or a repetition of it.
        Closes the descriptor."""
        try:
            if not 0 <= index < len(self._trees):
                raise ProtocolError(
                    f"agent protocol: there is no tree {index!r}: this container has "
                    f"{len(self._trees)} trees here"
                )
            path = self._trees[index].path
            if index not in self._made:
                undo_kinds.make_folders(self._log, Path(path), self._mode)
                self._log.add(self._entries[index])
                self._made.add(index)
            name = f"tree {index}.{self._passes}"
            file = name.replace(" ", "-")
            self._passes += 1
            log = LastWords()
            try:
                process = rsync.serve(
                    self._command,
                    path,
                    fd,
                    config=self._folder / f"{file}.conf",
                    log=log,
                    stall=self._stall,
                    keep_fds=self._keep_fds,
                )
            except BaseException:
                log.close()
                raise
        finally:
            os.close(fd)
        if last:
            self._last[index] = name

        def work() -> None:
            try:
                status = rsync.wait(process)
                _sync(path)
                if status not in (0, rsync.VANISHED) or (last and status):
                    errors = rsync.last_errors(log.text(ended=True))
                    self._failed[name] = (
                        f"the rsync server of {path} ended with status {status}: {errors}"
                    )
            finally:
                log.close()

        return name, Job(work)

    def check(self, name: str) -> None:
        """MigrateError(6), with the reason, when this pass has failed.  The source decides
        what follows from that."""
        if name in self._failed:
            raise MigrateError(VzExitCode.COPY_FAILED, self._failed[name])

    def check_whole(self) -> None:
        """All servers have ended.  MigrateError unless the last pass over each tree has
        succeeded."""
        for index in range(len(self._trees)):
            if index not in self._last:
                raise ProtocolError(f"agent protocol: tree {index} was not sent before the restore")
            self.check(self._last[index])


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kernel.syncfs(fd, path)
    finally:
        os.close(fd)
