# SPDX-License-Identifier: Apache-2.0
"""Memory that is loaded after a migration: `memory_status`, `forget_memory`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyploop.runtimes import config, lazy_images, lazy_record
from pyploop.runtimes.lazy_record import LazyRecord
from pyploop.runtimes.page_record import PageRecord
from pyploop.runtimes.registry import make_runtime
from pyploop.units import MIB

MemoryState = Literal[
    "serving", "complete", "loading", "stuck", "unguarded", "unknown", "lost", "over"
]
STUCK = 2
"""So many times the bytes that were to be loaded: a daemon that has read more repeats itself."""
_SAYS: dict[MemoryState, str] = {
    "serving": "it runs on {host}, which loads its memory from this host (process {keeper})",
    "complete": "all of its memory is there",
    "loading": "its memory is being loaded while it runs",
    "stuck": "it runs, and gets its memory as it asks for it, but process {daemon} will not end by "
    "itself, because 2 GiB or more were given back at once: start the container again when you can",
    "unguarded": "its memory is being loaded, but the guard was killed: if process {daemon} is "
    "killed, too, what is missing by then will read as zeroes",
    "unknown": "the guard was killed, and the daemon has ended since: whether all of its memory "
    "had come by then is not known, and what had not reads as zeroes. To be safe, end it and start "
    "it again from its disk",
    "lost": "it was ended while its memory was being loaded: start it again from its disk",
    "over": "a restore that did not come to its end has left this behind",
}


@dataclass(frozen=True, kw_only=True)
class MemoryStatus:
    """Of one container."""

    container: str
    state: MemoryState
    """`serving`: it has moved to another host, which still loads its memory from this one.
    `complete`: also of a container whose memory was never loaded lazily.  `loading`: it
    depends on a process of this host.  `stuck`: the same, and that process repeats itself (see
    docs/internals/lazy-restore.md).  `unguarded`: the guard was killed.  `unknown`: the
    daemon has ended since, perhaps before all of it had come.  `lost`: the daemon has died, and
    the guard has ended the container.  `over`: of a restore that failed, or of another boot."""
    text: str
    """The same in words."""
    total: int | None
    """Bytes that are, or were, to be loaded; None: not known (any more)."""
    left: int | None
    """Bytes of these that are still to come, at most."""
    seconds: float | None
    """From the restore until all was there, or lost; None: not yet, or not known."""
    daemon: int
    """Process that loads the memory; 0: none."""
    guard: int
    """Process that guards it; 0: none."""
    images: str
    """Folder of the memory images that are still there; empty: none."""

    @property
    def exit_code(self) -> int:
        """Of `pyploop status`: 0 nothing to come, 2 being loaded, 3 something to do."""
        if self.state == "over" and not self.images:
            return 0
        return {"complete": 0, "loading": 2, "serving": 2}.get(self.state, 3)


def memory_status(
    container: str | None = None,
    *,
    config_file: str | None = None,
    state_dir: str | None = None,
) -> tuple[MemoryStatus, ...]:
    """How much of the memory of a container, or of all that came to this host by a lazy
    restore, is still to be loaded.  state_dir: in place of the configuration's.

    MigrateError: no such container in the configuration.  OpenError: a record cannot be read.
    """
    if container is None:
        folder = state_dir or config.load(config_file).state_dir
        here = tuple(_status(r) for r in LazyRecord.all_in(folder))
        return here + tuple(_serving(r) for r in PageRecord.all_in(folder) if r.at_work)
    if serving := _pages(container, config_file, state_dir):
        return (_serving(serving),)
    record = _record(container, config_file, state_dir)
    return (_status(record) if record else _none(container),)


def forget_memory(
    container: str, *, config_file: str | None = None, state_dir: str | None = None
) -> bool:
    """Remove the record of a lazy restore, and its images if they are still there.  False:
    there was none.  BusyError while a process uses them."""
    record = _record(container, config_file, state_dir)
    if record is not None:
        record.forget()
    return record is not None


def _record(container: str, config_file: str | None, state_dir: str | None) -> LazyRecord | None:
    if state_dir is not None:
        found = [r for r in LazyRecord.all_in(state_dir) if r.container == container]
        return found[0] if found else None
    host = config.load(config_file)
    runtime = make_runtime(host, None, container)
    return LazyRecord.read(LazyRecord.path_of(host.state_dir, runtime.name, runtime.container))


def _pages(container: str, config_file: str | None, state_dir: str | None) -> PageRecord | None:
    """Of a container whose memory another host is loading from this one."""
    folder = state_dir or config.load(config_file).state_dir
    for record in PageRecord.all_in(folder):
        if record.container == container and record.at_work:
            return record
    return None


def _serving(record: PageRecord) -> MemoryStatus:
    total = record.fields.get("total")
    return MemoryStatus(
        container=record.container,
        state="serving",
        text=_SAYS["serving"].format(host=record.fields.get("host"), keeper=record.keeper),
        total=total,
        left=max(0, total - record.sent) if isinstance(total, int) else None,
        seconds=None,
        daemon=0,
        guard=record.keeper,
        images="",
    )


def _none(container: str) -> MemoryStatus:
    return MemoryStatus(
        container=container,
        state="complete",
        text=_SAYS["complete"],
        total=None,
        left=0,
        seconds=None,
        daemon=0,
        guard=0,
        images="",
    )


def _state(record: LazyRecord, daemon: int, guard: int) -> MemoryState:
    if record.state == lazy_record.COMPLETE:
        return "complete"
    if not record.of_this_boot:
        return "over"
    if record.state == lazy_record.LOST:
        return "lost"
    if guard:
        return "loading"
    if daemon:
        return "unguarded"
    return "unknown" if record.state == lazy_record.LOADING else "over"


def _status(record: LazyRecord) -> MemoryStatus:
    daemon, guard = record.process("daemon"), record.process("guard")
    state = _state(record, daemon, guard)
    total = left = None
    images = str(record.images) if record.images.exists() else ""
    if images:
        total = lazy_images.lazy_bytes(record.images / "images")
        left = max(0, total - record.loaded()) if total is not None and daemon else total
    if state == "complete":
        left = 0
    if state == "loading" and total and record.loaded() > STUCK * total + MIB:
        state = "stuck"
    text = _SAYS[state].format(daemon=daemon)
    return MemoryStatus(
        container=record.container,
        state=state,
        text=f"{text} ({record.why})" if record.why else text,
        total=total,
        left=left,
        seconds=record.seconds,
        daemon=daemon,
        guard=guard,
        images=images,
    )
