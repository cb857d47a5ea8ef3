# SPDX-License-Identifier: Apache-2.0
"""The options of `pyploop copy`: those of `ploop copy` 1.15, and long ones of our own."""

from __future__ import annotations

from pyploop.api.copying import CopyOptions
from pyploop.cli.arguments import Parser, parsed
from pyploop.cli.stops import StopAction
from pyploop.diskcopy.framing import COMPATS
from pyploop.freeze.throttle import parse_throttle
from pyploop.trackers import TRACKERS
from pyploop.units import parse_size, parse_time


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
        action="last",
        dest="out",
        type=DESCRIPTOR,
        default=1,
        metavar="OFD",
        help="descriptor to send to (1)",
    )
    add(
        "-i",
        action="last",
        dest="inp",
        type=DESCRIPTOR,
        default=0,
        metavar="IFD",
        help="descriptor to receive from (0)",
    )
    add(
        "-f",
        action="last",
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
    add(
        "--mount",
        dest="mounts",
        action="append",
        default=[],
        metavar="DIR",
        help="mount point to freeze, instead of those found; may be given several times",
    )
    add(
        "--unsafe-in-use",
        dest="unsafe",
        action="store_true",
        help="copy although something uses the source that the copy cannot take into account "
        "(it is named): the copy may be stale",
    )
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
        default=CopyOptions.sync_wait,
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
        "--reserve",
        type=parsed(parse_size, "size"),
        metavar="SIZE",
        help="stop when only so much is left free on the file system where the source grows and "
        "the target, too (the larger of 5%% and 1G of what is free at the start, but half of that "
        "at most; 0: neither compare nor watch the room)",
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
        default=CopyOptions.deadline,
        metavar="TIME",
        help="with --max-freeze: iterate so long at most after the first pass (600)",
    )
    add(
        "--on-deadline",
        choices=("freeze", "abort"),
        default=CopyOptions.on_deadline,
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
        default=CopyOptions.timeout,
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


def attached(args: list[str]) -> list[str]:
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
