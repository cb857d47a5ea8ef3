# SPDX-License-Identifier: Apache-2.0
"""`pyploop migrate`: checks the options, calls the API, and turns failures into the exit
codes of vzmigrate."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from pyploop.api.migrating import MigrationOptions, migrate, recover
from pyploop.cli import migrate_options
from pyploop.cli.migrate_options import MigrateOptions, parser  # noqa: F401 - as each command has one
from pyploop.errors import Interrupted, MigrateError, OpenError, PyploopError, VzExitCode, one_line
from pyploop.report import timings
from pyploop.report.events import JsonRenderer, Reporter, TextRenderer
from pyploop.report.timeline import chrome_trace
from pyploop.system import shared_folder


def run(args: list[str], level: int) -> int:
    o = migrate_options.parse(args)
    sys.setswitchinterval(0.0005)  # as the agent does
    with _reporter(o, level + o.verbose) as report:
        try:
            return _run(o, report)
        except MigrateError as e:
            report.failure(e)
            return e.exit_code
        except PyploopError as e:
            report.failure(e)
            return VzExitCode.COPY_FAILED
        except OSError as e:
            report.error(f"{e.filename or 'migrate'}: {e.strerror}; everything was undone")
            return VzExitCode.COPY_FAILED
        except Interrupted as e:
            what = "`--recover` goes on from there" if o.recover else "everything was undone"
            report.error(f"Interrupted by signal {e.signum}; {what}")
            raise


def _run(o: MigrateOptions, report: Reporter) -> int:
    if o.recover:
        failed = recover(o.container, runtime=o.runtime, config_file=o.config, reporter=report)
        for text in failed:
            report.error(f"not undone: {text}")
        return VzExitCode.DUMP_FAILED if failed else VzExitCode.OK
    result = migrate(o.host, o.container, options=_options(o), reporter=report)
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
            report.error(f"-t: cannot print the table: {e.strerror}; the container has moved")
    # The container has moved, but something is left on this host: not a full success.
    return VzExitCode.DUMP_FAILED if result.left_over else VzExitCode.OK


def _options(o: MigrateOptions) -> MigrationOptions:
    return MigrationOptions(
        live=o.live,
        runtime=o.runtime,
        config=o.config,
        check_only=o.check_only,
        explain=o.explain,
        remove_area=o.remove_area,
        keep_dst=o.keep_dst,
        skip_checks=o.nodeps,
        ssh_options=o.ssh,
        rsync_options=o.rsync,
        drop_exec=o.drop_exec,
        networks=o.networks,
        publish=o.publish,
        memory_rounds=o.pre_dumps,
        lazy_restore=o.lazy_restore,
        post_copy=o.post_copy,
        post_copy_timeout=o.post_copy_timeout,
        suspend_limit=o.suspend_limit,
        max_suspend=o.max_suspend,
        on_deadline=o.on_deadline,
        max_freeze=o.max_freeze,
        deadline=MigrationOptions.deadline if o.deadline is None else o.deadline,
        bandwidth=o.bwlimit,
        compress=o.compress,
        timeout=o.timeout,
    )


def _close(handle: TextIO, path: str) -> None:
    """A log that cannot be written does not make the migration fail."""
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
