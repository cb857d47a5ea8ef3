# SPDX-License-Identifier: Apache-2.0
"""`pyploop sync`: what `vzfsync` does, with its options and exit codes."""

from __future__ import annotations

import os
import sys

from pyploop.api.syncing import sync
from pyploop.cli.arguments import Parser
from pyploop.errors import SyncError, one_line

USAGE_STATUS = 1
FAILED_STATUS = 2


class _Parser(Parser):
    exit_status = USAGE_STATUS


def parser() -> Parser:
    p = _Parser(
        prog="pyploop sync",
        allow_abbrev=True,
        description="Make files durable. When a file fails, the others are still synced.",
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
            sync(
                [path],
                flush="all" if o.sync else "data" if o.datasync else "nothing",
                drop_cache=o.dontneed,
            )
        except SyncError as e:
            failed = True
            if level >= -1:
                cause = e.__cause__
                why = os.strerror(cause.errno or 0) if isinstance(cause, OSError) else str(e)
                print(one_line(f"pyploop sync: {path}: {why}"), file=sys.stderr)
    return FAILED_STATUS if failed else 0
