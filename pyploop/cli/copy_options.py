# SPDX-License-Identifier: Apache-2.0
"""The options of `pyploop copy`: those of `ploop copy` 1.15, and long ones of our own."""

from __future__ import annotations

import argparse

from pyploop.api.copying import CopyOptions
from pyploop.cli.arguments import Parser, parsed
from pyploop.cli.stops import StopAction
from pyploop.diskcopy.compression import parse_compression
from pyploop.diskcopy.framing import COMPATS
from pyploop.diskcopy.proof import WISHES
from pyploop.diskcopy.write_mode import WRITES
from pyploop.trackers import TRACKERS
from pyploop.units import parse_size, parse_time


def _descriptor(text: str) -> int:
    fd = int(text)
    if not -1 <= fd <= 1 << 20:
        raise ValueError(f"{text} is not a descriptor")
    return fd


def parse_throttle(text: str) -> tuple[int, str | None]:
    """RATE[:CGROUP]; ValueError for anything else, and for a rate of 0."""
    rate, _, group = text.partition(":")
    size = parse_size(rate)
    if not size:
        raise ValueError(f"{text!r}: at 0 bytes per second a writer would never finish a write")
    return size, group or None


DESCRIPTOR = parsed(_descriptor, "descriptor")


def parser() -> Parser:
    p = Parser(
        prog="pyploop copy",
        allow_abbrev=False,
        usage="pyploop copy SOURCE TARGET [options]\n"
        "       pyploop copy -s DEVICE [-F STOPCMD] { [-d FILE] | [-o OFD] [-f FFD] } [options]\n"
        "       pyploop copy -d FILE [-i IFD] [-f FFD] [options]",
        description="Copy a block device or image file that is in use, or receive such a copy. "
        "SOURCE or TARGET may be on another host: [user@]host:path.",
    )
    add = p.add_argument
    add("places", nargs="*", metavar="SOURCE TARGET", help="as -s DEVICE -d FILE")
    add("-s", dest="source", metavar="DEVICE", help="block device or image file to copy")
    add(
        "-F",
        dest="stops",
        action=StopAction,
        metavar="STOPCMD",
        help="command that stops what writes to the source, before the freeze",
    )
    add(
        "-d",
        dest="target",
        metavar="FILE",
        help="new file to write (or device, with --to-device): the target of a local copy, or of "
        "a received one",
    )
    add(
        "-o",
        action="last",
        dest="out",
        type=DESCRIPTOR,
        default=1,
        metavar="OFD",
        help="descriptor of the stream to the receiver (1)",
    )
    add(
        "-i",
        action="last",
        dest="inp",
        type=DESCRIPTOR,
        default=0,
        metavar="IFD",
        help="descriptor of the stream from the sender (0)",
    )
    add(
        "-f",
        action="last",
        dest="feedback",
        type=DESCRIPTOR,
        metavar="FFD",
        help="descriptor on which the receiver answers",
    )
    g = p.add_argument_group("sending")
    add = g.add_argument
    add(
        "--tracker",
        choices=TRACKERS,
        default="auto",
        help="how to learn which blocks were written during the copy (auto)",
    )
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
        help="mount point to freeze, instead of those that are found; may be given several times",
    )
    add(
        "--unsafe-in-use",
        dest="unsafe",
        action="store_true",
        help="copy even if something uses the source in a way that the copy cannot see; the copy "
        "may be stale, and the log names what it was",
    )
    add(
        "--freeze",
        dest="stops",
        action=StopAction,
        metavar="SPEC",
        help="stop this before the last blocks: vzctl:CTID, cgroup:PATH, fs[:MOUNT] or "
        "cmd:COMMAND; may be given several times, and is done in that order",
    )
    add(
        "--undo",
        dest="stops",
        action=StopAction,
        metavar="CMD",
        help="if the copy fails, run CMD to undo the preceding -F or --freeze cmd:",
    )
    add(
        "--resume",
        action="store_true",
        help="resume what was stopped after a successful copy, too (after a failure it always is)",
    )
    add(
        "--sync-wait",
        type=parsed(parse_time, "time"),
        default=CopyOptions.sync_wait,
        metavar="TIME",
        help="time to wait before the freeze while a receiver that cannot answer syncs (5)",
    )
    add(
        "--compat",
        choices=COMPATS,
        default="auto",
        help="stream to send: that of the C tool (ploop), that of pyploop (native), or what the "
        "receiver turns out to understand (auto)",
    )
    add(
        "--bwlimit",
        type=parsed(parse_size, "size"),
        default=0,
        metavar="RATE",
        help="send at most so many bytes per second while the source runs, counted after they "
        "are compressed (K, M, G)",
    )
    add(
        "--compress",
        type=parsed(lambda text: parse_compression(text).name, "compression"),
        default=CopyOptions.compress,
        metavar="WHEN",
        help="compress what is sent to a receiver of pyploop that answers: while more gets through "
        "that way than without (auto), always (zstd or zstd:LEVEL, 1 to 19), or never; the default "
        "is auto from or to another host, and never otherwise",
    )
    add(
        "--reserve",
        type=parsed(parse_size, "size"),
        metavar="SIZE",
        help="where source and target grow on the same file system, fail when only so much is left "
        "free there (default: the larger of 5%% and 1G of what is free at the start, but at most "
        "half of it; 0: do not check the free space)",
    )
    add(
        "--cluster",
        type=parsed(parse_size, "size"),
        metavar="SIZE",
        help="size of a cluster of the device-mapper target, for --tracker dm",
    )
    add(
        "--readers",
        type=int,
        metavar="N",
        help="number of reading threads beside the sending one (0 to 64)",
    )
    add(
        "--before-thaw",
        metavar="CMD",
        help="command to run when the target is durable and the source is still frozen",
    )
    add(
        "--freeze-limit",
        type=parsed(parse_time, "time"),
        metavar="TIME",
        help="if the freeze lasts longer, thaw the source, resume what was stopped, and fail (60; "
        "with --max-freeze twice that and a second; 0: no limit)",
    )
    add(
        "--throttle",
        type=parsed(parse_throttle, "throttle"),
        metavar="RATE[:CGROUP]",
        help="with --max-freeze: when nothing else makes the freeze short enough, limit the "
        "writer's cgroup to so many bytes per second",
    )
    add(
        "--max-freeze",
        type=parsed(parse_time, "time"),
        metavar="TIME",
        help="freeze only when the freeze is expected to last at most so long; until then, send "
        "rounds",
    )
    add(
        "--deadline",
        type=parsed(parse_time, "time"),
        default=CopyOptions.deadline,
        metavar="TIME",
        help="with --max-freeze: send rounds for at most so long after the first pass (600)",
    )
    add(
        "--on-deadline",
        choices=("freeze", "abort"),
        default=CopyOptions.on_deadline,
        help="what to do at the --deadline: freeze all the same, or fail (abort)",
    )
    add(
        "--proof",
        choices=WISHES,
        default=CopyOptions.proof,
        help="have the receiver compare hashes of what it wrote with those of what was sent: if it "
        "can (auto: the default from or to another host, and with --receipt), or fail if it cannot "
        "(always)",
    )
    add(
        "--receipt",
        metavar="FILE",
        help="write what the target must hold to FILE, for `pyploop verify`",
    )
    add("-t", "--times", action="store_true", help="print how the frozen time was spent")
    add(
        "--trace",
        metavar="FILE",
        help="write a time line of both ends to FILE, for chrome://tracing or Perfetto",
    )
    g = p.add_argument_group("another host")
    add = g.add_argument
    add("--ssh", action="append", default=[], metavar="OPTS", help="more options for ssh")
    add(
        "--remote-pyploop",
        default=CopyOptions.remote_pyploop,
        metavar="CMD",
        help="the command that is pyploop on the other host (pyploop)",
    )
    g = p.add_argument_group("both ends")
    add = g.add_argument
    add(
        "--to-device",
        action="store_true",
        help="the target is a block device, whose contents are replaced: it must be as large as "
        "the source, and in use by nothing",
    )
    add(
        "--update",
        action="store_true",
        help="TARGET is an older copy of SOURCE: send only what differs from it; it stays as it is "
        "until the new one is complete, and then the new one replaces it",
    )
    add(
        "--inplace",
        action="store_true",
        help="with --update: write into the older copy itself, which needs no room for a second "
        "one; after a failure it is neither the older nor the newer state",
    )
    add(
        "--keep-partial",
        action=argparse.BooleanOptionalAction,
        help="if the copy fails, keep what has arrived as TARGET.pyploop-partial, from which the "
        "same command goes on (the default from or to another host)",
    )
    add(
        "--write",
        choices=WRITES,
        default=CopyOptions.write,
        help="write the target past the page cache (direct), through it (buffered), or past it "
        "where that pays (auto); for the side that has -d",
    )
    add(
        "--timeout",
        type=parsed(parse_time, "time"),
        default=CopyOptions.timeout,
        metavar="TIME",
        help="fail when the peer is silent for so long (600)",
    )
    add(
        "--retry",
        type=parsed(parse_time, "time"),
        default=CopyOptions.retry,
        metavar="TIME",
        help="from or to another host: after a lost connection try so long to get another one, and "
        "go on; 0: fail (120)",
    )
    add("--progress", action="store_true", help="show a progress bar on stderr")
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write events as NDJSON to FILE; without FILE to stdout, or to stderr when the stream "
        "uses stdout",
    )
    return p


def attached(args: list[str]) -> list[str]:
    """Values of options that begin with a dash, attached to them: getopt takes the next
    word whatever it is, argparse does not."""
    result: list[str] = []
    words = iter(args)
    for word in words:
        if word in ("-s", "-F", "-d", "-o", "-i", "-f", "--ssh"):
            value = next(words, None)
            if value is not None and value.startswith("-"):
                result.append(f"{word}={value}" if word.startswith("--") else word + value)
                continue
            result += [word] if value is None else [word, value]
        else:
            result.append(word)
    return result
