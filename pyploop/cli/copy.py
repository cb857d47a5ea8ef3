# SPDX-License-Identifier: Apache-2.0
"""`pyploop copy`: the options of `ploop copy` 1.15, and long ones of our own.

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
from pathlib import Path
from typing import IO

from pyploop import device, times, transport
from pyploop.cli.arguments import Parser, parsed
from pyploop.cli.stops import StopAction
from pyploop.compat import COMPATS
from pyploop.errors import (
    Interrupted,
    ParameterError,
    PyploopError,
    ReadError,
    TooLargeError,
)
from pyploop.events import JsonRenderer, ProgressRenderer, Reporter, TextRenderer
from pyploop.outputs import open_output
from pyploop.receiver import receive
from pyploop.recorder import Recorder, chrome_trace
from pyploop.rounds import Policy
from pyploop.sender import Sender
from pyploop.summary import Options
from pyploop.throttle import Throttle, parse_throttle
from pyploop.trackers import TRACKERS
from pyploop.trackers.choose import choose
from pyploop.units import parse_size, parse_time

SYNC_WAIT = 5.0
"""Seconds given to a peer that cannot answer (the C tool's)."""
ANSWER_TIMEOUT = 600.0
"""Seconds for a peer to answer one SYNC: a slow disk's flush, not for ever."""
FREEZE_LIMIT = 60.0
STALL = 600.0
"""Seconds in which the peer neither takes nor gives a byte."""


def _descriptor(text: str) -> int:
    fd = int(text)
    if not -1 <= fd <= 1 << 20:
        raise ValueError(f"{text} is not a descriptor")
    return fd


DESCRIPTOR = parsed(_descriptor, "descriptor")


def parser() -> Parser:
    p = Parser(
        prog="pyploop copy",
        allow_abbrev=False,
        usage="pyploop copy -s DEVICE [-F STOPCMD] { [-d FILE] | [-o OFD] [-f FFD] } [options]\n"
        "       pyploop copy -d FILE [-i IFD] [-f FFD] [options]",
        description="Copy a block device or image file that is in use, or receive such a copy.",
    )
    add = p.add_argument
    add("-s", dest="source", metavar="DEVICE", help="block device or image file to copy")
    add(
        "-F",
        dest="stops",
        action=StopAction,
        metavar="STOPCMD",
        help="command that stops what writes to the source",
    )
    add("-d", dest="target", metavar="FILE", help="new file: target of a local copy, or to receive")
    add(
        "-o",
        dest="out",
        type=DESCRIPTOR,
        default=1,
        metavar="OFD",
        help="descriptor to send to (1)",
    )
    add(
        "-i",
        dest="inp",
        type=DESCRIPTOR,
        default=0,
        metavar="IFD",
        help="descriptor to receive from (0)",
    )
    add(
        "-f",
        dest="feedback",
        type=DESCRIPTOR,
        metavar="FFD",
        help="feedback descriptor",
    )
    g = p.add_argument_group("sending")
    add = g.add_argument
    add("--tracker", choices=TRACKERS, default="auto", help="how to learn what was written (auto)")
    add(
        "--read",
        choices=("auto", "device", "backing"),
        default="auto",
        help="how a loop device is read: from the device, or from its backing file (auto)",
    )
    add("--mount", metavar="DIR", help="mount point to freeze, instead of those found")
    add(
        "--freeze",
        dest="stops",
        action=StopAction,
        metavar="SPEC",
        help="what to stop: vzctl:CTID, cgroup:PATH, fs[:MOUNT] or cmd:COMMAND; several in order",
    )
    add(
        "--undo",
        dest="stops",
        action=StopAction,
        metavar="CMD",
        help="command that undoes the -F or --freeze cmd: before it, after a failure",
    )
    add("--resume", action="store_true", help="resume what was stopped also after success")
    add(
        "--sync-wait",
        type=parsed(parse_time, "time"),
        default=SYNC_WAIT,
        metavar="TIME",
        help="wait for a peer that cannot answer (5)",
    )
    add(
        "--compat",
        choices=COMPATS,
        default="auto",
        help="whose stream to send: the C tool's (ploop), ours (native), or as the peer is (auto)",
    )
    add(
        "--bwlimit",
        type=parsed(parse_size, "size"),
        default=0,
        metavar="RATE",
        help="bytes per second to the target at most (K, M, G)",
    )
    add(
        "--cluster",
        type=parsed(parse_size, "size"),
        metavar="SIZE",
        help="cluster of a device-mapper target, for --tracker dm",
    )
    add("--readers", type=int, metavar="N", help="reading threads beside the sending one (0..64)")
    add(
        "--before-thaw",
        metavar="CMD",
        help="command to run when the target is durable and the source still frozen",
    )
    add(
        "--freeze-limit",
        type=parsed(parse_time, "time"),
        metavar="TIME",
        help="give up, and undo everything, when the freeze lasts longer (60; with --max-freeze "
        "twice that and a second; 0: never)",
    )
    add(
        "--throttle",
        type=parsed(parse_throttle, "throttle"),
        metavar="RATE[:CGROUP]",
        help="with --max-freeze: slow the writer down to so many bytes per second by its cgroup "
        "when nothing else makes the freeze fit",
    )
    add(
        "--max-freeze",
        type=parsed(parse_time, "time"),
        metavar="TIME",
        help="freeze only when it is expected to last this long at most, else go on iterating",
    )
    add(
        "--deadline",
        type=parsed(parse_time, "time"),
        default=Policy.deadline,
        metavar="TIME",
        help="with --max-freeze: iterate so long at most after the first pass (600)",
    )
    add(
        "--on-deadline",
        choices=("freeze", "abort"),
        default=Policy.on_deadline,
        help="what to do then (abort)",
    )
    add("-t", "--times", action="store_true", help="print where the frozen time went")
    add(
        "--trace",
        metavar="FILE",
        help="write what both ends did as a Chrome trace (chrome://tracing, Perfetto)",
    )
    g = p.add_argument_group("both ends")
    add = g.add_argument
    add(
        "--timeout",
        type=parsed(parse_time, "time"),
        default=STALL,
        metavar="TIME",
        help="give a silent peer up after this (600)",
    )
    add("--progress", action="store_true", help="a progress bar on stderr")
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="events as NDJSON to FILE; without FILE to stdout, or to stderr when stdout is taken",
    )
    return p


def _attached(args: list[str]) -> list[str]:
    """Values of short options that begin with a dash, attached to them: getopt
    takes the next word whatever it is, argparse does not."""
    result: list[str] = []
    words = iter(args)
    for word in words:
        if word in ("-s", "-F", "-d", "-o", "-i", "-f"):
            value = next(words, None)
            if value is not None and value.startswith("-"):
                result.append(word + value)
                continue
            result += [word] if value is None else [word, value]
        else:
            result.append(word)
    return result


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_args(_attached(args))
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
            report.error(f"Interrupted by signal {e.signum}; everything was undone here")
            raise
    return 0


def _receive(o: argparse.Namespace, report: Reporter) -> None:
    transport.check_stream(o.inp, "-i")
    if o.feedback is not None:
        transport.check_stream(o.feedback, "-f")
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
            transport.check_stream(o.feedback, "-f")
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
        contextlib.closing(device.open_source(o.source, o.read, o.mount)) as source,
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
        Path(path).write_text(chrome_trace(recorder))
    except OSError as e:
        report.error(f"--trace {path}: {e.strerror}")


def _tell_times(sender: Sender, report: Reporter) -> None:
    summary, parts = sender.summary, sender.recorder.frozen_parts()
    if not parts:
        return
    rows = [(name.capitalize(), seconds) for name, seconds in parts.items()]
    for line in times.table(rows, sum(parts.values()), total_name="Total", decimals=4).split("\n"):
        report.note(line)
    if summary.predicted is not None:
        report.note(f"  {'Predicted':>20}: {summary.predicted:6.4f} (until durable)")
    report.note(summary.largest_part)


def _check_output(fd: int) -> None:
    mode = transport.check_open(fd, "-o").st_mode
    if not (stat.S_ISREG(mode) or transport.is_stream(fd)):
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
                handle = open(o.json, "w")  # noqa: SIM115 - closed by _close
            except OSError as e:
                raise ParameterError.of(f"--json {o.json}", e) from e
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
