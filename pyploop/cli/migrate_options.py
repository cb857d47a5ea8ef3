# SPDX-License-Identifier: Apache-2.0
"""The options of `pyploop migrate`: vzmigrate's, and long ones of our own."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyploop.cli.arguments import Parser, parsed
from pyploop.diskcopy.compression import AUTO, parse_compression
from pyploop.diskcopy.freeze_policy import OnDeadline, Policy
from pyploop.errors import VzExitCode
from pyploop.migration.image_chain import LONGEST
from pyploop.migration.memory_policy import MemoryPolicy
from pyploop.runtimes.lazy_policy import WANTED, Wanted
from pyploop.units import parse_size, parse_time

if TYPE_CHECKING:
    from pyploop.api.migrating import RuntimeName

RUNTIMES = ("vzctl", "runc", "podman", "command")
NODEPS = ("cpu", "ipv6")
"""Checks that `--nodeps=` can leave out by name."""


@dataclass(frozen=True)
class MigrateOptions:
    """What the user asked for; times in seconds, sizes in bytes."""

    host: str
    container: str
    runtime: RuntimeName | None
    config: str | None
    live: bool
    check_only: bool
    explain: bool
    remove_area: bool
    """Destroy the source's private area once the target runs (`-r`)."""
    keep_dst: bool
    nodeps: frozenset[str]
    ssh: tuple[str, ...]
    rsync: tuple[str, ...]
    times: bool
    verbose: int
    drop_exec: bool
    """Processes of `runc exec` end with the move."""
    networks: tuple[str, ...]
    """Of a container of Podman on the target, instead of its own."""
    publish: tuple[str, ...]
    """Its published ports there, instead of its own."""
    pre_dumps: int
    """Rounds of memory before the freeze at most."""
    lazy_restore: Wanted
    """Whether the target loads memory while it runs."""
    post_copy: Wanted
    """Whether memory follows while it runs on the target."""
    post_copy_timeout: float
    suspend_limit: float | None
    max_suspend: float | None
    on_deadline: OnDeadline
    max_freeze: float | None
    deadline: float | None
    bwlimit: int
    compress: str
    timeout: float
    json: str | None
    trace: str | None
    recover: bool


class _Parser(Parser):
    exit_status = VzExitCode.USAGE


def parser() -> Parser:
    p = _Parser(
        prog="pyploop migrate",
        allow_abbrev=False,
        usage="pyploop migrate [--live] [-t] [options] HOST CT\n"
        "       pyploop migrate --recover [options] [HOST CT]",
        description="Move a container to another host; with --live without stopping it.",
    )
    add = p.add_argument
    add("host", nargs="?", metavar="HOST", help="host to move it to, as ssh takes it: [user@]host")
    add("container", nargs="?", metavar="CT", help="container to move: its ID or name")
    g = p.add_argument_group("options of vzmigrate")
    add = g.add_argument
    add("--live", "--online", action="store_true", help="move it without stopping it")
    add(
        "--check-only",
        "--dry-run",
        action="store_true",
        help="check both hosts, and change nothing",
    )
    add(
        "--explain",
        action="store_true",
        help="as --check-only; also print what the container has, how each part would move, and "
        "the same as lines for migrate.toml",
    )
    add(
        "-r",
        "--remove-area",
        choices=("yes", "no"),
        default="yes",
        help="remove the container from this host afterwards (yes)",
    )
    add(
        "--keep-dst",
        action="store_true",
        help="if the migration fails, keep what was copied; the next one continues from it",
    )
    add(
        "-f",
        "--nodeps",
        action="append",
        default=[],
        metavar="[=]cpu,ipv6",
        help="skip these compatibility checks; without a list, all of them",
    )
    add("--ssh", action="append", default=[], metavar="OPTS", help="more options for ssh")
    add(
        "--ssh-mux",
        action="store_true",
        help="accepted and without effect: more connections are opened where they help",
    )
    add(
        "--rsync",
        action="append",
        default=[],
        metavar="OPTS",
        help="more options for rsync, which copies a root that is a directory",
    )
    add(
        "-c",
        "--compact",
        action="store_true",
        help="accepted and without effect: nothing is compacted",
    )
    add(
        "-s",
        "--snapshot",
        action="store_true",
        help="accepted and without effect: no snapshot is needed",
    )
    add("-t", "--times", action="store_true", help="print how the suspended time was spent")
    add("-v", dest="verbose", action="count", default=0, help="more messages (up to four)")
    g = p.add_argument_group("options of pyploop")
    add = g.add_argument
    add("--runtime", choices=RUNTIMES, help="what runs the container (as the configuration says)")
    add("--config", metavar="FILE", help="configuration of this host (/etc/pyploop/migrate.toml)")
    add(
        "--pre-dumps",
        type=_count,
        default=MemoryPolicy.max_rounds,
        metavar="N",
        help="copy memory in at most so many rounds before the freeze, where the kernel tracks it "
        f"({MemoryPolicy.max_rounds})",
    )
    add(
        "--no-pre-dump",
        dest="pre_dumps",
        action="store_const",
        const=0,
        help="copy no memory before the freeze, and do not test whether that works",
    )
    add(
        "--drop-exec",
        action="store_true",
        help="end processes of `runc exec`, which cannot be moved, instead of failing",
    )
    add(
        "--network",
        dest="networks",
        action="append",
        default=[],
        metavar="NAME[:ip=ADDRESS]",
        help="a container of Podman: its network on the target, instead of its own; once for each "
        "that it has. If its address changes, its TCP connections end",
    )
    add(
        "--publish",
        action="append",
        default=[],
        metavar="[ADDRESS:]HOST:CT[/udp]",
        help="a container of Podman: publish this port on the target, instead of its own ones; "
        "may be repeated",
    )
    add(
        "--lazy-restore",
        choices=WANTED,
        default="auto",
        help="let the container run on the target before its memory is loaded there: where it "
        "pays (auto), never, or always; the target's configuration wins",
    )
    add(
        "--post-copy",
        choices=WANTED,
        default="never",
        help="with --live: let the container run on the target, and send its memory after it: "
        "never, when the suspended time is expected to be longer than --max-suspend without it "
        "(auto), or always. If this host ends before all memory has come, or the connection is "
        "cut for longer than --post-copy-timeout, the container is lost (never)",
    )
    add(
        "--post-copy-timeout",
        type=parsed(_some_time, "time"),
        default=600.0,
        metavar="TIME",
        help="with --post-copy: how long the connection may be cut meanwhile (600)",
    )
    add(
        "--suspend-limit",
        type=parsed(_limit, "time"),
        metavar="TIME",
        help="with --live: if the container is suspended for so long, resume it here, unless the "
        "target may have restored it already (60; 0: no limit)",
    )
    add(
        "--max-suspend",
        type=parsed(parse_time, "time"),
        metavar="TIME",
        help="with --live: suspend the container only when that is expected to last at most so "
        "long, memory and restore included",
    )
    add(
        "--max-freeze",
        type=parsed(parse_time, "time"),
        metavar="TIME",
        help="freeze a disk only when its freeze is expected to last at most so long",
    )
    add(
        "--deadline",
        type=parsed(parse_time, "time"),
        metavar="TIME",
        help="with --max-freeze or --max-suspend: send rounds for at most so long (600)",
    )
    add(
        "--on-deadline",
        choices=("freeze", "abort"),
        default=Policy.on_deadline,
        help="what happens when --max-freeze or --max-suspend cannot be kept: go on all the same, "
        "or let the container go on here (abort)",
    )
    add(
        "--bwlimit",
        type=parsed(parse_size, "size"),
        default=0,
        metavar="RATE",
        help="send at most so many bytes per second of a disk while the container runs (K, M, G)",
    )
    add(
        "--compress",
        type=parsed(lambda text: parse_compression(text).name, "compression"),
        default=AUTO.name,
        metavar="HOW",
        help="compress blocks of the disks on their way: while more gets through that way (auto), "
        "never, or zstd or zstd:LEVEL (auto)",
    )
    add(
        "--timeout",
        type=parsed(_some_time, "time"),
        default=600.0,
        metavar="TIME",
        help="fail when the peer is silent for so long (600)",
    )
    add("--json", nargs=1, metavar="FILE", help="write events as NDJSON to FILE; -: to stdout")
    add(
        "--trace",
        metavar="FILE",
        help="write a time line of both hosts to FILE, for chrome://tracing or Perfetto",
    )
    add("--recover", action="store_true", help="undo, or finish, what a killed migration has left")
    return p


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {LONGEST}")
    return int(text)


def _some_time(text: str) -> float:
    seconds = parse_time(text)
    if seconds < 1:  # rsync takes whole seconds, and 0 for ever
        raise ValueError(f"{text!r} is less than 1 s")
    return seconds


def _limit(text: str) -> float:
    seconds = parse_time(text)
    return seconds and _some_time(text)


def _spelled_out(args: list[str]) -> list[str]:
    """`-f` and `--nodeps` have a value only with `=`; argparse would take HOST."""
    return ["--nodeps=all" if a in ("-f", "--nodeps") else a for a in args]


def parse(args: list[str]) -> MigrateOptions:
    """SystemExit (1) with the usage on stderr for a wrong command line."""
    p = parser()
    for a in args[: args.index("--") if "--" in args else None]:
        if a.startswith("--") and a.endswith("=--"):  # argparse drops that value
            p.error(f"{a}: -- is not a value")
    o = p.parse_args(_spelled_out(args))
    if not o.recover and (o.host is None or o.container is None):
        p.error("HOST and CT are missing")
    if o.host is not None and (o.host.startswith("-") or not o.host.strip()):
        p.error(f"{o.host!r} is not a host name")
    if o.recover and (o.live or o.check_only or o.explain):
        p.error("--recover cannot be used with --live, --check-only or --explain")
    return MigrateOptions(
        host=o.host or "",
        container=o.container or "",
        runtime=o.runtime,
        config=o.config,
        live=o.live,
        check_only=o.check_only,
        explain=o.explain,
        remove_area=o.remove_area == "yes",
        keep_dst=o.keep_dst,
        nodeps=_nodeps(p, o.nodeps),
        ssh=_words(p, o.ssh),
        rsync=_words(p, o.rsync),
        times=o.times,
        verbose=min(o.verbose, 4),
        drop_exec=o.drop_exec,
        networks=tuple(o.networks),
        publish=tuple(o.publish),
        pre_dumps=o.pre_dumps,
        lazy_restore=o.lazy_restore,
        post_copy=o.post_copy,
        post_copy_timeout=o.post_copy_timeout,
        suspend_limit=o.suspend_limit,
        max_suspend=o.max_suspend,
        on_deadline=o.on_deadline,
        max_freeze=o.max_freeze,
        deadline=o.deadline,
        bwlimit=o.bwlimit,
        compress=o.compress,
        timeout=o.timeout,
        json=o.json[0] if o.json else None,
        trace=o.trace,
        recover=o.recover,
    )


def _nodeps(p: argparse.ArgumentParser, given: list[str]) -> frozenset[str]:
    names: set[str] = set()
    for text in given:
        if not text:
            p.error(f"--nodeps= takes {', '.join(NODEPS)}; without = all of them are left out")
        names.update(NODEPS if text == "all" else text.split(","))
    unknown = names.difference(NODEPS)
    if unknown:
        p.error(f"--nodeps takes {', '.join(NODEPS)}, not {', '.join(sorted(unknown))}")
    return frozenset(names)


def _words(p: argparse.ArgumentParser, given: list[str]) -> tuple[str, ...]:
    try:
        return tuple(word for text in given for word in shlex.split(text))
    except ValueError as e:
        p.error(f"options for ssh or rsync: {e}")
