# SPDX-License-Identifier: Apache-2.0
"""The record of a lazy restore: STATE_DIR/RUNTIME-CONTAINER.lazy, one for each container.

The agent makes it before it starts the guard (runtimes/runc/lazy_guard.py), which says in it
how the daemon is doing, and how it has ended.  It stays, so that a later process knows, until
the container moves away or the next lazy restore (docs/internals/lazy-restore.md).
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
from pyploop.system import kernel, mount_table, private_folder, removal
from pyploop.undo import journal
from pyploop.undo.journal import Entry

SCHEMA = "pyploop.lazy/1"
SUFFIX = ".lazy"
PREPARED, LOADING, COMPLETE, LOST = "prepared", "loading", "complete", "lost"
"""States: the container does not run yet; its memory comes while it runs; all of it is
there; the daemon died before that, and the container's processes were ended."""
POLL = 0.05
ENDING = 10.0
"""Seconds for a guard and a daemon to end that were killed."""


def path_of(state_dir: str | Path, runtime: str, container: str) -> Path:
    return Path(state_dir) / f"{runtime}-{container}{SUFFIX}"


def relay_name(migration: str) -> str:
    """The socket of a post-copy's relay, in the folder of the records."""
    return f"{migration}.relay"


@dataclass(frozen=True)
class LazyRecord:
    """One, as it was when it was read."""

    path: Path
    fields: dict[str, Any]

    @classmethod
    def create(cls, path: Path, **fields: Any) -> LazyRecord:
        """A new one, in place of an older one; the guard completes it."""
        record = {**fields, "schema": SCHEMA, "boot": kernel.boot_id(), "state": PREPARED}
        record["started"] = time.time()
        with private_folder.reopened(path.parent) as folder:
            private_folder.replace(folder, path.name, json.dumps(record).encode())
        return cls(path, record)

    @property
    def container(self) -> str:
        return str(self.fields.get("container", "?"))

    @property
    def runtime(self) -> str:
        return str(self.fields.get("runtime", "?"))

    @property
    def images(self) -> Path:
        """The folder of its memory images, and of CRIU's work."""
        return Path(str(self.fields.get("images", "/nonexistent")))

    @property
    def why(self) -> str:
        """How the daemon has died; else empty."""
        return str(self.fields.get("why", ""))

    @property
    def state(self) -> str:
        return str(self.fields.get("state", PREPARED))

    @property
    def of_this_boot(self) -> bool:
        return bool(self.fields.get("boot") == kernel.boot_id())

    def process(self, which: str) -> int:
        """PID of the `guard` or the `daemon`, 0 when it has ended."""
        known = self.fields.get(which)
        if not self.of_this_boot or not isinstance(known, dict):
            return 0
        pid = int(known.get("pid") or 0)
        return pid if pid and journal.start_time(pid) == known.get("start") else 0

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
        if self.fields.get("post_copy"):  # its relay counts
            try:
                return int((self.images / "lazy-work" / "progress").read_text())
            except (OSError, ValueError):
                return 0
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


def read(path: Path) -> LazyRecord | None:
    """None when there is none.  OpenError when it is not this user's alone."""
    try:
        fields = json.loads(private_folder.read_path(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise OpenError(f"cannot read {path}: {e}") from e
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise OpenError(f"{path} is not a record of a lazy restore")
    return LazyRecord(path, fields)


def all_in(state_dir: str | Path) -> Iterator[LazyRecord]:
    """OpenError when one cannot be read."""
    for path in sorted(Path(state_dir).glob(f"*{SUFFIX}")):
        if record := read(path):
            yield record


def wait_loaded(path: Path, seconds: float) -> LazyRecord | None:
    """Until all memory of the container is there, or lost; the record then, None when there
    is none.  BusyError after so many seconds."""
    deadline = time.monotonic() + seconds
    while (record := read(path)) and record.loading:
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
    if record := read(Path(entry["record"])):
        record.stop()


def in_use(entry: Entry) -> bool:
    """Whether the images that a journal's entry of kind `lazy-guard` names belong to the
    guard by now, which removes them, or to a person, since the container is lost."""
    record = read(Path(entry["record"]))
    return record is not None and (record.busy or record.state == LOST)
