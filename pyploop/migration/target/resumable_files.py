# SPDX-License-Identifier: Apache-2.0
"""Resumable files: what a failed migration to this host has left with --keep-dst.  The next
migration of the same container from the same source goes on from them.

A resumable file has a name of its own, so that no program takes it for a disk.  One record
for each container (STATE_DIR/RUNTIME-CONTAINER.kept) lists them.  While a migration uses
them, its journal lists them instead.

Invariants: no content of such a file is trusted (digests.py), so it may be half-written,
old or damaged.  From `adopt` on no other process writes to it unnoticed: it has a lease,
which ends when another process opens it for writing.  A file that cannot be used is
removed, and reported.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop._core import fdatasync
from pyploop.errors import PyploopError
from pyploop.migration.target.resumable_record import RecordKind
from pyploop.migration.target.resumable_target import lease
from pyploop.report.events import Reporter
from pyploop.runtimes import Runtime
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.volumes import KEPT, existing_parent
from pyploop.system import beneath
from pyploop.undo import journal
from pyploop.undo.journal import Entry, Journal
from pyploop.units import MIB, format_size

RECORD = RecordKind(
    "pyploop.kept/1",
    ".kept",
    "files",
    "name",
    str,
    ("migration", "runtime", "container", "source"),
    most=64,
)
LEAST = MIB
"""Bytes.  A smaller file is not kept: sending it again costs less."""


class Unusable(Exception):
    """Why a resumable file is not used, in words."""


@dataclass
class ResumableFile:
    """A file that is used, with a lease on it; its user closes it."""

    name: str
    """`disk N`, or a static file's label."""
    path: str
    fd: int


def new_path(folder: Path, container: str, migration: str, number: int) -> str:
    """A name for a file that may be kept.  No other file ever gets it."""
    return str(folder / f".{container}-{migration}-{number}{KEPT}")


def source_of(facts: dict[str, Any], known: str = "") -> dict[str, str]:
    """The identity that the source claims: its `id` and `name`.  known: the source as this
    host knows it.  It becomes a part of the `id`, so that no source gets the data of
    another one."""
    claimed = facts.get("source")
    claimed = claimed if isinstance(claimed, dict) else {}
    found = {key: str(claimed.get(key, ""))[:64] for key in ("id", "name")}
    if known:
        text = os.fsencode(f"{known}\0{found['id']}")
        found["id"] = hashlib.blake2b(text, digest_size=16).hexdigest()
    return found


# ---- after a failure: keeping


def retain(log: Journal, entry: Entry) -> None:
    """Instead of undoing an entry of kind `copied`: keep and record the file.  It is removed
    if it is too small, or cannot be kept."""
    path, kept = str(entry["path"]), str(entry["kept"])
    with contextlib.suppress(OSError):
        with (
            contextlib.suppress(FileNotFoundError),
            beneath.place(path, str(entry.get("root") or "")) as at,
        ):
            os.replace(at.name, kept, src_dir_fd=at.dir_fd)
        with _opened(kept) as fd:
            st = os.fstat(fd)
            if stat.S_ISREG(st.st_mode) and st.st_blocks * 512 >= LEAST:
                os.fchmod(fd, 0o600)  # other users may enter the folder that it lies in
                # The kernel reports a failed writeback only once, and perhaps now.
                fdatasync(fd)
                part = {"name": str(entry["what"]), "path": kept, "inode": st.st_ino}
                if RECORD.add(log, part):
                    return
    remove(entry)


def remove(entry: Entry) -> None:
    """Undo an entry of kind `copied`."""
    for key, root in (("path", str(entry.get("root") or "")), ("kept", "")):
        with contextlib.suppress(FileNotFoundError), beneath.place(str(entry[key]), root) as at:
            beneath.remove(at)


journal.register("copied", remove, keep=retain, outlives_boot=True)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    # O_NONBLOCK: a FIFO in its place must not block us.
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


# ---- the next migration: taking


def allocated(host: HostConfig, runtime: Runtime, facts: dict[str, Any]) -> dict[str, int]:
    """Bytes on the disk of each file that is kept for this source.  They need no new room."""
    record = RECORD.read(RECORD.file(host.state_dir, runtime.name, runtime.container))
    found: dict[str, int] = {}
    if record is not None and record["source"]["id"] == source_of(facts)["id"]:
        for f in record["files"]:
            with contextlib.suppress(OSError):
                found[f["name"]] = os.lstat(f["path"]).st_blocks * 512
    return found


def adopt(
    host: HostConfig, runtime: Runtime, log: Journal, homes: Collection[Path], report: Reporter
) -> dict[str, ResumableFile]:
    """Take over the kept files.  From now on they are in this journal.  homes: the folders
    in which files are kept now."""
    file = RECORD.file(host.state_dir, runtime.name, runtime.container)
    record = _claim(file, report)
    usable: dict[str, ResumableFile] = {}
    for f in record["files"] if record is not None else ():
        try:
            _of_this_source(record, log)
            path = _destination(runtime, f["name"])
            # The file stays where it is until it is used.
            log.add({"kind": "copied", "what": f["name"], "path": f["path"], "kept": f["path"]})
            usable[f["name"]] = ResumableFile(f["name"], f["path"], _take(f, path))
        except Unusable as e:
            report.note(
                f"The kept file of {f['name']} is not used, and all of it is copied again: {e}"
            )
            _drop(f)
    for home in homes:
        _sweep(home, runtime.container, file.parent)
    return usable


def _claim(file: Path, report: Reporter) -> dict[str, Any] | None:
    """Take the record, so that no other process can.  None: there is none."""
    record = RECORD.read(file)
    try:
        file.unlink()
    except FileNotFoundError:
        return None
    if record is None:
        report.note(f"{file} cannot be read, so all files are copied again")
    return record


def _of_this_source(record: dict[str, Any] | None, log: Journal) -> None:
    theirs, ours = (record or {}).get("source", {}), log.get("source")
    if theirs["id"] != ours["id"]:
        raise Unusable(f"it came from {theirs['name'] or 'another host'}, not from {ours['name']}")


def _destination(runtime: Runtime, name: str) -> str:
    disks = {f"disk {n}": disk.image for n, disk in enumerate(runtime.disks(source=False))}
    try:
        return disks[name] if name in disks else runtime.destination(name)
    except PyploopError as e:
        raise Unusable(str(e)) from e


def _take(f: dict[str, Any], destination: str) -> int:
    """Open the file and take a lease.  Unusable when it is not the file that was kept, or when
    others can write to it."""
    try:
        st = os.lstat(f["path"])
        if not stat.S_ISREG(st.st_mode) or st.st_ino != f["inode"]:
            raise Unusable(f"{f['path']} is another file now")
        if st.st_nlink != 1:
            raise Unusable(f"{f['path']} has a second name")
        if st.st_dev != os.stat(existing_parent(destination)).st_dev:
            raise Unusable(f"{f['path']} lies on another file system than {destination}")
        fd = os.open(f["path"], os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Unusable(f"{f['path']} is gone") from None
    except OSError as e:
        raise Unusable(f"{f['path']} cannot be opened: {e.strerror}") from e
    try:
        if os.fstat(fd).st_ino != f["inode"]:
            raise Unusable(f"{f['path']} is another file now")
        lease(fd)
    except OSError as e:
        os.close(fd)
        busy = e.errno in (errno.EAGAIN, errno.EACCES)
        why = "is in use by another process" if busy else f"cannot be leased ({e.strerror})"
        raise Unusable(f"{f['path']} {why}") from e
    except BaseException:
        os.close(fd)
        raise
    return fd


def _drop(f: dict[str, Any]) -> None:
    """Remove a file that is not used, unless another file has its name by now."""
    with contextlib.suppress(OSError):
        if os.lstat(f["path"]).st_ino == f["inode"]:
            os.unlink(f["path"])


def _sweep(home: Path, container: str, state_dir: Path) -> None:
    """Remove this container's files that no journal lists.  Their record was lost."""
    ours = re.compile(rf"\.{re.escape(container)}-[0-9a-f]{{16}}-[0-9]+{re.escape(KEPT)}")
    with contextlib.suppress(OSError):
        found = {str(p) for p in home.iterdir() if ours.fullmatch(p.name)}
        known = {e.get("kept") for r in journal.records(state_dir) for e in r.entries}
        for path in found - known:
            os.unlink(path)


def described(host: HostConfig, log: Journal) -> list[str]:
    """The files that are kept now, for a message."""
    record = RECORD.read(RECORD.file(host.state_dir, log.get("runtime"), log.get("container")))
    if record is None or record["migration"] != log.get("migration"):
        return []
    sizes = []
    for f in record["files"]:
        with contextlib.suppress(OSError):
            sizes.append(f"{f['name']} ({format_size(os.lstat(f['path']).st_blocks * 512)})")
    return sizes
