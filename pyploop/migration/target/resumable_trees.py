# SPDX-License-Identifier: Apache-2.0
"""Directory trees that a failed migration to this host has left with --keep-dst.

A kept tree lies beside its place, under a name of its own.  One record for each container
(STATE_DIR/RUNTIME-CONTAINER.kept-trees) lists them.  While a migration uses a tree, its
journal lists it instead.

Invariant: no content of a kept tree is trusted.  The source's first pass compares all of
it by contents.  Only after that may a pass compare times.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence

from pyploop.errors import PyploopError
from pyploop.migration import tree_scan
from pyploop.migration.target.resumable_record import RecordKind
from pyploop.report.events import Reporter
from pyploop.runtimes import tree_folders
from pyploop.runtimes.volumes import KEPT, existing_parent
from pyploop.system.tree_walk import walk
from pyploop.undo import journal
from pyploop.undo.journal import Entry, Journal

RECORD = RecordKind(
    "pyploop.kept-trees/1", ".kept-trees", "trees", "index", int, ("migration", "source")
)


def entry_for(log: Journal, index: int, path: str) -> Entry:
    """The journal's entry for a tree that is about to come, before any folder is made.
    `made`: the tree's folder did not exist before."""
    name = f".{log.get('container')}-{log.get('migration')}-tree{index}{KEPT}"
    made = not os.path.isdir(path)
    home = existing_parent(path)
    return {"kind": "tree", "path": path, "kept": str(home / name), "index": index, "made": made}


def undo(entry: Entry) -> None:
    """Undo an entry of kind `tree`."""
    for name in ("path", "kept"):
        tree_folders.remove_contents(str(entry[name]))
        if name == "kept" or entry["made"]:
            with contextlib.suppress(OSError):
                os.rmdir(entry[name])


def retain(log: Journal, entry: Entry) -> None:
    """Instead of undoing the entry: move the tree aside, and record it.  It is removed if that
    fails."""
    path, kept = str(entry["path"]), str(entry["kept"])
    try:
        if os.path.isdir(path) and any(os.scandir(path)):
            # Its new folder may be one that everybody can enter, and it may contain
            # set-user-ID programs.  rsync sets its own owner and mode again.
            os.chown(path, 0, 0)
            os.chmod(path, 0o700)
            os.rename(path, kept)
            if not entry["made"]:
                os.mkdir(path)
        inode = os.lstat(kept).st_ino
        RECORD.add(log, {"index": entry["index"], "path": kept, "inode": inode})
    except OSError:  # a mount point, for instance
        undo(entry)


journal.register("tree", undo, keep=retain, outlives_boot=True)


# ---- the next migration


def allocated(
    state_dir: str, runtime: str, container: str, source: dict[str, str]
) -> dict[int, int]:
    """Bytes of the trees that are kept for this source, by index.  They need no new room."""
    record = RECORD.read(RECORD.file(state_dir, runtime, container))
    found: dict[int, int] = {}
    if record is not None and record["source"]["id"] == source["id"]:
        for tree in record["trees"]:
            with contextlib.suppress(OSError, PyploopError):
                found[tree["index"]] = tree_scan.check_source(tree["path"])
    return found


def adopt(
    log: Journal, entries: Sequence[Entry], make_parent: Callable[[str], None], report: Reporter
) -> set[int]:
    """Move the kept trees to their places.  From now on they are in this journal.  Returns
    their indexes.  Trees that cannot be used are removed.  entries: of all trees.
    make_parent: makes the missing folders above a path."""
    file = RECORD.file_of(log)
    record = RECORD.read(file)
    taken: set[int] = set()
    for kept in record["trees"] if record is not None else ():
        index, old = kept["index"], kept["path"]
        try:
            if os.lstat(old).st_ino != kept["inode"]:
                report.note(f"{old} is another folder now, so the whole tree is copied again")
                continue
        except OSError:
            continue
        ours = record is not None and record["source"]["id"] == log.get("source")["id"]
        if ours and index < len(entries) and _move(log, entries[index], old, make_parent):
            _part(str(entries[index]["path"]))
            taken.add(index)
        else:
            report.note(f"{old} cannot be used, so it is removed and the tree is copied again")
            with contextlib.suppress(OSError):
                undo({"path": old, "kept": old, "made": True})
    file.unlink(missing_ok=True)
    return taken


def _move(log: Journal, entry: Entry, old: str, make_parent: Callable[[str], None]) -> bool:
    path = str(entry["path"])
    try:
        make_parent(path)
        log.add({**entry, "kept": old})  # where it lies until it is moved
        if not entry["made"]:
            os.rmdir(path)
        try:
            os.rename(old, path)
        except OSError:
            if not entry["made"]:
                os.mkdir(path)
            raise
    except OSError:
        return False
    log.add(entry)
    return True


def _part(path: str) -> None:
    """Leave each file only one name.  The first pass links the names again that are one file
    at the source now.  A name that has become another file there would otherwise stay a
    name of this one."""
    for _, fd, entries in walk(path):
        for entry in entries:
            with contextlib.suppress(OSError):
                st = os.lstat(entry.name, dir_fd=fd)
                if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
                    os.unlink(entry.name, dir_fd=fd)


def described(log: Journal) -> list[str]:
    """The trees that are kept now, for a message."""
    record = RECORD.read(RECORD.file_of(log))
    if record is None or record["migration"] != log.get("migration"):
        return []
    return [f"tree {tree['index']}" for tree in record["trees"]]
