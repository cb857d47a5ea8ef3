# SPDX-License-Identifier: Apache-2.0
"""How the steps of a migration are undone, by the process that made them or by a later
one: the kinds of journal entries, on both hosts.

Each can be repeated, and succeeds when there is nothing (left) to undo.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from pyploop.errors import DeviceControlError, MigrateError, PyploopError, VzExitCode
from pyploop.runtimes import Runtime, config, lazy_record, page_record, volumes
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.found_config import with_container
from pyploop.runtimes.registry import make_runtime
from pyploop.system import beneath, kernel, mount_table, private_folder, removal
from pyploop.undo import journal
from pyploop.undo.journal import Entry, Journal


def _place(entry: Entry) -> contextlib.AbstractContextManager[beneath.Place]:
    """The place of the entry's `path`.  `root`: the folder above it whose contents came from
    the source."""
    return beneath.place(str(entry["path"]), str(entry.get("root") or ""))


def _remove(entry: Entry) -> None:
    with contextlib.suppress(FileNotFoundError), _place(entry) as at:
        beneath.remove(at)


def _rmdir(entry: Entry) -> None:
    # A folder that is not empty has files that are not ours, and stays.
    with contextlib.suppress(OSError), _place(entry) as at:
        os.rmdir(at.name, dir_fd=at.dir_fd)


def _remove_tree(entry: Entry) -> None:
    # A CRIU that was killed leaves the cgroup hierarchies mounted in its folder.
    path = str(entry["path"])
    if not private_folder.is_ours(Path(path)):
        return  # another user has taken the name, so this folder was never made
    for point in mount_table.mount_points_below(path):
        kernel.umount(point, lazy=True)
    removal.remove_tree(path)


def _put_back(entry: Entry) -> None:
    with contextlib.suppress(FileNotFoundError), _place(entry) as at:
        saved = os.path.basename(entry["saved"])
        os.replace(saved, at.name, src_dir_fd=at.dir_fd, dst_dir_fd=at.dir_fd)


def config_of(fields: Entry, host: HostConfig) -> HostConfig:
    """The configuration that a journal's record names.  MigrateError(1) when it has changed
    since: its commands undo the steps, and those of today may undo something else.  A
    changed one is used when it is this run's own (`host`, of `--config`)."""
    named = fields.get("config")
    own = _load(named)
    if own.path == host.path:
        return host
    if own.digest != fields.get("config_digest"):
        raise MigrateError(
            VzExitCode.USAGE,
            f"{named or config.DEFAULT} is not what it was when the migration of "
            f"{fields.get('container')} began, so nothing was undone; `pyploop migrate --recover "
            f"--config {named or config.DEFAULT}` undoes it with the file as it is now",
            path=named or config.DEFAULT,
        )
    return own


def _load(named: str | None) -> HostConfig:
    if named is not None and not os.path.isabs(named):
        raise MigrateError(
            VzExitCode.USAGE,
            f"a journal names its configuration {named!r}, which is not an absolute path, so any "
            "user could have made that file; nothing was undone; write the absolute path into "
            "the journal",
        )
    return config.load(named)


def runtime_of(entry: Entry) -> Runtime:
    """The runtime that an entry or a journal's record names."""
    host, name = _load(entry["config"]), entry["container"]
    if entry.get("found"):
        host = with_container(host, name, entry["found"])
    runtime = make_runtime(host, entry["runtime"], name)
    if instance := entry.get("instance"):
        runtime.instance = dict(instance)
    return runtime


def naming(host: HostConfig, runtime: Runtime) -> dict[str, Any]:
    """The fields that `runtime_of` reads."""
    named: dict[str, Any] = {
        "config": host.path,
        "config_digest": host.digest,
        "runtime": runtime.name,
        "container": runtime.container,
    }
    if runtime.instance:
        named["instance"] = runtime.instance
    found = host.found.get(runtime.container)
    return {**named, "found": found} if found else named


def runs(runtime: Runtime) -> bool:
    """Whether the container's processes run, and are not suspended."""
    state = runtime.state()
    return state.running and not state.suspended


journal.register("remove", _remove, outlives_boot=True)
journal.register("put-back", _put_back, outlives_boot=True)
journal.register("rmdir", _rmdir, outlives_boot=True)
journal.register("remove-tree", _remove_tree, outlives_boot=True)
journal.register("unmount", volumes.unmount)
journal.register("lazy-guard", lazy_record.stop_entry, outlives_boot=True)
journal.register("page-server", page_record.stop_entry)
journal.register("resume", lambda e: runtime_of(e).resume())
journal.register("start", lambda e: runtime_of(e).start())
journal.register("abandon", lambda e: runtime_of(e).abandon())


def make_folders(log: Journal, path: Path, mode: int, root: str = "") -> None:
    """Make a folder and those above it.  Each has an undo step.  root: what is below it came
    from the source."""
    if root and str(path) != root:
        make_folders(log, Path(root), mode)
        parts = beneath.parts_of(root, str(path))
        for n in range(1, len(parts) + 1):
            inner = "/".join((root, *parts[:n]))
            with beneath.place(inner, root) as at:
                if not beneath.exists(at):
                    log.add({"kind": "rmdir", "path": inner, "root": root})
                    os.mkdir(at.name, mode, dir_fd=at.dir_fd)
        return
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        log.add({"kind": "rmdir", "path": str(folder)})
        folder.mkdir(mode)


def note_done(log: Journal, entry: Entry) -> None:
    """Note in the journal that the entry is undone.  When that cannot be written (its file
    system is full), the next steps are undone all the same: each may be repeated."""
    with contextlib.suppress(DeviceControlError):
        log.done(entry)


_WORDS = {
    "remove": "removing {path}",
    "put-back": "putting the original file back to {path}",
    "rmdir": "removing the folder {path}",
    "remove-tree": "removing the folder {path}",
    "unmount": "unmounting {mount}",
    "page-server": "ending the page server",
    "resume": "resuming container {container}",
    "start": "starting container {container}",
    "abandon": "removing what was restored of container {container}",
    "copied": "removing the copy of {what}, {path}",
    "tree": "removing the copied directory tree {path}",
}


def described(entry: Entry) -> str:
    """What undoing the entry does, for a person."""
    words = _WORDS.get(str(entry["kind"]))
    try:
        return words.format(**entry) if words else journal.describe(entry)
    except KeyError:  # an older pyploop's entry
        return journal.describe(entry)


def undo_all(log: Journal, keep: bool = False, over: bool = True) -> list[str]:
    """Undo the journal's entries, the last one first.  Returns what could not be undone; that
    stays in the journal.  keep: keep copied data instead of removing them (--keep-dst).
    over: remove the journal when it is empty."""
    failed = []
    for entry in reversed(log.entries):
        try:
            if keep:
                journal.keep_or_undo(log, entry)
            else:
                journal.undo(entry)
        except (OSError, PyploopError) as e:
            why = str(e) if isinstance(e, PyploopError) else e.strerror
            failed.append(f"{described(entry)}: {why}")
            continue
        note_done(log, entry)
    if over:
        log.close()
    return failed
