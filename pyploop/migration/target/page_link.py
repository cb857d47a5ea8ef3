# SPDX-License-Identifier: Apache-2.0
"""A later connection of a post-copy migration: it is handed over to the relay that already
runs on this host (runtimes/runc/page_relay.py; docs/internals/post-copy.md).

The source says PYPLOOP-PAGES instead of PYPLOOP-AGENT.  The answer is one line: `PAGES`, and
the relay's frames follow; `GONE STATE`: there is no relay any more, and what became of the
container's memory; `NO REASON`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from pyploop.errors import MigrateError, OpenError, one_line
from pyploop.migration.target import checks
from pyploop.runtimes import lazy_record
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.lazy_record import LazyRecord
from pyploop.runtimes.policy import Source
from pyploop.system import descriptors, private_folder

START_SECONDS = 20.0
"""For the relay to listen."""


def hand_over(host: HostConfig, source: Source, migration: str, rfd: int, wfd: int) -> None:
    """Returns when the relay does not need the connection any more."""
    try:
        checks.check_trust(host, source, "runc")
        relay = _relay(Path(host.state_dir), migration)
    except (MigrateError, OpenError) as e:
        _say(wfd, one_line(f"NO {e}")[:300])
        return
    if isinstance(relay, str):
        _say(wfd, f"GONE {relay}")
        return
    with relay:
        _say(wfd, "PAGES")
        with contextlib.suppress(OSError):
            socket.send_fds(relay, [b"+"], [rfd, wfd])
            os.close(rfd)
            os.close(wfd)
            relay.recv(1)


def _say(wfd: int, line: str) -> None:
    descriptors.write_all(wfd, line.encode() + b"\n", "cannot answer the source")


def _relay(folder: Path, migration: str) -> socket.socket | str:
    """The relay's socket; else what is recorded of the container's memory."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with private_folder.opened(folder) as where:
                # By way of the folder: a socket's path may have 107 bytes at most.
                found.connect(f"/proc/self/fd/{where}/{lazy_record.relay_name(migration)}")
            return found
        except OSError:
            found.close()
        record = next(
            (r for r in LazyRecord.all_in(folder) if r.fields.get("migration") == migration), None
        )
        if record is None:
            return "none"
        if not record.loading or time.monotonic() > deadline:
            return record.state
        time.sleep(0.05)
