# SPDX-License-Identifier: Apache-2.0
"""`pyploop copy`: checks the options, calls the API, and shows what happens.

The order of the checks is that of `ploop copy`, because its callers rely on it: options,
then the target (exit code 1) or the descriptors (38), then the source.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import stat
import sys
from collections.abc import Iterator
from typing import IO, Any

from pyploop.api.copying import Copy, CopyOptions, Done, run_here
from pyploop.cli.arguments import Parser
from pyploop.cli.copy_options import attached, parser
from pyploop.errors import (
    Interrupted,
    OpenError,
    ParameterError,
    PyploopError,
    ReadError,
    TooLargeError,
)
from pyploop.report.events import JsonRenderer, ProgressRenderer, Reporter, TextRenderer
from pyploop.report.timeline import Recorder, chrome_trace, frozen_parts
from pyploop.system import descriptors, shared_folder


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_intermixed_args(attached(args))
    _take_places(p, o)
    if o.source is None and o.target is None:
        print("Either -s or -d is required", file=sys.stderr)
        p.print_usage(sys.stderr)
        return ParameterError.exit_code
    if o.to_device and o.target is None:
        p.error("--to-device needs the device (-d)")
    if o.write != "auto" and o.target is None:
        p.error("--write is for the side that writes the target (-d)")
    if o.source is None and (o.receipt is not None or o.proof is not None):
        p.error("--receipt and --proof are for the side that reads the source (-s)")
    if not o.remote and (o.ssh or o.remote_pyploop != CopyOptions.remote_pyploop):
        p.error("--ssh and --remote-pyploop are for a SOURCE or TARGET on another host")
    if o.update and not (o.source and o.target):
        p.error("--update needs both SOURCE and TARGET: a pipe cannot tell what the target has")
    if o.keep_partial and not (o.source and o.target):
        p.error("--keep-partial needs both SOURCE and TARGET")
    for name in ("json", "trace"):
        _check_log(p, o, name)
    if o.readers is not None and not 0 <= o.readers <= 64:
        p.error("--readers must be 0 to 64")
    with _reporter(o, level) as report:
        try:
            if o.source is None:
                _receive(o, report)
            else:
                _send(o, report)
        except PyploopError as e:
            report.failure(e)
            return e.exit_code
        except OSError as e:
            # Failures without a class of their own: a device that was removed, for example.
            report.error(f"{e.filename or o.source or o.target}: {e.strerror}; no target was made")
            return ReadError.exit_code
        except MemoryError:
            report.error("out of memory; no target was made")
            return TooLargeError.exit_code
        except Interrupted as e:
            report.error(f"Interrupted by signal {e.signum}; {e.state}")
            raise
    return 0


def _take_places(p: Parser, o: argparse.Namespace) -> None:
    """SOURCE and TARGET stand for -s and -d, and may name another host."""
    o.remote = False
    if not o.places:
        return
    if len(o.places) != 2 or o.source is not None or o.target is not None:
        p.error("name both SOURCE and TARGET, and neither -s nor -d; or only those")
    if o.feedback is not None:
        p.error("-f is for a pipe, and SOURCE and TARGET are given")
    if (o.out, o.inp) != (1, 0):
        p.error("-o and -i are for a stream, and SOURCE and TARGET are given")
    o.source, o.target = o.places
    from pyploop.transport.place import host_of

    o.remote = bool(host_of(o.source) or host_of(o.target))
    if o.trace is not None and (host := host_of(o.source)):
        p.error(f"--trace is written where the source is: run this on {host}")
    try:
        o.ssh = [word for text in o.ssh for word in shlex.split(text)]
    except ValueError as e:
        p.error(f"--ssh: {e}")


def _check_log(p: Parser, o: argparse.Namespace, name: str) -> None:
    """--json and --trace replace their file, which must be neither source nor target."""
    log = getattr(o, name)
    if log is None or (name == "json" and log == "-"):
        return
    if os.path.exists(log) and stat.S_ISBLK(os.stat(log).st_mode):
        p.error(f"--{name}: {log} is a block device")
    for path, what in ((o.source, "source"), (o.target, "target")):
        if path is not None and os.path.realpath(path) == os.path.realpath(log):
            p.error(f"--{name}: {log} is the {what}")


def _receive(o: argparse.Namespace, report: Reporter) -> None:
    from pyploop.api.receiving import receive

    descriptors.check_input(o.inp, "-i")
    if o.feedback is not None:
        descriptors.check_stream(o.feedback, "-f")
    receive(
        o.target,
        o.inp,
        feedback=o.feedback,
        timeout=o.timeout,
        to_device=o.to_device,
        write=o.write,
        reporter=report,
    )


def _clear_stderr(o: argparse.Namespace) -> None:
    """If the stream or the feedback uses descriptor 2, move it to another one.  The user's
    commands would otherwise write their messages into it."""
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
    rate, group = o.throttle or (None, None)
    options = CopyOptions(
        tracker=o.tracker,
        read=o.read,
        mounts=o.mounts,
        unsafe_in_use=o.unsafe,
        stops=o.stops or (),
        resume=o.resume,
        before_thaw=o.before_thaw,
        max_freeze=o.max_freeze,
        deadline=o.deadline,
        on_deadline=o.on_deadline,
        freeze_limit=o.freeze_limit,
        throttle_rate=rate,
        throttle_cgroup=group,
        bandwidth=o.bwlimit,
        compress=o.compress,
        reserve=o.reserve,
        cluster=o.cluster,
        readers=o.readers,
        to_device=o.to_device,
        update=o.update,
        inplace=o.inplace,
        keep_partial=o.keep_partial,
        write=o.write,
        timeout=o.timeout,
        retry=o.retry,
        sync_wait=o.sync_wait,
        protocol=o.compat,
        ssh_options=o.ssh,
        remote_pyploop=o.remote_pyploop,
        proof=o.proof,
        receipt=o.receipt,
    )
    done = Done()
    try:
        if o.places:
            from pyploop.api import remote

            remote.run(o.source, o.target, options=options, report=report, done=done)
        else:
            target = _here(o.target) if local else o.out
            copying = Copy(
                _here(o.source), target, options=options, feedback=o.feedback, reporter=report
            )
            run_here(copying, done)
    finally:
        # Also after a failure, when it is needed most.
        if o.trace is not None and done.recorder is not None:
            _write_trace(o.trace, done.recorder, report)
    if o.times:
        _show_times(done.summary, report)


def _here(path: str) -> str | os.PathLike[str]:
    """-s and -d name files on this host, also with a colon."""
    if ":" not in path:
        return path
    from pyploop.transport.place import Here

    return Here(path)


def _write_trace(path: str, recorder: Recorder, report: Reporter) -> None:
    """A trace that cannot be written does not make the copy fail."""
    try:
        with shared_folder.open_log(path) as f:
            f.write(chrome_trace(recorder))
    except OSError as e:
        report.error(f"--trace {path}: {e.strerror}")
    except OpenError as e:
        report.error(f"--trace {e}")


def _show_times(summary: dict[str, Any], report: Reporter) -> None:
    parts = frozen_parts(summary["frozen"], summary["frozen_remote"])
    if not parts:
        return
    from pyploop.report import timings

    rows = [(name.capitalize(), seconds) for name, seconds in parts.items()]
    for line in timings.table(rows, sum(parts.values()), total_name="Total", decimals=4).split(
        "\n"
    ):
        report.note(line)
    if (predicted := summary["predicted"]) is not None:
        report.note(f"  {'Predicted':>20}: {predicted:6.4f} (until durable)")
    report.note(summary["largest_part"])


def _check_output(fd: int) -> None:
    mode = descriptors.check_open(fd, "-o").st_mode
    if not (stat.S_ISREG(mode) or descriptors.is_stream(fd)):
        raise ParameterError(f"-o {fd} must be a file, a pipe or a socket")


@contextlib.contextmanager
def _reporter(o: argparse.Namespace, level: int) -> Iterator[Reporter]:
    """A reporter that writes text to stdout and stderr, unless the stream or the feedback
    uses them."""
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
                raise ParameterError("--json -: stdout and stderr are both in use; use --json FILE")
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
    """A log that cannot be written does not make the copy fail."""
    with contextlib.suppress(OSError):
        handle.close()


def _usable(fd: int, stream: IO[str] | None, taken: set[int]) -> IO[str] | None:
    return None if fd in taken or stream is None else stream
