# SPDX-License-Identifier: Apache-2.0
"""The record of a lazy restore: STATE_DIR/RUNTIME-CONTAINER.lazy, one for each container.

The agent makes it before it starts the guard (runtimes/runc/lazy_guard.py), which says in it
how the daemon is doing, and how it has ended.  It stays, so that a later process knows, until
the container moves away or the next lazy restore (docs/internals/lazy-restore.md).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from pyploop.errors import BusyError
from pyploop.runtimes.memory_record import POLL, MemoryRecord
from pyploop.system import kernel, mount_table, private_folder, removal
from pyploop.undo.journal import Entry

PREPARED, LOADING, COMPLETE, LOST = "prepared", "loading", "complete", "lost"
"""States: the container does not run yet; its memory comes while it runs; all of it is
there; the daemon died before that, and the container's processes were ended."""
ENDING = 10.0
"""Seconds for a guard and a daemon to end that were killed."""


def relay_name(migration: str) -> str:
    """The socket of a post-copy's relay, in the folder of the records."""
    return f"{migration}.relay"


class LazyRecord(MemoryRecord):
    """One, as it was when it was read.  Its processes are the `guard` and the `daemon`."""

    SCHEMA, SUFFIX, OF, FIRST = "pyploop.lazy/1", ".lazy", "a lazy restore", PREPARED

    @property
    def runtime(self) -> str:
        return str(self.fields.get("runtime", "?"))

    @property
    def images(self) -> Path:
        """The folder of its memory images, and of CRIU's work."""
        return Path(str(self.fields.get("images", "/nonexistent")))

    @property
    def busy(self) -> bool:
        """The images are in use: one of its processes lives."""
        return bool(self.process("daemon") or self.process("guard"))

    @property
    def loading(self) -> bool:
        """Of a container that runs: not all of its memory is there."""
        return self.busy and self.state in (PREPARED, LOADING)

    @property
    def seconds(self) -> float | None:
        """From the restore until all memory was there, or lost."""
        ended, since = self.fields.get("ended"), self.fields.get("since")
        return None if ended is None or since is None else max(0.0, float(ended) - float(since))

    def loaded(self) -> int:
        """Bytes that the daemon has read so far; 0 when that is not known."""
        with contextlib.suppress(OSError, ValueError):  # of a process that answers the daemon
            return int((self.images / "lazy-work" / "progress").read_text())
        pid = self.process("daemon")
        try:
            text = Path(f"/proc/{pid}/io").read_text()
        except OSError:
            return 0
        return max(0, int(text.split()[1]) - int(self.fields.get("read") or 0))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        if self.fields.get("post_copy") and (migration := self.fields.get("migration")):
            # Left by a relay that was killed.
            (self.path.parent / relay_name(str(migration))).unlink(missing_ok=True)

    def stop(self) -> None:
        """Of a container that does not run: end its processes, and forget it.  BusyError
        when they do not end."""
        for which in ("guard", "daemon"):
            if pid := self.process(which):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + ENDING
        while self.busy:
            if time.monotonic() > deadline:
                raise BusyError(f"the processes of {self.path} do not end")
            time.sleep(POLL)
        self.remove()

    def forget(self) -> None:
        """Remove it with its images.  BusyError while they are in use."""
        if self.busy:
            raise BusyError(f"the memory of {self.container} is still being loaded")
        if self.fields.get("images") and private_folder.is_ours(self.images):
            # A CRIU that was killed leaves the cgroup hierarchies mounted in its folder.
            for point in mount_table.mount_points_below(str(self.images)):
                kernel.umount(point, lazy=True)
            removal.remove_tree(str(self.images))
        self.remove()


def wait_loaded(path: Path, seconds: float) -> LazyRecord | None:
    """Until all memory of the container is there, or lost; the record then, None when there
    is none.  BusyError after so many seconds."""
    deadline = time.monotonic() + seconds
    while (record := LazyRecord.read(path)) and record.loading:
        if time.monotonic() > deadline:
            raise BusyError(
                f"the memory of {record.container} is still being loaded (process "
                f"{record.process('daemon')}); `pyploop status {record.container}` says how much "
                "of it is to come"
            )
        time.sleep(POLL)
    return record


def stop_entry(entry: Entry) -> None:
    """Undo the journal's entry of kind `lazy-guard`: the container does not run."""
    if record := LazyRecord.read(Path(entry["record"])):
        record.stop()


def in_use(entry: Entry) -> bool:
    """Whether the images that a journal's entry of kind `lazy-guard` names belong to the
    guard by now, which removes them, or to a person, since the container is lost."""
    record = LazyRecord.read(Path(entry["record"]))
    return record is not None and (record.busy or record.state == LOST)
