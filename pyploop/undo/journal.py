# SPDX-License-Identifier: Apache-2.0
"""The steps that must be undone, on disk, for a later process.

Each copy or migration has one JSON file in /run/pyploop (0700; docs/internals/freeze.md has the
format).  It is written before each step, and removed when nothing is left to undo.  While
its owner lives, only the owner undoes it.  After that `pyploop thaw` replays it in reverse
order.

    journal = Journal.create("copy of /dev/loop0")
    entry = journal.add({"kind": "write", "path": …, "value": …})   # then act
    journal.done(entry)                                              # undone
    journal.close()

An entry is a dict with a `kind`.  For each kind a function that undoes it is registered:

    journal.register("remote file", undo, outlives_boot=True)
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop.errors import BusyError, DeviceControlError, OpenError, PyploopError
from pyploop.system import kernel, private_folder

SCHEMA = "pyploop.journal/1"
"""The `schema` field of each file.  The number changes when a field changes its meaning."""
ENVIRONMENT = "PYPLOOP_RUN"
"""This environment variable names another folder for the journals."""

Entry = dict[str, Any]
Ignored = Callable[[str], None]


@dataclass(frozen=True)
class Kind:
    """How one kind of entry is undone: `undo` raises OSError or PyploopError.
    outlives_boot: the step is still in effect after a reboot.  keep: puts what was made
    aside for a later process, instead of undoing it."""

    undo: Callable[[Entry], None]
    outlives_boot: bool
    keep: Callable[[Journal, Entry], None] | None


_kinds: dict[str, Kind] = {}


def register(
    kind: str,
    undo: Callable[[Entry], None],
    *,
    outlives_boot: bool = False,
    keep: Callable[[Journal, Entry], None] | None = None,
) -> None:
    """Set how `Record.replay` undoes entries of this kind, or keeps what they made."""
    _kinds[kind] = Kind(undo, outlives_boot, keep)


def folder() -> Path:
    """Where journals are: /run/pyploop for root, else below XDG_RUNTIME_DIR.
    OpenError when this user has no such place."""
    if given := os.environ.get(ENVIRONMENT):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/pyploop")
    if own := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(own) / "pyploop"
    raise OpenError(
        "no folder for undo journals: this user is not root, and XDG_RUNTIME_DIR is not set "
        f"(set {ENVIRONMENT} to a folder)"
    )


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot (field 22 of proc_pid_stat(5));
    None: it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:  # the program's name is any bytes
            fields = f.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in b"ZX" else int(fields[19])


def _save(path: Path, record: dict[str, Any]) -> None:
    with private_folder.reopened(path.parent) as where:
        private_folder.replace(where, path.name, json.dumps(record).encode())


class Journal:
    """The journal of one copy or migration of this process."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self._record = record
        self._entries: list[Entry] = record["entries"]

    @classmethod
    def create(cls, what: str, where: Path | None = None, **fields: Any) -> Journal:
        """`what`: a description for `pyploop thaw --list`.  `fields`: more fields of the
        record, which only the caller reads.  OpenError when no file can be made there."""
        where = where or folder()
        try:
            with private_folder.opened(where, make=True, private=True) as fd:
                path = where / _claim(fd)
        except OSError as e:
            raise OpenError.of(
                f"cannot write an undo journal in {where}", e, path=str(where)
            ) from e
        record = {
            **fields,
            "schema": SCHEMA,
            "what": what,
            "boot": kernel.boot_id(),
            "started": round(time.time(), 3),
            "owners": [_identity(os.getpid())],
            "entries": [],
        }
        journal = cls(path, record)
        try:
            journal.save()
        except DeviceControlError as e:
            journal.clear()
            raise OpenError(str(e)) from e
        return journal

    @property
    def id(self) -> str:
        return self.path.stem

    def save(self) -> None:
        try:
            _save(self.path, self._record)
        except OSError as e:
            raise DeviceControlError.of(f"cannot write the undo journal {self.path}", e) from e

    def set_owners(self, *pids: int) -> None:
        """Set the processes that own the journal.  No other undoes it while one of them
        lives."""
        self._record["owners"] = [_identity(pid) for pid in pids]
        self.save()

    def get(self, field: str) -> Any:
        return self._record.get(field)

    def set(self, **fields: Any) -> None:
        """Set more fields of the record, which only the caller reads."""
        self._record.update(fields)
        self.save()

    def add(self, entry: Entry) -> Entry:
        """Call it before the step.  Returns the entry, for `done`."""
        self._entries.append(entry)
        self.save()
        return entry

    def done(self, entry: Entry) -> None:
        """The step is undone, or another process has taken it over."""
        self._entries[:] = [e for e in self._entries if e is not entry]
        self.save()

    @property
    def entries(self) -> list[Entry]:
        return list(self._entries)

    def clear(self) -> None:
        """Remove the file with all its entries."""
        self._entries.clear()
        self.close()

    def close(self) -> None:
        """Remove the file, unless an entry is left."""
        if not self._entries:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _claim(where: int) -> str:
    """A new empty file of this process: PID.json, PID-2.json and so on."""
    number = 1
    while True:
        name = f"{os.getpid()}.json" if number == 1 else f"{os.getpid()}-{number}.json"
        with contextlib.suppress(FileExistsError):
            os.close(private_folder.create(where, name))
            return name
        number += 1


def _identity(pid: int) -> dict[str, int]:
    return {"pid": pid, "start": start_time(pid) or 0}


@dataclass
class Record:
    """A journal as found by another process."""

    path: Path
    fields: dict[str, Any]

    @property
    def id(self) -> str:
        return self.path.stem

    @property
    def what(self) -> str:
        return str(self.fields.get("what", "?"))

    @property
    def entries(self) -> list[Entry]:
        return list(self.fields.get("entries", []))

    @property
    def of_this_boot(self) -> bool:
        return bool(self.fields.get("boot") == kernel.boot_id())

    def owner(self) -> int | None:
        """The PID of an owner that lives; None when all have ended."""
        if self.of_this_boot:
            for owner in self.fields.get("owners", []):
                if start_time(owner["pid"]) == owner["start"]:
                    return int(owner["pid"])
        return None

    def _check_unowned(self, but: int = 0) -> None:
        pid = self.owner()
        if pid not in (None, but):
            raise BusyError(
                f"journal {self.id} belongs to process {pid}, which is running and undoes it itself"
            )

    def adopt(self) -> Journal:
        """Make this process the owner.  BusyError when another owner lives."""
        self._check_unowned(but=os.getpid())
        journal = Journal(self.path, self.fields)
        journal.set_owners(os.getpid())
        return journal

    def replay(self) -> list[str]:
        """Undo all entries in reverse order.  Those that fail stay, and are returned as texts.
        BusyError when an owner lives."""
        self._check_unowned()
        failed: list[str] = []
        left: list[Entry] = []
        for entry in reversed(self.entries):
            try:
                self._undo(entry)
            except (OSError, PyploopError) as e:
                why = e.with_hint() if isinstance(e, PyploopError) else e.strerror
                failed.append(f"{describe(entry)}: {why}")
                left.insert(0, entry)
        if left:
            self.fields["entries"] = left
            _save(self.path, self.fields)
        else:
            self.path.unlink(missing_ok=True)
        return failed

    def forget(self) -> None:
        """Remove the file with all its entries.  BusyError when an owner lives."""
        self._check_unowned()
        self.path.unlink(missing_ok=True)

    def _undo(self, entry: Entry) -> None:
        kind = _kind(entry)
        if self.of_this_boot or kind.outlives_boot:
            kind.undo(entry)


def _kind(entry: Entry) -> Kind:
    kind = _kinds.get(entry["kind"])
    if kind is None:
        raise DeviceControlError(
            f"this pyploop cannot undo entries of kind {entry['kind']!r}",
            hint="use the version of pyploop that made the journal",
        )
    return kind


def undo(entry: Entry) -> None:
    """Undo one entry now, as `Record.replay` would."""
    _kind(entry).undo(entry)


def keep_or_undo(log: Journal, entry: Entry) -> None:
    """Put aside what the entry made, if its kind can do that; else undo it."""
    kind = _kind(entry)
    if kind.keep is not None:
        kind.keep(log, entry)
    else:
        kind.undo(entry)


def describe(entry: Entry) -> str:
    """A description of the entry: its `what`, else its kind."""
    return str(entry.get("what") or entry["kind"])


def records(where: Path | None = None, ignored: Ignored = lambda _: None) -> list[Record]:
    """All journals, the oldest first.  OpenError when the folder belongs to another user, or
    others can write to it.  Files that cannot be read, or belong to other users, are left
    out.  `ignored` is called with a text for each of the latter."""
    where = where or folder()
    found = []
    with (
        _unreadable(where),
        contextlib.suppress(FileNotFoundError),
        private_folder.opened(where) as fd,
    ):
        for name in os.listdir(fd):
            if not name.endswith(".json"):
                continue
            try:
                fields = json.loads(private_folder.read(fd, name))
            except OpenError as e:
                ignored(f"{where}: {e}")
                continue
            except (OSError, ValueError):
                continue
            if isinstance(fields, dict) and fields.get("schema") == SCHEMA:
                found.append(Record(where / name, fields))
    return sorted(found, key=lambda r: (r.fields.get("started", 0), r.id))


@contextlib.contextmanager
def _unreadable(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OpenError.of(f"cannot read the undo journals in {where}", e) from e


@contextlib.contextmanager
def replaying(where: Path | None = None) -> Iterator[None]:
    """Hold the lock for replays.  BusyError when another process holds it."""
    where = where or folder()
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(private_folder.opened(where))
            stack.enter_context(private_folder.alone(fd, wait=False))
        except FileNotFoundError:
            pass  # no journals either
        except BlockingIOError:
            raise BusyError("another `pyploop thaw` is running") from None
        except OSError as e:
            raise OpenError.of(f"cannot read the undo journals in {where}", e) from e
        yield
