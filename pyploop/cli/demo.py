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
        description="Make a temporary disk, copy it while a program writes to it, compare the "
        "copy, and clean up.",
    )
    p.add_argument(
        "--size",
        type=parsed(parse_size, "size"),
        default=512 * MIB,
        help="size of the disk, which is sparse (512M)",
    )
    p.add_argument("--folder", help="folder to make it in (the usual one for temporary files)")
    return p


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_args(args)
    if o.size < SMALLEST:
        p.error("--size is at least 16M")
    run_demo(o.size, o.folder)
    return 0
