# SPDX-License-Identifier: Apache-2.0
"""Both ends of a migration's directory trees in one process, with real rsyncs,
and an account of a tree that is taken independently of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from pyploop.diskcopy.options import Options
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.trees import Trees
from pyploop.migration.target.incoming_trees import IncomingTrees
from pyploop.report.events import Reporter
from pyploop.runtimes import Tree
from pyploop.system.jobs import Job
from pyploop.undo.journal import Journal


class Loop:
    """In the place of `remote.Remote`: its agent is here."""

    def __init__(self, incoming: IncomingTrees) -> None:
        self.incoming = incoming
        self.jobs: list[Job[None]] = []
        self._named: dict[str, Job[None]] = {}
        self._theirs: dict[int, socket.socket] = {}
        self.cut = False

    def alive(self) -> bool:
        return not self.cut

    def open_tree(self) -> tuple[dict[str, Any], int]:
        ours, theirs = socket.socketpair()
        number = len(self.jobs) + 1
        self._theirs[number] = theirs
        return {"channel": number}, ours.detach()

    @property
    def channels_left(self) -> int:
        return 63 - len(self.jobs)

    def call(
        self, op: str, timeout: float, gone: Callable[[], bool], /, **args: Any
    ) -> dict[str, Any]:
        if op == "join":
            self._named[args["name"]].over.wait(timeout)
            self.incoming.check(args["name"])
            return {}
        assert op == "tree"
        fd = self._theirs.pop(args["channel"]).detach()
        name, job = self.incoming.take(args["index"], fd, args["last"])
        self.jobs.append(job)
        self._named[name] = job.start()
        return {"name": name}


class Events:
    """The `tree` events of a reporter."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        if name == "tree":
            self.seen.append(fields)

    def line(self, level: int, at: float, text: str) -> None:
        pass

    def error(self, at: float, text: str, hint: str | None) -> None:
        pass

    def close(self) -> None:
        pass


class Copying:
    """One tree on its way from `source` to `target`."""

    def __init__(self, source: Path, target: Path, trees: Trees, loop: Loop, events: Events):
        self.source, self.target = source, target
        self.trees, self._loop, self._events = trees, loop, events

    @property
    def events(self) -> list[dict[str, Any]]:
        return self._events.seen

    def cut(self) -> None:
        """The connection is dead."""
        self._loop.cut = True

    def finish(self) -> None:
        """The last pass, the target's end included."""
        self.trees.finish()
        for job in self._loop.jobs:
            job.join(30)
        self._loop.incoming.check_whole()


@contextlib.contextmanager
def copying(
    folder: Path,
    source: Path,
    *words: str,
    options: Options | None = None,
    rsync: str = "rsync",
    there: str = "",
) -> Iterator[Copying]:
    """folder: for all but the source.  there: the target's rsync, if it is another."""
    target, state = folder / "target", folder / "state"
    state.mkdir(mode=0o700)
    log = Journal.create("test", state)
    events, report = Events(), Reporter()
    report.add(events)
    incoming = IncomingTrees(
        there or rsync,
        [Tree(str(target))],
        folder=state,
        log=log,
        stall=60,
        keep_fds=(),
        report=report,
    )
    loop = Loop(incoming)
    trees = Trees(
        cast("Remote", loop),
        [Tree(str(source))],
        command=rsync,
        words=words,
        options=options or Options(stall=60),
        report=report,
    )
    try:
        with trees:
            yield Copying(source, target, trees, loop, events)
    finally:
        for job in loop.jobs:
            job.over.wait(30)
        log.close()


def account(root: Path) -> dict[str, Any]:
    """Everything of a tree that a container can see, by path; names of one
    inode as the first of them."""
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    paths = [root, *sorted(root.rglob("*"))]
    for path in paths:
        st = path.lstat()
        name = str(path.relative_to(root))
        entry: list[Any] = [stat.filemode(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns]
        entry.append({a: os.getxattr(path, a, follow_symlinks=False) for a in _xattrs(path)})
        if stat.S_ISREG(st.st_mode):
            entry.append(hashlib.sha256(path.read_bytes()).hexdigest())
            entry.append(st.st_size)
        elif stat.S_ISLNK(st.st_mode):
            entry.append(os.readlink(path))
        elif not stat.S_ISDIR(st.st_mode):
            entry.append(st.st_rdev)
        if not stat.S_ISDIR(st.st_mode):
            entry.append(first.setdefault(st.st_ino, name))
        found[name] = entry
    return found


def _xattrs(path: Path) -> list[str]:
    return sorted(os.listxattr(path, follow_symlinks=False))
