# SPDX-License-Identifier: Apache-2.0
"""`pyploop migrate`: vzmigrate's exit codes for what happens."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from pyploop.cli import migrate_options
from pyploop.cli.migrate_options import MigrateOptions, parser  # noqa: F401 - as each command has one
from pyploop.diskcopy.freeze_policy import Policy
from pyploop.diskcopy.options import Options
from pyploop.errors import Interrupted, MigrateError, OpenError, PyploopError, VzExitCode, one_line
from pyploop.migration import rsync_options
from pyploop.migration.source import recover
from pyploop.migration.source.orchestrator import Result, Wish, migrate
from pyploop.report import timings
from pyploop.report.events import JsonRenderer, Reporter, TextRenderer
from pyploop.report.timeline import chrome_trace
from pyploop.runtimes import config
from pyploop.runtimes.config import CTID
from pyploop.runtimes.registry import make_runtime
from pyploop.system import shared_folder


def run(args: list[str], level: int) -> int:
    o = migrate_options.parse(args)
    sys.setswitchinterval(0.0005)  # as the agent does
    with _reporter(o, level + o.verbose) as report:
        try:
            return _run(o, report)
        except MigrateError as e:
            report.error(str(e))
            return e.exit_code
        except PyploopError as e:
            report.error(str(e))
            return VzExitCode.COPY_FAILED
        except OSError as e:
            report.error(f"{e.filename or 'migrate'}: {e.strerror}; undone")
            return VzExitCode.COPY_FAILED
        except Interrupted as e:
            what = "`--recover` goes on from there" if o.recover else "everything was undone"
            report.error(f"Interrupted by signal {e.signum}; {what}")
            raise


def _run(o: MigrateOptions, report: Reporter) -> int:
    host = config.load(o.config)
    if o.recover:
        failed = recover.recover(host, _recovered(host, o), report)
        for text in failed:
            report.error(f"not undone: {text}")
        return VzExitCode.DUMP_FAILED if failed else 0
    wish = _wish(o)
    runtime = make_runtime(host, o.runtime, o.container)
    with recover.lock(host, runtime):
        if failed := recover.recover(host, runtime.container, report, locked=True):
            raise MigrateError(
                VzExitCode.LOCKED, f"an earlier migration is not undone: {'; '.join(failed)}"
            )
        result = migrate(host, runtime, wish, report)
    if o.trace is not None:
        try:
            with shared_folder.open_log(o.trace) as f:
                f.write(chrome_trace(result.recorder))
        except OSError as e:
            report.error(f"--trace {o.trace}: {e.strerror}")
        except OpenError as e:
            report.error(f"--trace {e}")
    if o.times and result.moments is not None:
        try:
            table = timings.table(result.moments.rows(), result.moments.total)
            print(table, file=sys.stderr if o.json == "-" else sys.stdout, flush=True)
        except OSError as e:
            report.error(f"-t: {e.strerror}; the container has moved")
    return _told(result)


def _recovered(host: config.HostConfig, o: MigrateOptions) -> str | None:
    """Whose migrations are to be settled, as the records name it; None: all."""
    if o.runtime == "vzctl" and o.container and not CTID.fullmatch(o.container):
        return make_runtime(host, o.runtime, o.container).container
    return o.container or None


def _told(result: Result) -> int:
    """The container moved; what is left over is not nothing."""
    return VzExitCode.DUMP_FAILED if result.failed else 0


def _wish(o: MigrateOptions) -> Wish:
    if o.max_freeze is not None and not o.live:
        raise MigrateError(VzExitCode.USAGE, "--max-freeze goes with --live")
    if o.suspend_limit is not None and not o.live:
        raise MigrateError(VzExitCode.USAGE, "--suspend-limit goes with --live")
    limit = Wish.suspend_limit if o.suspend_limit is None else o.suspend_limit
    return Wish(
        host=o.host,
        live=o.live,
        remove_area=o.remove_area,
        keep_dst=o.keep_dst,
        check_only=o.check_only,
        nodeps=o.nodeps,
        drop_exec=o.drop_exec,
        pre_dumps=o.pre_dumps,
        suspend_limit=limit,
        ssh_options=o.ssh,
        rsync_options=rsync_options.check_options(o.rsync),
        copy=Options(
            stall=o.timeout,
            rate=o.bwlimit,
            freeze_limit=limit,  # a disk is frozen while the container is suspended
            policy=Policy(
                max_freeze=o.max_freeze,
                deadline=Policy.deadline if o.deadline is None else o.deadline,
            ),
        ),
    )


def _close(handle: TextIO, path: str) -> None:
    """What cannot be written changes nothing of what became of the migration."""
    try:
        handle.close()
    except OSError as e:
        print(one_line(f"pyploop: --json {path}: {e.strerror}"), file=sys.stderr)


@contextlib.contextmanager
def _reporter(o: MigrateOptions, level: int) -> Iterator[Reporter]:
    report = Reporter()
    with contextlib.ExitStack() as files:
        files.callback(report.close)
        if o.json == "-":
            report.add(JsonRenderer(sys.stdout))
            report.add(TextRenderer(level, sys.stderr, sys.stderr))
        else:
            if o.json is not None:
                try:
                    handle = shared_folder.open_log(o.json)  # closed by _close
                except OSError as e:
                    raise MigrateError(VzExitCode.USAGE, f"--json {o.json}: {e.strerror}") from e
                except OpenError as e:
                    raise MigrateError(VzExitCode.USAGE, f"--json {e}") from e
                files.callback(_close, handle, o.json)
                report.add(JsonRenderer(handle))
            report.add(TextRenderer(level, sys.stdout, sys.stderr))
        yield report
