# SPDX-License-Identifier: Apache-2.0
"""Recovery: what a killed migration left at its source is rolled back or finished, as its
target decides (`pyploop migrate --recover`, and before each new migration)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyploop.errors import BusyError, MigrateError, PyploopError, VzExitCode
from pyploop.migration import commit_record, deadlines, locks, undo_kinds
from pyploop.migration.source.agent_client import Remote
from pyploop.report.events import Reporter
from pyploop.runtimes import Copied, Runtime, page_record
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.copied import ANY_DEVICE
from pyploop.runtimes.page_record import PageRecord
from pyploop.system import kernel
from pyploop.undo import journal
from pyploop.undo.journal import Journal, Record

COPYING, ASKED, SERVING, MOVED = "copying", "asked", "serving", "moved"
"""Stages of a source's record.  COPYING: the target was not asked to restore.  ASKED: it
was asked, and its answer is not known.  SERVING: the container runs there, and what is here
is the server of its pages, and nothing else.  MOVED: the container runs there."""


def finish_source(log: Journal, runtime: Runtime, remove: bool, *, stopped: bool) -> list[str]:
    """End the container here, because it runs on the target.  Returns what failed, in words;
    the record then stays, MOVED, for another recovery.  stopped: the container must not
    run here any more.  If it does, it was started since, and is left alone."""
    failed = []
    for entry in log.entries:
        if entry["kind"] in ("resume", "start", "page-server"):
            undo_kinds.note_done(log, entry)
    try:
        if stopped and undo_kinds.runs(runtime):
            raise MigrateError(
                VzExitCode.LOCKED,
                f"{runtime.container} runs here, although it has moved to {log.get('host')}. Stop "
                "it, and `pyploop migrate --recover` will remove it from this host. To keep it, "
                f"remove {log.path}",
            )
        runtime.kill()
        runtime.discard(remove, _copied(log))
    except (OSError, PyploopError) as e:
        failed.append(f"removing the container from the source: {e}")
    return failed + undo_kinds.undo_all(log, over=not failed)


def _copied(log: Journal) -> Copied | None:
    """What the migration has copied.  None: the record was written by an older pyploop."""
    known: Copied | None = log.get("copied")
    if known is not None and log.get("boot") != kernel.boot_id():
        return {path: [ANY_DEVICE, *rest] for path, (_, *rest) in known.items()}
    return known


def settled(
    host: HostConfig,
    log: Journal,
    cause: object,
    report: Reporter,
    patience: float = deadlines.ATTEMPTS,
) -> bool:
    """Whether the target has committed.  It is asked through a new connection.
    MigrateError(4) when it cannot be asked within `patience` seconds; the container then
    stays suspended, or stopped."""
    deadline = time.monotonic() + patience
    while True:
        try:
            answer = ask(host, log)
            break
        except PyploopError as e:
            if time.monotonic() + deadlines.RETRY > deadline:
                live = any(entry["kind"] == "resume" for entry in log.entries)
                how = "suspended" if live else "stopped"
                raise MigrateError(
                    VzExitCode.CANNOT_CONNECT,
                    f"{cause}; {log.get('host')} cannot be asked whether the container runs there "
                    f"({e}); it stays {how} here",
                    hint="run `pyploop migrate --recover` when the target can be reached again",
                ) from e
            time.sleep(deadlines.RETRY)
    _log_failed(answer, log, report)
    return bool(answer.get("verdict") == commit_record.COMMITTED)


def ask(host: HostConfig, log: Journal) -> dict[str, Any]:
    """Ask the target through a new connection what became of the migration.  It also undoes
    or finishes what a killed agent left there."""
    with Remote(log.get("host"), host.ssh, log.get("ssh_options") or [], host.agent) as remote:
        return remote.call("settle", deadlines.SETTLING, migration=log.get("migration"))


def _tidy(host: HostConfig, log: Journal, report: Reporter, moved: bool) -> None:
    """Let the target clean up.  moved: the container runs there.  If not, the target has
    cleaned up by itself, unless its agent was killed, too.  When the target cannot be
    asked, nothing is lost: it is already decided which host runs the container."""
    try:
        if moved:
            forget(host, log)
        else:
            _log_failed(ask(host, log), log, report)
    except PyploopError as e:
        report.note(f"Files of the migration may be left on {log.get('host')}: {e}")


def _log_failed(answer: dict[str, Any], log: Journal, report: Reporter) -> None:
    for text in answer.get("failed", []):
        report.error(f"{log.get('host')}: not undone: {text}")


def forget(host: HostConfig, log: Journal) -> None:
    """Tell the target that its commit record is not needed any more."""
    with Remote(log.get("host"), host.ssh, log.get("ssh_options") or [], host.agent) as remote:
        remote.call("forget", deadlines.SETTLING, migration=log.get("migration"))


def recover(
    host: HostConfig, container: str | None, report: Reporter, locked: bool = False
) -> list[str]:
    """Settle the migrations from this host whose orchestrator is dead, of one container or
    of all.  Returns what could not be undone.  locked: the caller has that container's
    lock.  When the target of a migration cannot be asked, the others are settled all the
    same, and the last such failure is raised at the end."""
    folder = Path(host.state_dir)
    failed: list[str] = []
    found = False
    doubt: PyploopError | None = None
    for record in _quick_first(journal.records(folder, report.error)):
        fields = record.fields
        if fields.get("side") != "source" or container not in (None, fields.get("container")):
            continue
        found = True
        if record.owner() is not None:
            if container is None:
                continue
            raise MigrateError(
                VzExitCode.LOCKED,
                f"{record.what} is under way (process {record.owner()})",
                hint="wait for that process to end",
            )
        try:
            undo_kinds.config_of(fields, host)
        except PyploopError as e:
            failed.append(str(e))
            continue
        try:
            with contextlib.ExitStack() as stack:
                if not locked:
                    runtime = undo_kinds.runtime_of(fields)
                    stack.enter_context(lock(host, runtime))
                failed += _one(host, record.adopt(), report)
        except PyploopError as e:
            if container is not None:
                raise
            # Other containers must not stay suspended because of this one.
            if doubt is not None:
                report.error(str(doubt))
            doubt = e
    if not locked:
        if container is not None and not found:
            report.note(f"There is no unfinished migration of {container} from this host")
        # A process that was killed early has left a lock and no record.
        locks.remove_dead(Path(host.lock_dir))
    if doubt is not None:
        for text in failed:
            report.error(f"not undone: {text}")
        raise doubt
    return failed


def _quick_first(found: list[Record]) -> list[Record]:
    """Put those last whose target must be asked before anything is done."""
    return sorted(found, key=lambda record: record.fields.get("stage") == ASKED)


@contextlib.contextmanager
def lock(host: HostConfig, runtime: Runtime) -> Iterator[None]:
    """Take the container's lock, and one of the host's places for migrations.
    MigrateError(20) when another process has the lock, or no place is free."""
    try:
        with (
            locks.host_slot(Path(host.lock_dir), host.migrations, 0),
            locks.container_lock(Path(runtime.lock_dir), runtime.container),
        ):
            yield
    except BusyError as e:
        raise MigrateError(VzExitCode.LOCKED, str(e), path=e.path, hint=e.hint) from e


def _page_server(log: Journal) -> PageRecord | None:
    """Of a post-copy migration."""
    for entry in log.entries:
        if entry["kind"] == "page-server":
            return PageRecord.read(Path(entry["record"]))
    return None


def _one(host: HostConfig, log: Journal, report: Reporter) -> list[str]:
    what = f"{log.get('what')}"
    names = {k: log.get(k) for k in ("config", "config_digest", "runtime", "container", "instance")}
    own = undo_kinds.config_of(names, host)
    migration = commit_record.check_id(log.get("migration"))
    serving = _page_server(log)
    if serving is not None and serving.at_work:
        if log.get("stage") == ASKED and settled(own, log, what, report, patience=0):
            log.set(stage=SERVING)
        if log.get("stage") in (SERVING, MOVED):
            report.note(
                f"This host serves the memory of {serving.container} for {log.get('host')}, where "
                f"it runs: {serving.in_words} (process {serving.keeper}). It ends by itself"
            )
            return []
        serving.stop()  # it holds the lock
    try:
        with commit_record.locked(
            Path(host.state_dir), migration, deadlines.DUMP_WAIT, "source"
        ) as lock:
            stage = log.get("stage")
            moved = stage in (MOVED, SERVING)
            if stage == ASKED:
                moved = settled(own, log, what, report, patience=0)
            if moved:
                log.set(stage=MOVED)
                report.note(f"Finished: {what}; the container runs on the target")
                runtime = undo_kinds.runtime_of(names)
                runtime.keep_fds = (lock.fd,) if lock is not None else ()
                remove = bool(log.get("remove_area"))
                if serving is not None:
                    if lost := serving.state != page_record.COMPLETE:
                        report.error(f"not all memory came to {log.get('host')}: {serving.why}")
                    remove &= not lost
                failed = finish_source(log, runtime, remove, stopped=True)
            else:
                report.note(f"Rolled back: {what}; the container is on this host")
                failed = undo_kinds.undo_all(log)
            # Before the target is asked, because that may take long, or be interrupted.
            if serving is not None and not failed:
                serving.path.unlink(missing_ok=True)
            if lock is not None and not failed:
                lock.path.unlink(missing_ok=True)
            if moved or stage == COPYING:
                _tidy(own, log, report, moved)
            return failed
    except BusyError as e:
        raise MigrateError(VzExitCode.LOCKED, str(e), path=e.path, hint=e.hint) from e
