# SPDX-License-Identifier: Apache-2.0
"""Migrations to this host that have ended.  Those that succeeded are completed here, and
those whose agent was killed are settled."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pyploop.errors import BusyError, MigrateError, VzExitCode
from pyploop.migration import commit_record, deadlines, undo_kinds
from pyploop.runtimes import Runtime, lazy_record
from pyploop.runtimes.config import HostConfig
from pyploop.system import beneath
from pyploop.undo import journal
from pyploop.undo.journal import Journal


def settle(host: HostConfig, migration: str) -> dict[str, Any]:
    """Settle a migration to this host, and answer what became of it.  {"verdict":
    "committed"}: the container runs here.  "aborted": nothing of it is left here.
    BusyError while another process may still decide."""
    folder = Path(host.state_dir)
    with commit_record.locked(folder, migration, deadlines.SETTLE_WAIT) as record:
        if record is None:
            return {"verdict": commit_record.ABORTED, "failed": []}
        logs = [r for r in journal.records(folder) if r.fields.get("migration") == migration]
        log = next((r for r in logs if r.fields.get("side") == "target"), None)
        if log is not None:
            undo_kinds.config_of(log.fields, host)
        word = record.read()
        if word == commit_record.RAN or (
            word == commit_record.COMMITTED and (log is None or _runs(log))
        ):
            failed = complete(log.adopt(), undo_kinds.runtime_of(log.fields)) if log else []
            return {"verdict": commit_record.COMMITTED, "failed": failed}
        # Committed and not running: the agent was killed before the container could run.
        failed = undo_kinds.undo_all(log.adopt(), bool(log.fields.get("keep"))) if log else []
        record.write(commit_record.ABORTED)
        if not failed:
            record.path.unlink(missing_ok=True)
        return {"verdict": commit_record.ABORTED, "failed": failed}


def _runs(log: journal.Record) -> bool:
    return undo_kinds.runs(undo_kinds.runtime_of(log.fields))


def settle_dead(host: HostConfig, runtime: Runtime) -> None:
    """Settle the migrations of this container whose agent was killed, and about which the
    source has not asked since.  MigrateError(20) when one cannot be settled."""
    folder = Path(host.state_dir)
    ours = (runtime.name, runtime.container)
    for log in journal.records(folder):
        fields = log.fields
        if ours != tuple(fields.get(k) for k in ("runtime", "container")):
            continue
        if log.owner() is not None:
            raise MigrateError(
                VzExitCode.LOCKED,
                f"{log.what} is under way (process {log.owner()})",
                hint="wait for that process to end",
            )
        if fields.get("side") == "source":
            # If it were finished later, that would end the container that comes now.
            raise MigrateError(
                VzExitCode.LOCKED,
                f"the {log.what}, which this host began, is not finished",
                path=str(log.path),
                hint="run `pyploop migrate --recover` on this host first",
            )
        try:
            failed = settle(host, commit_record.check_id(fields.get("migration")))["failed"]
        except BusyError as e:
            raise MigrateError(VzExitCode.LOCKED, str(e), path=e.path, hint=e.hint) from e
        if failed:
            raise MigrateError(
                VzExitCode.LOCKED,
                f"an earlier {log.what} could not be rolled back: {'; '.join(failed)}",
                path=str(log.path),
                hint="remove the cause on this host, and migrate again",
            )


def complete(log: Journal, runtime: Runtime) -> list[str]:
    """Undo only what the migration needed on its way, and forget the other undo steps.  The source
    removes its files after this.  Returns what failed, in words."""
    failed: list[str] = []
    try:
        failed += runtime.settled()
    except OSError as e:
        failed.append(f"{e.filename}: what has come may not be on the disk yet: {e.strerror}")
    guarded = {
        e["images"] for e in log.entries if e["kind"] == "lazy-guard" and lazy_record.in_use(e)
    }
    for entry in log.entries:
        if entry["kind"] == "put-back":
            root = str(entry.get("root") or "")
            with contextlib.suppress(FileNotFoundError), beneath.place(entry["saved"], root) as at:
                beneath.remove(at)
        if entry["kind"] == "copied":
            Path(entry["kept"]).unlink(missing_ok=True)  # a resumable file that was not used
        if not entry.get("transient") or entry.get("path") in guarded:
            undo_kinds.note_done(log, entry)
    return failed + undo_kinds.undo_all(log)
