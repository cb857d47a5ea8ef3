# SPDX-License-Identifier: Apache-2.0
"""`pyploop bench`: what a copy between these hosts will be limited by."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace

from pyploop.bench import report
from pyploop.bench.run import Wanted, bench
from pyploop.bench.stages import Stage
from pyploop.cli.arguments import Parser, parsed
from pyploop.errors import WriteError
from pyploop.transport.place import place
from pyploop.units import parse_time


def _seconds(text: str) -> float:
    seconds = parse_time(text)
    if not 0.05 <= seconds <= 600:
        raise ValueError(f"{text!r} is not between 50ms and 10m")
    return seconds


def parser() -> Parser:
    p = Parser(
        prog="pyploop bench",
        allow_abbrev=False,
        usage="pyploop bench [options] SOURCE [[[USER@]HOST:]DIR]\n"
        "       pyploop bench [options] --target [[USER@]HOST:]DIR",
        description="Measure the parts of a copy one by one: reading SOURCE, the connection "
        "to HOST, and writing into DIR. Then say what will limit a copy, how long it will take, "
        "and how long its freeze. The source is only read, and the file that is written in DIR "
        "has no name and is gone afterwards.",
    )
    add = p.add_argument
    add("source", nargs="?", metavar="SOURCE", help="block device or image file")
    add("folder", nargs="?", metavar="DIR", help="folder of the target, on this host or another")
    add("--target", action="store_true", help="measure the target alone: there is no SOURCE")
    add(
        "--seconds",
        type=parsed(_seconds, "time"),
        default=2.0,
        metavar="TIME",
        help="how long each part is measured (2)",
    )
    add(
        "--freeze",
        action="store_true",
        help="measure freezing, too: the source's file systems are frozen for some "
        "milliseconds, several times",
    )
    add("--json", action="store_true", help="print one JSON object (schema pyploop.bench/1)")
    add("--ssh", action="append", default=[], metavar="OPTS", help="more options for ssh")
    add(
        "--remote-pyploop",
        default="pyploop",
        metavar="CMD",
        help="the command that is pyploop on the other host (pyploop)",
    )
    return p


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_args(args)
    source, where = o.source, o.folder
    if o.target:
        if where is not None:
            p.error("--target takes DIR alone")
        source, where = None, source
    if source is None and where is None:
        p.error("nothing to measure: name SOURCE, DIR, or both")
    host = ""
    if where is not None:
        try:
            host, where = place(f"{where}." if where.endswith(":") else where)
            ssh_options = [word for text in o.ssh for word in shlex.split(text)]
            remote = shlex.split(o.remote_pyploop)
        except ValueError as e:
            p.error(str(e))
        if host.startswith("-"):
            p.error(f"{host!r} is not a host")
    wanted = Wanted(source=source or "", seconds=o.seconds, freeze=o.freeze)
    if where is not None:
        wanted = replace(
            wanted, folder=where, host=host, ssh_options=ssh_options, remote_pyploop=remote
        )

    def tell(stage: Stage) -> None:
        if not o.json:
            _print(report.line(stage))

    found = bench(wanted, tell)
    if o.json:
        _print(json.dumps(found.document()))
    elif found.copy is not None:
        _print("")
        for sentence in report.sentences(found.copy, source, o.folder, frozen=o.freeze):
            _print(sentence)
    return os.EX_OK


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as e:
        raise WriteError.of("cannot write to stdout", e) from e
