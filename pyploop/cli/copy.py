# SPDX-License-Identifier: Apache-2.0
"""`pyploop copy`: what its options ask for, done.

The order of the checks is ploop's, because callers probe for it: options,
then the target (1) or the descriptors (38), then the source.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import IO

from pyploop.cli.copy_options import (
    ANSWER_TIMEOUT,
    FREEZE_LIMIT,
    attached,
    parser,
)
from pyploop.diskcopy import separate_target
from pyploop.diskcopy.freeze_policy import Policy
from pyploop.diskcopy.options import Options
from pyploop.diskcopy.receiver import receive
from pyploop.diskcopy.sender import Sender
from pyploop.diskcopy.target_registry import open_output
from pyploop.disks import opening
from pyploop.errors import (
    Interrupted,
    OpenError,
    ParameterError,
    PyploopError,
    ReadError,
    TooLargeError,
)
from pyploop.freeze.throttle import Throttle
from pyploop.report import timings
from pyploop.report.events import JsonRenderer, ProgressRenderer, Reporter, TextRenderer
from pyploop.report.timeline import Recorder, chrome_trace
from pyploop.system import descriptors, shared_folder
from pyploop.trackers.registry import choose


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_args(attached(args))
    if o.source is None and o.target is None:
        print("Either -s or -d is required", file=sys.stderr)
        p.print_usage(sys.stderr)
        return ParameterError.exit_code
    if o.readers is not None and not 0 <= o.readers <= 64:
        p.error("--readers is 0 to 64")
    with _reporter(o, level) as report:
        try:
            if o.source is None:
                _receive(o, report)
            else:
                _send(o, report)
        except PyploopError as e:
            report.error(str(e))
            return e.exit_code
        except OSError as e:
            # A device that vanished under us, say: not foreseen one by one.
            report.error(f"{e.filename or o.source or o.target}: {e.strerror}; no target was made")
            return ReadError.exit_code
        except MemoryError:
            report.error("out of memory; no target was made")
            return TooLargeError.exit_code
        except Interrupted as e:
            report.error(f"Interrupted by signal {e.signum}; {e.state}")
            raise
    return 0


def _receive(o: argparse.Namespace, report: Reporter) -> None:
    descriptors.check_stream(o.inp, "-i")
    if o.feedback is not None:
        descriptors.check_stream(o.feedback, "-f")
    receive(o.target, o.inp, o.feedback, report, o.timeout)


def _clear_stderr(o: argparse.Namespace) -> None:
    """A stream or feedback on descriptor 2 moves elsewhere: commands that the
    user gave would write their messages into it."""
    moved = None
    for name in ("out", "feedback"):
        if getattr(o, name) == 2:
            moved = os.dup(2) if moved is None else moved
            setattr(o, name, moved)
    if moved is not None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)


def _send(o: argparse.Namespace, report: Reporter) -> None:
    local = o.target is not None
    if not local:
        _check_output(o.out)
        if o.feedback is not None:
            descriptors.check_stream(o.feedback, "-f")
        _clear_stderr(o)
    freeze_limit = o.freeze_limit
    if freeze_limit is None:
        freeze_limit = FREEZE_LIMIT if o.max_freeze is None else 2 * o.max_freeze + 1
    options = Options(
        stops=o.stops or (),
        resume=o.resume,
        before_thaw=o.before_thaw,
        stall=o.timeout,
        rate=o.bwlimit,
        readers=o.readers,
        freeze_limit=freeze_limit,
        reserve=o.reserve,
        throttle=None if o.throttle is None else Throttle(o.throttle[0], o.throttle[1], report),
        policy=Policy(max_freeze=o.max_freeze, deadline=o.deadline, on_deadline=o.on_deadline),
    )
    with (
        open_output(
            target=o.target,
            out_fd=o.out,
            feedback=None if local else o.feedback,
            report=report,
            sync_wait=o.sync_wait,
            answer_timeout=o.timeout or ANSWER_TIMEOUT,
            compat=o.compat,
        ) as out,
        contextlib.closing(
            opening.open_source(
                o.source,
                o.read,
                o.mounts,
                unsafe=o.unsafe,
                # Who gave us that output has it open, too: say what is wrong, not who.
                check=lambda source: separate_target.check_output(source, out.fd),
            )
        ) as source,
    ):
        tracker = choose(o.tracker, source, o.cluster)
        if o.compat == "ploop" and tracker.name == "ploop":
            # The C tool reads the driver's marks until there are none, once.
            options.policy = replace(options.policy, max_rounds=1, patience=0)
        sender = Sender(source, tracker, out, options, report)
        try:
            sender.run()
        finally:
            # Of a copy that failed, too: that is when one wants to see it.
            if o.trace is not None:
                _write_trace(o.trace, sender.recorder, report)
        if o.times:
            _tell_times(sender, report)


def _write_trace(path: str, recorder: Recorder, report: Reporter) -> None:
    """A trace that cannot be written does not spoil the copy."""
    try:
        with shared_folder.open_log(path) as f:
            f.write(chrome_trace(recorder))
    except OSError as e:
        report.error(f"--trace {path}: {e.strerror}")
    except OpenError as e:
        report.error(f"--trace {e}")


def _tell_times(sender: Sender, report: Reporter) -> None:
    summary, parts = sender.summary, sender.recorder.frozen_parts()
    if not parts:
        return
    rows = [(name.capitalize(), seconds) for name, seconds in parts.items()]
    for line in timings.table(rows, sum(parts.values()), total_name="Total", decimals=4).split(
        "\n"
    ):
        report.note(line)
    if summary.predicted is not None:
        report.note(f"  {'Predicted':>20}: {summary.predicted:6.4f} (until durable)")
    report.note(summary.largest_part)


def _check_output(fd: int) -> None:
    mode = descriptors.check_open(fd, "-o").st_mode
    if not (stat.S_ISREG(mode) or descriptors.is_stream(fd)):
        raise ParameterError(f"output descriptor {fd} must be a file, a pipe or a socket")


@contextlib.contextmanager
def _reporter(o: argparse.Namespace, level: int) -> Iterator[Reporter]:
    """Text to stdout and stderr, unless the stream or the feedback is there."""
    taken: set[int] = {o.feedback} if o.feedback is not None else set()
    if o.source is not None and o.target is None:
        taken.add(o.out)
    elif o.source is None:
        taken.add(o.inp)
    report = Reporter()
    if o.progress and 2 not in taken and os.isatty(2):
        # First, because it replaces sys.stderr and sys.stdout.
        text_on_stdout = 1 not in taken and o.json != "-" and os.isatty(1)
        report.add(ProgressRenderer(stdout_too=text_on_stdout))
    out = _usable(1, sys.stdout, taken)
    err = _usable(2, sys.stderr, taken)
    with contextlib.ExitStack() as files:
        files.callback(report.close)
        if o.json is None:
            report.add(TextRenderer(level, out or err, err))
        elif o.json == "-":
            to = out or err
            if to is None:
                raise ParameterError("--json: stdout and stderr are both taken; name a file")
            report.add(JsonRenderer(to))
            if to is not err:
                report.add(TextRenderer(level, None, err))
        else:
            try:
                handle = shared_folder.open_log(o.json)  # closed by _close
            except OSError as e:
                raise ParameterError.of(f"--json {o.json}", e) from e
            except OpenError as e:
                raise ParameterError(f"--json {e}") from e
            files.callback(_close, handle)
            report.add(JsonRenderer(handle))
            report.add(TextRenderer(level, out or err, err))
        yield report


def _close(handle: IO[str]) -> None:
    """A log that cannot be written does not spoil the copy."""
    with contextlib.suppress(OSError):
        handle.close()


def _usable(fd: int, stream: IO[str] | None, taken: set[int]) -> IO[str] | None:
    return None if fd in taken or stream is None else stream
