# SPDX-License-Identifier: Apache-2.0
"""The source's directory trees of one migration: passes of rsync through the
agent's connection while the container runs, and one while it is suspended.

A pass is two rsyncs.  The first goes over all of the tree and sends what differs
in size, time (to the nanosecond), or attributes.  The second compares by
contents the files that the first found the same although they may have changed
since the pass before it (tree_scan).  In the last pass both stand ready before
the container is suspended.

Invariant: what is read in a pass is what the target has after it, but for files
that changed since its beginning; so only those are in doubt in the next one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pyploop.diskcopy.options import Options
from pyploop.errors import CancelledError, LoopError, MigrateError, VzExitCode
from pyploop.migration import deadlines, rsync, tree_scan
from pyploop.migration.itemized import Names
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.tree_scan import Since
from pyploop.report.events import Reporter
from pyploop.report.timeline import Span, Stage
from pyploop.runtimes import Tree
from pyploop.system.jobs import Job, in_parallel
from pyploop.wire import channels

QUICK = 0.3
"""Seconds of a pass after which another one saves nothing."""
SHRINK = 0.7
"""A pass that takes more of its predecessor's time than this is the last."""
MOST = 8
"""Passes while the container runs, without --max-freeze."""


def check_source(trees: Sequence[Tree], command: str) -> list[int]:
    """Bytes of each tree.  MigrateError when one cannot be moved, or this host
    has no rsync that could."""
    if trees:
        rsync.check_installed(command)
    return [tree_scan.check_source(tree.path) for tree in trees]


class _Prepared:
    """A client that is ready, a server that is, and the channel between them."""

    def __init__(self, client: rsync.Client, channel: int) -> None:
        self.client, self._channel = client, channel
        self.name = ""
        """The target's word for it."""

    def go(self) -> None:
        self.client.connect(self._channel)
        self._drop()

    def _drop(self) -> None:
        if self._channel >= 0:
            os.close(self._channel)
            self._channel = -1

    def close(self) -> None:
        self.client.close()
        self._drop()


class _Copy:
    """Of one tree."""

    def __init__(self, index: int, tree: Tree, owner: Trees, kept: bool) -> None:
        """kept: the target has something of it already, of which nothing is believed."""
        self._kept = kept
        self._index, self.tree, self._owner = index, tree, owner
        self._first: Since | None = None
        self._since: Since | None = None
        """The beginning of the last complete pass, or of the first one."""
        self._inplace = not kept
        """No file at the target has two names: to write into it changes no other."""
        self._linked = Names()
        """Names that became another one's there, if nothing else tells which files
        change.  Not complete: all of them may have."""
        self._whole: _Prepared | None = None
        self._listed: _Prepared | None = None
        self.doubtful = tree_scan.file_system(tree.path) not in tree_scan.TIMED
        self._failures = 0
        self.left_out = ""
        """Why the pass before left something out; empty: it did not."""

    def prepare(self, last: bool) -> None:
        """Start the next pass, up to where it looks at the first file; the second
        rsync only of the last one, for it may turn out not to be needed."""
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

    def _prepare_one(self, words: Sequence[str], last: bool, counts: bool = False) -> _Prepared:
        prepared = self._owner.prepared(
            self._index, self.tree, words, limited=not last, counts=counts
        )
        if self.doubtful:
            prepared.client.items.second_names = self._linked
        return prepared

    def run_last(self) -> tuple[int, int]:
        """The prepared pass: (files sent, files compared by contents).  Once more
        when it fails, but only once: rsync (3.5.0) complains of a folder that it
        has just replaced by a hard link."""
        try:
            result = self._run(last=True)
        except MigrateError as e:
            self._owner.note(f"{self.tree.path} once more, still suspended: {e}")
            self.close()
            self.prepare(last=True)
            result = self._run(last=True)
        # The target waits for the second server's end, too, needed or not.
        self.close()
        return result

    def run(self) -> tuple[int, int]:
        """The same while the container runs.  One that fails is followed by another:
        rsync fails by some of the changes that a tree may see meanwhile.
        MigrateError when two in a row fail."""
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
            self._inplace = False  # what it has linked is not known
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
        # A name that was sent brings the file's contents for its other names.
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
        """What finds the files that rsync may take for the same although they are not."""
        root = self.tree.path
        if last and self.doubtful:  # all is compared by contents
            if not self._any_linked():
                return dict
            linked = self._linked if self._linked.complete else None
            return lambda: tree_scan.named(root, linked)
        if self._since is None:
            return dict
        assert self._first is not None
        since, first = self._since.threshold(), self._first.threshold()
        return lambda: tree_scan.suspects(root, since, first)

    def _ended(self, prepared: _Prepared) -> tuple[_Prepared, rsync.Done]:
        done = self._owner.ended(prepared, self.tree)
        if done.items.linked:
            self._inplace = False
        return prepared, done

    def _judge(self, ends: Sequence[tuple[_Prepared, rsync.Done]], last: bool) -> None:
        """Sets `left_out`, which in the last pass is a failure."""
        self.left_out = ""
        for prepared, done in ends:
            judged = self._owner.judged(prepared, done)
            if judged.status == rsync.PARTIAL or (last and judged.status):
                error = judged.explain(self.tree.path)
                if last:
                    raise error
                self.left_out = str(error)

    def ready(self) -> list[_Prepared]:
        return [h for h in (self._whole, self._listed) if h is not None]

    def close(self) -> None:
        for prepared in self.ready():
            prepared.close()
        self._whole = self._listed = None


class Trees:
    """All trees; a context manager that ends what still runs."""

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
        """command: rsync; words: the user's options for it.  kept: names of what the
        target can go on from, `tree N` among them."""
        self._remote, self._command, self._options = remote, command, options
        self._report = report
        self._words = tuple(words)
        self._lock = threading.Lock()
        self._copies = [_Copy(n, tree, self, f"tree {n}" in kept) for n, tree in enumerate(trees)]
        self._gone = threading.Event()
        self._passes = 0
        """While the container runs, so far."""
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
        self._gone.set()
        for copy in self._copies:
            for prepared in copy.ready():
                prepared.client.kill()

    def note(self, text: str) -> None:
        self._report.note(text)

    def prepared(
        self, index: int, tree: Tree, words: Sequence[str], *, limited: bool, counts: bool
    ) -> _Prepared:
        """Both ends of one rsync, which have yet to be connected.  limited: by
        --bwlimit.  counts: after it the tree is whole.  CancelledError after `cancel`."""
        if self._gone.is_set():
            raise CancelledError(f"the copy of {tree.path} was cancelled")
        speed = [f"--timeout={max(1, int(self._options.stall))}"]
        if limited and self._options.rate:
            speed.append(f"--bwlimit={max(1, self._options.rate >> 10)}")
        mine = [w for w in self._words if limited or not w.startswith("--bwlimit")]
        client = rsync.Client(self._command, [*words, *speed, *mine], tree.path)
        try:
            client.wait_ready()
            with self._lock:
                number, fd = self._remote.open_channel()
                prepared = _Prepared(client, fd)
                try:
                    args = {"index": index, "channel": number, "last": counts}
                    prepared.name = self._call("tree", deadlines.REQUEST, **args)["name"]
                except BaseException:
                    prepared.close()
                    raise
            return prepared
        except BaseException:
            client.close()
            raise

    def ended(self, prepared: _Prepared, tree: Tree) -> rsync.Done:
        """The client's end.  MigrateError when the copy failed as a whole, with
        the target's reason where it has one: its last words may get lost."""
        done = prepared.client.wait(self._remote.alive)
        if self._gone.is_set():
            raise CancelledError(f"the copy of {tree.path} was cancelled")
        if done.status in (0, rsync.PARTIAL, rsync.VANISHED):
            return done
        error = done.explain(tree.path)
        try:
            self._join(prepared, deadlines.REQUEST)
        except MigrateError as e:
            # Each may have seen nothing but the other's end.
            raise MigrateError(VzExitCode.COPY_FAILED, f"{e}; {error}") from e
        raise error

    def judged(self, prepared: _Prepared, done: rsync.Done) -> rsync.Done:
        """The server's end, after which what came is durable; its word counts:
        what it could not write is no failure of a client that talks to a daemon."""
        try:
            self._join(prepared, self._options.stall)
        except MigrateError as e:
            return replace(done, status=rsync.PARTIAL, said=str(e))
        return done

    def _join(self, prepared: _Prepared, timeout: float) -> None:
        with self._lock:
            self._call("join", timeout + deadlines.REQUEST, name=prepared.name, timeout=timeout)

    def _call(self, op: str, timeout: float, /, **args: Any) -> dict[str, Any]:
        """CancelledError after `cancel`."""
        return self._remote.call(op, timeout, self._gone.is_set, **args)

    # ---- the order

    def copy_while_running(self) -> None:
        """Passes until another one would save nothing."""
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
                    raise LoopError(
                        f"the last pass took {seconds * 1000:.0f} ms, --max-freeze allows "
                        f"{policy.max_freeze * 1000:.0f} ms; nothing was suspended"
                    )
            elif not more or (
                not left_out
                and (seconds < QUICK or (self._passes > 1 and seconds > SHRINK * before))
            ):
                break
            before = seconds

    def again(self) -> None:
        """One more pass, after some time."""
        if self._copies and self._room() and self._running()[1]:
            self._running()

    def _room(self) -> bool:
        """Another pass leaves channels for the last one, and for others' things."""
        others = channels.needed(0, 0)
        return self._remote.channels_left >= others + channels.TREE_LAST * len(self._copies)

    def _running(self) -> tuple[float, bool]:
        """One pass: its seconds, and whether something was left out, as may be when
        it changed meanwhile.  MigrateError when that was so before, for the same
        reason: the last pass would fail by it."""
        before = [c.left_out for c in self._copies]
        seconds = self._pass(self._passes, last=False)
        self._passes += 1
        now = [c.left_out for c in self._copies]
        for old, new in zip(before, now, strict=True):
            if new and new == old:
                raise MigrateError(VzExitCode.COPY_FAILED, new)
        return seconds, any(now)

    def prepare_last(self) -> None:
        """Both ends of the last pass, ready to begin; nothing when they are."""
        waiting = [c for c in self._copies if not c.ready()]
        in_parallel([partial(c.prepare, True) for c in waiting], self.cancel)

    def finish(self) -> None:
        """The last pass: nothing may write to the trees any more."""
        if self._copies:
            self._pass(None, last=True)

    def _pass(self, number: int | None, last: bool) -> float:
        """Seconds that it took."""
        phase = "frozen" if number is None else f"round {number}" if number else "first pass"
        stage: Stage = "frozen" if last else "running"
        self._report.event("phase", phase=phase, bytes=None)

        def one(copy: _Copy) -> None:
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
                + (f" (not all: {copy.left_out})" if copy.left_out else "")
            )

        start = time.monotonic()
        in_parallel([partial(one, c) for c in self._copies], self.cancel)
        return time.monotonic() - start
