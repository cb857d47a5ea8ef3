# SPDX-License-Identifier: Apache-2.0
"""The directory trees of one migration, at its source: how many passes are made over them,
and when.  tree_copy has the passes of one tree, tree_rsync one rsync with both its ends."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from functools import partial

from pyploop.diskcopy.options import Options
from pyploop.errors import LoopError, MigrateError, VzExitCode
from pyploop.migration import rsync, tree_scan
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.tree_copy import TreeCopy
from pyploop.migration.source.tree_rsync import Rsyncs
from pyploop.report.events import Reporter
from pyploop.report.timeline import Span, Stage
from pyploop.runtimes import Tree
from pyploop.system.jobs import in_parallel
from pyploop.wire import channels

QUICK = 0.3
"""Seconds.  After a pass that took less, another pass saves nothing."""
SHRINK = 0.7
"""A pass that takes more than this part of the time of the pass before is the last."""
MOST = 8
"""Passes at most while the container runs, without --max-freeze."""


def check_source(trees: Sequence[Tree], command: str) -> list[int]:
    """Bytes of each tree.  MigrateError when a tree cannot be moved, or this host has no
    suitable rsync."""
    if trees:
        rsync.check_installed(command)
    return [tree_scan.check_source(tree.path) for tree in trees]


class Trees:
    """The copies of all trees; a context manager that ends what still runs."""

    def __init__(
        self,
        remote: Remote,
        trees: Sequence[Tree],
        *,
        command: str,
        words: Sequence[str],
        options: Options,
        report: Reporter,
        kept: Container[str] = (),
    ) -> None:
        """command: rsync.  words: the user's options for it.  kept: names of what the target
        can reuse, `tree N` for a tree."""
        self._remote, self._options, self._report = remote, options, report
        self._rsyncs = Rsyncs(remote, command, words, options)
        self._copies = [
            TreeCopy(n, tree, self._rsyncs, report, f"tree {n}" in kept)
            for n, tree in enumerate(trees)
        ]
        self._passes = 0
        """Passes so far, while the container runs."""
        self.last_seconds = 0.0
        """Of the last pass."""
        self.spans: list[Span] = []

    def __enter__(self) -> Trees:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()
        for copy in self._copies:
            copy.close()

    def __bool__(self) -> bool:
        return bool(self._copies)

    def cancel(self) -> None:
        """From any thread: what runs fails, and nothing more is begun."""
        self._rsyncs.cancel()
        for copy in self._copies:
            for prepared in copy.ready():
                prepared.client.kill()

    # ---- the passes, in order

    def copy_while_running(self) -> None:
        """Make passes until another one would save nothing."""
        if not self._copies:
            return
        policy = self._options.policy
        start = time.monotonic()
        before = 0.0
        while True:
            seconds, left_out = self._running()
            more = self._passes < MOST and self._room()
            if policy.max_freeze is not None:
                if self._passes > 1 and seconds <= policy.max_freeze and not left_out:
                    break
                if time.monotonic() - start > policy.deadline or not self._room():
                    if policy.on_deadline == "freeze":
                        break
                    raise LoopError(
                        f"the last pass over the directory trees took {seconds * 1000:.0f} ms, and "
                        f"--max-freeze allows {policy.max_freeze * 1000:.0f} ms; the container was "
                        "not suspended",
                        hint="allow a longer freeze, or migrate when less is written",
                    )
            elif not more or (
                not left_out
                and (seconds < QUICK or (self._passes > 1 and seconds > SHRINK * before))
            ):
                break
            before = seconds

    def again(self) -> None:
        """Make one more pass, and another one if that has left something out."""
        if self._copies and self._room() and self._running()[1]:
            self._running()

    def _room(self) -> bool:
        """Whether another pass leaves enough channels for the last one, and for the disks and
        the memory."""
        others = channels.needed(0, 0)
        return self._remote.channels_left >= others + channels.TREE_LAST * len(self._copies)

    def _running(self) -> tuple[float, bool]:
        """Make one pass.  Returns its seconds, and whether it has left something out, which can
        happen when the tree changes meanwhile.  MigrateError(6) when the pass before has
        left it out for the same reason: the last pass would fail for it, too."""
        before = [c.left_out for c in self._copies]
        seconds = self._pass(self._passes, last=False)
        self._passes += 1
        now = [c.left_out for c in self._copies]
        for old, new in zip(before, now, strict=True):
            if new and new == old:
                raise MigrateError(VzExitCode.COPY_FAILED, new)
        return seconds, any(now)

    def prepare_last(self) -> None:
        """Start both ends of the last pass, up to where they read the first file.  Those that
        are ready stay."""
        waiting = [c for c in self._copies if not c.ready()]
        in_parallel([partial(c.prepare, True) for c in waiting], self.cancel)

    def finish(self) -> None:
        """Make the last pass.  Nothing may write to the trees any more."""
        if self._copies:
            self._pass(None, last=True)

    def _pass(self, number: int | None, last: bool) -> float:
        """Make a pass over all trees.  number: None for the last one.  Returns its seconds."""
        phase = "frozen" if number is None else f"round {number}" if number else "first pass"
        stage: Stage = "frozen" if last else "running"
        self._report.event("phase", phase=phase, bytes=None)

        def one(copy: TreeCopy) -> None:
            if not last:
                copy.prepare(last)
            start = time.monotonic()
            sent, compared = copy.run_last() if last else copy.run()
            end = time.monotonic()
            self.spans.append(Span(f"tree, {phase}", start, end, stage=stage))
            self._report.event(
                "tree",
                path=copy.tree.path,
                phase=phase,
                seconds=end - start,
                files=sent,
                compared=compared,
                left_out=copy.left_out,
                everything=copy.doubtful and last,
            )
            self._report.info(
                f"{copy.tree.path}, {phase}: {sent} files sent and {compared} compared by contents "
                f"in {end - start:.3f} s"
                + (f"; something was left out: {copy.left_out}" if copy.left_out else "")
            )

        start = time.monotonic()
        in_parallel([partial(one, c) for c in self._copies], self.cancel)
        self.last_seconds = time.monotonic() - start
        return self.last_seconds
