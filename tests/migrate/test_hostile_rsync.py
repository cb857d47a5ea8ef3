# SPDX-License-Identifier: Apache-2.0
"""rsync's server for a tree, and a client of it that no rsync is."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import anyrsync
import pytest
import support
from anyrsync import Client

from pyploop.errors import MigrateError
from pyploop.migration.target.incoming_trees import LandingTrees
from pyploop.report.events import Reporter
from pyploop.runtimes import Tree
from pyploop.system.jobs import Job
from pyploop.undo.journal import Journal

Server = tuple[LandingTrees, Job[None], Path, Callable[[], Client]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Of one pass: what has started it, what waits for its end, its folder, a client."""
    support.needs("root", "rsync")
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    log = Journal.create("test", folder)
    ours, theirs = socket.socketpair()
    landing = LandingTrees(
        "rsync",
        [Tree(str(tmp_path / "target"))],
        folder=folder,
        log=log,
        stall=60,
        keep_fds=(),
        report=Reporter(),
    )
    _, job = landing.take(0, theirs.detach(), last=True)
    made: list[Client] = []

    def client() -> Client:
        made.append(Client(ours))
        return made[0]

    job.start()
    yield landing, job, folder, client
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
    landing, job, folder, connect = server
    client = connect()
    for _ in range(4000):
        client.say(kind, b"rsync: evil " + b"x" * 1000 + b"\n")
    assert sum(p.stat().st_size for p in folder.rglob("*")) < 64 << 10
    client.close()
    job.join(30)
    with pytest.raises(MigrateError, match=r"rsync ended with [0-9]+ here: .*rsync error") as e:
        landing.check_whole()
    assert len(str(e.value)) < 4096


def test_a_server_has_half_of_the_memory_at_most_and_is_what_is_ended_for_want_of_it(
    server: Server,
) -> None:
    """It keeps the list of files that its client sends, which may have no end."""
    _, _, folder, connect = server
    connect()
    (pid,) = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and f"--config={folder}/".encode() in cmdline(p)
    ]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert resource.prlimit(pid, resource.RLIMIT_AS) == (total // 2, total // 2)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"


def cmdline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
