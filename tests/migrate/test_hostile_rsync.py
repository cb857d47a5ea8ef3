# SPDX-License-Identifier: Apache-2.0
"""rsync's server for a tree, and a client of it that no rsync is."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import anyrsync
import pytest
import support
from anyrsync import Client

from pyploop.errors import MigrateError
from pyploop.migration import rsync
from pyploop.migration.target.incoming_trees import IncomingTrees
from pyploop.report.events import Reporter
from pyploop.runtimes import Tree
from pyploop.system.jobs import Job
from pyploop.undo.journal import Journal

Server = tuple[IncomingTrees, Job[None], Path, Callable[[], Client]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Of one pass: what has started it, what waits for its end, its folder, a client."""
    support.needs("root", "rsync")
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    log = Journal.create("test", folder)
    ours, theirs = socket.socketpair()
    incoming = IncomingTrees(
        "rsync",
        [Tree(str(tmp_path / "target"))],
        folder=folder,
        log=log,
        stall=60,
        keep_fds=(),
        report=Reporter(),
    )
    _, job = incoming.take(0, theirs.detach(), last=True)
    made: list[Client] = []

    def client() -> Client:
        made.append(Client(ours))
        return made[0]

    job.start()
    yield incoming, job, folder, client
    for one in made:
        one.close()
    ours.close()
    job.join(30)
    log.close()


@pytest.mark.parametrize("kind", [anyrsync.INFO, anyrsync.WARNING, anyrsync.ERROR])
def test_what_a_client_has_the_server_say_without_end_is_kept_nowhere(
    server: Server, kind: int
) -> None:
    """It went into a log, on a tmpfs: 40 MB each second of the target's memory."""
    incoming, job, folder, connect = server
    client = connect()
    for _ in range(4000):
        client.say(kind, b"rsync: evil " + b"x" * 1000 + b"\n")
    assert sum(p.stat().st_size for p in folder.rglob("*")) < 64 << 10
    client.close()
    job.join(30)
    with pytest.raises(MigrateError, match=r"ended with status [0-9]+: .*rsync error") as e:
        incoming.check_whole()
    assert len(str(e.value)) < 4096


def test_a_server_has_an_eighth_of_the_memory_at_most_and_is_what_is_ended_for_want_of_it(
    server: Server,
) -> None:
    """It keeps the list of files that its client sends, which may have no end."""
    _, _, folder, connect = server
    connect()
    (pid,) = servers(folder)
    most = max(1 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    assert resource.prlimit(pid, resource.RLIMIT_DATA) == (most, most)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rsync, "LEAST_MEMORY", 64 << 20)
    monkeypatch.setattr(rsync, "MEMORY_PART", 1 << 20)


def test_names_without_end_end_the_server(little_memory: None, server: Server) -> None:
    """A list of files is in memory, 60 bytes and its name for each."""
    incoming, job, _, connect = server
    client = connect()
    with contextlib.suppress(OSError):
        for n in range(4000):
            names = [b"%08x" % (200 * n + m) + b"n" * 200 for m in range(200)]
            client.say(0, b"".join(anyrsync.entry(name) for name in names))
    client.close()
    job.join(30)
    with pytest.raises(MigrateError, match=r"ended with status 22: .*memory"):
        incoming.check_whole()


def test_a_server_that_is_killed_leaves_nobody_who_writes(server: Server) -> None:
    """Its receiver went on with what the client sends, after the next pass, too."""
    incoming, job, folder, connect = server
    connect().send_list(b"name")
    support.wait_until(lambda: len(servers(folder)) == 2, "no receiver")
    first = min(servers(folder), key=lambda pid: pid in children_of(servers(folder)))
    os.kill(first, signal.SIGKILL)
    job.join(30)
    assert servers(folder) == []
    with pytest.raises(MigrateError, match="ended with status -9"):
        incoming.check_whole()


def servers(folder: Path) -> list[int]:
    """Of this folder's passes."""
    processes = [p for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [int(p.name) for p in processes if f"--config={folder}/".encode() in cmdline(p)]


def children_of(pids: list[int]) -> set[int]:
    texts = [Path(f"/proc/{p}/task/{p}/children").read_text() for p in pids]
    return {int(word) for text in texts for word in text.split()}


def cmdline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
