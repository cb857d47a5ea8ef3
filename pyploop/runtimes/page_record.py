# SPDX-License-Identifier: Apache-2.0
"""The record of a page server: STATE_DIR/RUNTIME-CONTAINER.pages, on the source of a
post-copy migration (docs/internals/post-copy.md).

The orchestrator makes it before it starts the keeper (runtimes/runc/page_keeper.py), which
says in it how much the target has, and how it ended.  It goes when the source is tidied.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop.errors import BusyError, OpenError
from pyploop.system import kernel, private_folder
from pyploop.undo import journal
from pyploop.undo.journal import Entry

SCHEMA = "pyploop.pages/1"
SUFFIX = ".pages"
CONNECTING, SERVING, COMPLETE, LOST = "connecting", "serving", "complete", "lost"
"""States: the container is not dumped yet; the target loads its pages from here; it has all
of them; it will never have them."""
POLL = 0.05
STOPPING = 240.0
"""Seconds for a dump that is under way to end."""


def path_of(state_dir: str | Path, runtime: str, container: str) -> Path:
    return Path(state_dir) / f"{runtime}-{container}{SUFFIX}"


@dataclass(frozen=True)
class PageRecord:
    """One, as it was when it was read."""

    path: Path
    fields: dict[str, Any]

    @classmethod
    def create(cls, path: Path, **fields: Any) -> PageRecord:
        record = {**fields, "schema": SCHEMA, "boot": kernel.boot_id(), "state": CONNECTING}
        record["started"] = time.time()
        with private_folder.reopened(path.parent) as folder:
            private_folder.replace(folder, path.name, json.dumps(record).encode())
        return cls(path, record)

    @property
    def state(self) -> str:
        return str(self.fields.get("state", CONNECTING))

    @property
    def why(self) -> str:
        return str(self.fields.get("why", ""))

    @property
    def container(self) -> str:
        return str(self.fields.get("container", "?"))

    @property
    def keeper(self) -> int:
        """PID of the keeper; 0: it has ended."""
        known = self.fields.get("keeper")
        if self.fields.get("boot") != kernel.boot_id() or not isinstance(known, dict):
            return 0
        pid = int(known.get("pid") or 0)
        return pid if pid and journal.start_time(pid) == known.get("start") else 0

    @property
    def at_work(self) -> bool:
        """The target may still need this host."""
        return bool(self.keeper) and self.state in (CONNECTING, SERVING)

    @property
    def sent(self) -> int:
        """Bytes of pages that the target has."""
        return int(self.fields.get("sent") or 0)

    @property
    def in_words(self) -> str:
        total = int(self.fields.get("total") or 0)
        of = f" of up to {total >> 20} MiB" if total else ""
        return f"{self.sent >> 20} MiB{of} are on {self.fields.get('host', 'the target')}"

    def stop(self) -> None:
        """Before the commit: end the page server.  The container stays suspended.  BusyError
        when it does not end."""
        if pid := self.keeper:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + STOPPING
        while self.keeper:
            if time.monotonic() > deadline:
                raise BusyError(f"the page server of {self.container} does not end")
            time.sleep(POLL)
        self.path.unlink(missing_ok=True)


def read(path: Path) -> PageRecord | None:
    """None when there is none.  OpenError when it is not this user's alone."""
    try:
        fields = json.loads(private_folder.read_path(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise OpenError(f"cannot read {path}: {e}") from e
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise OpenError(f"{path} is not a record of a page server")
    return PageRecord(path, fields)


def all_in(state_dir: str | Path) -> Iterator[PageRecord]:
    """OpenError when one cannot be read."""
    for path in sorted(Path(state_dir).glob(f"*{SUFFIX}")):
        if record := read(path):
            yield record


def stop_entry(entry: Entry) -> None:
    """Undo the journal's entry of kind `page-server`: the target has not committed."""
    if record := read(Path(entry["record"])):
        record.stop()
