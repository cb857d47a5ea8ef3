# SPDX-License-Identifier: Apache-2.0
"""The record of a page server: STATE_DIR/RUNTIME-CONTAINER.pages, on the source of a
post-copy migration (docs/internals/post-copy.md).

The orchestrator makes it before it starts the keeper (runtimes/runc/page_keeper.py), which
says in it how much the target has, and how it ended.  It goes when the source is tidied.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from pyploop.errors import BusyError
from pyploop.runtimes.memory_record import POLL, MemoryRecord
from pyploop.undo.journal import Entry

CONNECTING, SERVING, COMPLETE, LOST = "connecting", "serving", "complete", "lost"
"""States: the container is not dumped yet; the target loads its pages from here; it has all
of them; it will never have them."""
STOPPING = 240.0
"""Seconds for a dump that is under way to end."""


class PageRecord(MemoryRecord):
    """One, as it was when it was read."""

    SCHEMA, SUFFIX, OF, FIRST = "pyploop.pages/1", ".pages", "a page server", CONNECTING

    @property
    def keeper(self) -> int:
        """PID of the keeper; 0: it has ended."""
        return self.process("keeper")

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


def stop_entry(entry: Entry) -> None:
    """Undo the journal's entry of kind `page-server`: the target has not committed."""
    if record := PageRecord.read(Path(entry["record"])):
        record.stop()
