# SPDX-License-Identifier: Apache-2.0
"""The copy of one directory tree: passes of rsync through the agent's connection while the
container runs, and one while it is suspended.

A pass is two rsyncs.  The first goes over the whole tree, and sends what differs in size,
time (to the nanosecond), or attributes.  The second compares by contents the files that
look the same to the first, although they may have changed since the pass before
(tree_scan).  In the last pass both are ready before the container is suspended.

Invariant: after a pass the target has what was read in it, except in files that changed
since the pass began.  So only those are in doubt in the next pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyploop.errors import MigrateError
from pyploop.migration import rsync, tree_scan
from pyploop.migration.itemized import Names
from pyploop.migration.source.tree_rsync import PreparedRsync, Rsyncs
from pyploop.migration.tree_scan import Since
from pyploop.report.events import Reporter
from pyploop.runtimes import Tree
from pyploop.system.jobs import Job


class TreeCopy:
    """The copy of one tree."""

    def __init__(
        self, index: int, tree: Tree, rsyncs: Rsyncs, report: Reporter, kept: bool
    ) -> None:
        """kept: the target has a part of the tree from an earlier migration.  It is compared
        by contents."""
        self._index, self.tree, self._rsyncs, self._report = index, tree, rsyncs, report
        self._kept = kept
        self._first: Since | None = None
        """The beginning of the first pass."""
        self._since: Since | None = None
        """The beginning of the last complete pass, or of the first one."""
        self._inplace = not kept
        """No file at the target has two names, so writing into one changes no other."""
        self._linked = Names()
        """Names that became a second name of a file at the target, where file times do not
        show which files have changed.  Not complete: any name may be one of them."""
        self._whole: PreparedRsync | None = None
        """Goes over the whole tree."""
        self._listed: PreparedRsync | None = None
        """Compares files that are named to it."""
        self.doubtful = tree_scan.file_system(tree.path) not in tree_scan.TIMED
        """The file system's times do not show all changes."""
        self._failures = 0
        self.left_out = ""
        """Why the last pass has left something out; empty: it has not."""

    def prepare(self, last: bool) -> None:
        """Start the next pass, up to the point where it reads the first file.  The second
        rsync is started only for the last pass, because it may not be needed."""
        words = [*rsync.TREE, *(() if last else rsync.CHANGING)]
        if (last and self.doubtful) or self._kept:
            words.append("--checksum")
        if last and (self._any_linked() if self.doubtful else self._since and not self._kept):
            self._listed = self._prepare_one(self._listing(), last=True)
        if self._inplace:
            words.append("--inplace")
        self._whole = self._prepare_one(words, last, counts=last)

    def _any_linked(self) -> bool:
        return bool(self._linked) or not self._linked.complete

    def _listing(self) -> Sequence[str]:
        return rsync.COMPARED if self._inplace else rsync.PARTED

    def _prepare_one(self, words: Sequence[str], last: bool, counts: bool = False) -> PreparedRsync:
        prepared = self._rsyncs.prepare(
            self._index, self.tree, words, limited=not last, counts=counts
        )
        if self.doubtful:
            prepared.client.items.second_names = self._linked
        return prepared

    def run_last(self) -> tuple[int, int]:
        """Run the prepared last pass.  Returns (files sent, files compared by contents).  If
        it fails, it is repeated once: rsync (3.5.0) reports an error for a folder that it
        has just replaced by a hard link."""
        try:
            result = self._run(last=True)
        except MigrateError as e:
            self._report.note(
                f"The last pass over {self.tree.path} is repeated, while the container is "
                f"suspended: {e}"
            )
            self.close()
            self.prepare(last=True)
            result = self._run(last=True)
        # The target also waits for the end of the second server, even if it was not needed.
        self.close()
        return result

    def run(self) -> tuple[int, int]:
        """Run the prepared pass while the container runs.  Returns as `run_last`.  A pass may
        fail, because rsync fails when the tree changes in some ways meanwhile.
        MigrateError when two passes in a row fail."""
        begin = Since(self.tree.path)
        try:
            result = self._run(last=False)
            self._failures = 0
            self._kept = self._kept and bool(self.left_out)  # all of it is compared now
        except MigrateError as e:
            self._failures += 1
            if self._failures > 1:
                raise
            self.left_out = str(e)
            self._inplace = False  # it is not known which names it has linked
            self._linked.forget()
            result = (0, 0)
        self._first = self._first or begin
        if not self.left_out or self._since is None:
            self._since = begin
        self.close()
        return result

    def _run(self, last: bool) -> tuple[int, int]:
        assert self._whole is not None
        items = self._whole.client.items
        self._whole.go()
        look = self._scan(last)

        def in_doubt() -> dict[int, list[bytes]]:
            found = look()
            items.only({name for all in found.values() for name in all})
            return found

        scan = Job(in_doubt).start()
        try:
            ends = [self._ended(self._whole)]
        finally:
            found = scan.join()
        # A name that was sent has brought the file's contents for its other names, too.
        names = [n for all in found.values() if items.names.isdisjoint(all) for n in all]
        if names:
            self._listed = self._listed or self._prepare_one(self._listing(), last)
            self._listed.client.items.only(frozenset())
            self._listed.go()
            self._listed.client.feed(names)
            ends.append(self._ended(self._listed))
        self._judge(ends, last)
        return items.sent, len(names)

    def _scan(self, last: bool) -> Callable[[], dict[int, list[bytes]]]:
        """Returns what finds the files that may look the same to rsync although they are not."""
        root = self.tree.path
        if last and self.doubtful:  # the first rsync compares all files by contents
            if not self._any_linked():
                return dict
            linked = self._linked if self._linked.complete else None
            return lambda: tree_scan.named(root, linked)
        if self._since is None:
            return dict
        assert self._first is not None
        since, first = self._since.threshold(), self._first.threshold()
        return lambda: tree_scan.suspects(root, since, first)

    def _ended(self, prepared: PreparedRsync) -> tuple[PreparedRsync, rsync.Done]:
        done = self._rsyncs.wait_client(prepared, self.tree)
        if done.items.linked:
            self._inplace = False
        return prepared, done

    def _judge(self, ends: Sequence[tuple[PreparedRsync, rsync.Done]], last: bool) -> None:
        """Set `left_out`.  MigrateError if the last pass has left something out."""
        self.left_out = ""
        for prepared, client in ends:
            done = self._rsyncs.wait_server(prepared, client)
            if done.status == rsync.PARTIAL or (last and done.status):
                error = done.explain(self.tree.path)
                if last:
                    raise error
                self.left_out = str(error)

    def ready(self) -> list[PreparedRsync]:
        return [r for r in (self._whole, self._listed) if r is not None]

    def close(self) -> None:
        for prepared in self.ready():
            prepared.close()
        self._whole = self._listed = None
