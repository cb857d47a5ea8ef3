# SPDX-License-Identifier: Apache-2.0
"""`pyploop verify`: compares a file or device with a receipt, or with another one."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict

from pyploop.api.copying import CopyOptions
from pyploop.api.verifying import VerifyResult, verify
from pyploop.cli.arguments import Parser
from pyploop.cli.copy_options import attached
from pyploop.errors import one_line
from pyploop.units import format_size

SCHEMA = "pyploop.verify/1"
DIFFERENT = 1
"""Exit code, as cmp has it."""
SHOWN = 20
"""Parts that the text names."""


def parser() -> Parser:
    p = Parser(
        prog="pyploop verify",
        allow_abbrev=False,
        description="Compare a file or device with the receipt of its copy (copy --receipt), or "
        "two that nobody writes to. One of them may be on another host ([user@]host:path), which "
        "then reads its own. Exit code 0: the same; 1: different; others: as copy.",
    )
    p.add_argument(
        "--json", action="store_true", help="print one JSON object (schema pyploop.verify/1)"
    )
    p.add_argument(
        "--ssh", action="append", default=[], metavar="OPTS", help="more options for ssh"
    )
    p.add_argument(
        "--remote-pyploop",
        default=CopyOptions.remote_pyploop,
        metavar="CMD",
        help="the command that is pyploop on the other host (pyploop)",
    )
    p.add_argument("path", metavar="FILE", help="file or device to read")
    p.add_argument("other", metavar="RECEIPT|FILE", help="what it must be")
    return p


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_args(attached(args))
    try:
        ssh = [word for text in o.ssh for word in shlex.split(text)]
    except ValueError as e:
        p.error(f"--ssh: {e}")
    found = verify(o.path, o.other, ssh_options=ssh, remote_pyploop=o.remote_pyploop)
    if o.json:
        print(json.dumps({"schema": SCHEMA, **asdict(found)}))
    elif level >= 0 or not found.same:
        print("\n".join(one_line(line) for line in as_text(o.path, o.other, found)))
    return 0 if found.same else DIFFERENT


def as_text(path: str, other: str, found: VerifyResult) -> list[str]:
    lines: list[str] = []
    if found.same:
        lines.append(f"{path} is the same as {other}: {format_size(found.size)}, root {found.root}")
    else:
        lines.append(found.why)
    shown = found.differing[:SHOWN]
    lines += [f"  bytes {start} to {end} ({format_size(end - start)})" for start, end in shown]
    if (left := len(found.differing) - len(shown)) > 0:
        lines.append(f"  and {left} more places")
    if found.past_end:
        lines.append(f"{format_size(found.past_end)} behind the image were not compared")
    if found.proven is False:
        lines.append(
            f"{other} is the sender's alone: the receiver did not compare it (copy --proof always)"
        )
    return lines
