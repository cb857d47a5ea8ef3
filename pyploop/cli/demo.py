# SPDX-License-Identifier: Apache-2.0
"""`pyploop demo`."""

from __future__ import annotations

from pyploop.cli.arguments import Parser, parsed
from pyploop.cli.demo_disk import run_demo
from pyploop.units import MIB, parse_size

SMALLEST = 16 * MIB


def parser() -> Parser:
    p = Parser(
        prog="pyploop demo",
        allow_abbrev=False,
        description="Make a throw-away disk, write to it, copy it live, compare, clean up.",
    )
    p.add_argument(
        "--size",
        type=parsed(parse_size, "size"),
        default=512 * MIB,
        help="of the disk, sparse (512M)",
    )
    p.add_argument("--folder", help="where to make it (the usual place for temporary files)")
    return p


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_args(args)
    if o.size < SMALLEST:
        p.error("--size is at least 16M")
    run_demo(o.size, o.folder)
    return 0
