# SPDX-License-Identifier: Apache-2.0
"""One rsync over a directory tree, with both of its ends: the client here, the server at the
agent, and the channel between them."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pyploop.diskcopy.options import Options
from pyploop.errors import CancelledError, MigrateError, VzExitCode
from pyploop.migration import deadlines, rsync
from pyploop.migration.source.agent_client import Remote
from pyploop.runtimes import Tree


class PreparedRsync:
    """A client and a server that are ready, and the channel that will connect them."""

    def __init__(self, client: rsync.Client, channel: int) -> None:
        self.client, self._channel = client, channel
        self.name = ""
        """The target's name for it, to be joined."""

    def go(self) -> None:
        """Connect the two: rsync begins to read files."""
        self.client.connect(self._channel)
        self._drop()

    def _drop(self) -> None:
        if self._channel >= 0:
            os.close(self._channel)
            self._channel = -1

    def close(self) -> None:
        self.client.close()
        self._drop()


class Rsyncs:
    """Starts rsyncs for all trees of one migration, and waits for their ends.  From any
    thread."""

    def __init__(
        self, remote: Remote, command: str, words: Sequence[str], options: Options
    ) -> None:
        """command: rsync.  words: the user's options for it."""
        self._remote, self._command, self._options = remote, command, options
        self._words = tuple(words)
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Start no more, and wait for none: what is called from now on fails."""
        self._cancelled.set()

    def prepare(
        self, index: int, tree: Tree, words: Sequence[str], *, limited: bool, counts: bool
    ) -> PreparedRsync:
        """Start both ends of one rsync, which are not connected yet.  limited: by --bwlimit.
        counts: the tree is whole after it.  CancelledError after `cancel`."""
        self._check_cancelled(tree)
        speed = [f"--timeout={max(1, int(self._options.stall))}"]
        if limited and self._options.rate:
            speed.append(f"--bwlimit={max(1, self._options.rate >> 10)}")
        mine = [w for w in self._words if limited or not w.startswith("--bwlimit")]
        client = rsync.Client(self._command, [*words, *speed, *mine], tree.path)
        try:
            client.wait_ready()
            with self._lock:
                args, fd = self._remote.open_tree()
                prepared = PreparedRsync(client, fd)
                try:
                    args |= {"index": index, "last": counts}
                    prepared.name = self._call("tree", deadlines.REQUEST, **args)["name"]
                except BaseException:
                    prepared.close()
                    raise
            return prepared
        except BaseException:
            client.close()
            raise

    def wait_client(self, prepared: PreparedRsync, tree: Tree) -> rsync.Done:
        """Wait for the client's end.  MigrateError when the copy failed as a whole.  It then
        has the target's reason, too: the server's last words may not reach the client."""
        done = prepared.client.wait(self._remote.alive)
        self._check_cancelled(tree)
        if done.status in (0, rsync.PARTIAL, rsync.VANISHED):
            return done
        error = done.explain(tree.path)
        try:
            self._join(prepared, deadlines.REQUEST)
        except MigrateError as e:
            # Each end may have seen only that the other one has ended.
            raise MigrateError(
                VzExitCode.COPY_FAILED, f"{e}; {error}", path=tree.path, hint=e.hint
            ) from e
        raise error

    def wait_server(self, prepared: PreparedRsync, done: rsync.Done) -> rsync.Done:
        """Wait for the server's end, after which what came is durable.  Returns the client's
        result, corrected by the server's: a client that talks to a daemon does not fail
        when the daemon could not write something."""
        try:
            self._join(prepared, self._options.stall)
        except MigrateError as e:
            return replace(done, status=rsync.PARTIAL, errors=str(e))
        return done

    def _check_cancelled(self, tree: Tree) -> None:
        if self._cancelled.is_set():
            raise CancelledError(f"the copy of {tree.path} was cancelled", path=tree.path)

    def _join(self, prepared: PreparedRsync, timeout: float) -> None:
        with self._lock:
            self._call("join", timeout + deadlines.REQUEST, name=prepared.name, timeout=timeout)

    def _call(self, op: str, timeout: float, /, **args: Any) -> dict[str, Any]:
        """CancelledError after `cancel`."""
        return self._remote.call(op, timeout, self._cancelled.is_set, **args)
