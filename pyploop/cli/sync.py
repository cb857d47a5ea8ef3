# SPDX-License-Identifier: Apache-2.0
"""`pyploop sync`: what `vzfsync` does, with its options and exit codes."""

from __future__ import annotations

import os
import sys

from pyploop._core import fdatasync
from pyploop.cli.arguments import Parser
from pyploop.errors import one_line
from pyploop.system.worker import run_cancellable

USAGE_STATUS = 1
FAILED_STATUS = 2


class _Parser(Parser):
    exit_status = USAGE_STATUS


def parser() -> Parser:
    p = _Parser(
        prog="pyploop sync",
        allow_abbrev=True,
        description="Make files durable. Goes on after a file that fails.",
    )
    how = p.add_mutually_exclusive_group()
    how.add_argument("-s", "--sync", action="store_true", help="fsync each file")
    how.add_argument("-d", "--datasync", action="store_true", help="fdatasync each file")
    p.add_argument(
        "-n", "--dontneed", action="store_true", help="drop each file from the page cache"
    )
    p.add_argument("files", nargs="+", metavar="FILE")
    return p


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_args(args)
    if not (o.sync or o.datasync or o.dontneed):
        p.error("one of -s, -d and -n is required")
    failed = False
    for path in o.files:
        try:
            _one(path, o.sync, o.datasync, o.dontneed)
        except OSError as e:
            failed = True
            if level >= -1:
                why = os.strerror(e.errno or 0)
                print(one_line(f"pyploop sync: {path}: {why}"), file=sys.stderr)
    return FAILED_STATUS if failed else 0


def _one(path: str, sync: bool, datasync: bool, dontneed: bool) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if sync:
            run_cancellable(lambda: os.fsync(fd))
        if datasync:
            run_cancellable(lambda: fdatasync(fd))
        if dontneed:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
