# SPDX-License-Identifier: Apache-2.0
"""`pyploop status`: how much of a container's memory is still to be loaded."""

from __future__ import annotations

import dataclasses
import json
import sys

from pyploop.api.memory import MemoryStatus, forget_memory, memory_status
from pyploop.cli.arguments import Parser
from pyploop.errors import PyploopError, one_line
from pyploop.units import format_size

USAGE_STATUS = 1


class _Parser(Parser):
    exit_status = USAGE_STATUS


def parser() -> Parser:
    p = _Parser(
        prog="pyploop status",
        allow_abbrev=False,
        description="Show how much of a container's memory is still to be loaded after a "
        "migration to this host. Without CT, show all containers that came by a lazy restore. "
        "Ends with 0 when nothing is to come, 2 while memory is being loaded, 3 when there is "
        "something to do, and 1 when the status cannot be read.",
    )
    p.add_argument("container", nargs="?", metavar="CT", help="container: its ID or name")
    p.add_argument(
        "--config", metavar="FILE", help="configuration of this host (/etc/pyploop/migrate.toml)"
    )
    p.add_argument("--state-dir", metavar="DIR", help="look there, whatever the configuration says")
    p.add_argument("--json", action="store_true", help="one JSON object for each container")
    p.add_argument(
        "--forget",
        action="store_true",
        help="remove what is left of the restore of CT: its record, and its memory images",
    )
    return p


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_args(args)
    where = {"config_file": o.config, "state_dir": o.state_dir}
    if o.forget and o.container is None:
        p.error("--forget needs CT")
    try:
        if o.forget:
            forget_memory(o.container, **where)
            return 0
        found = memory_status(o.container, **where)
    except PyploopError as e:
        print(f"pyploop status: {e}", file=sys.stderr)
        return USAGE_STATUS
    for one in found:
        print(_json(one) if o.json else one_line(_text(one)))
    return max((one.exit_code for one in found), default=0)


def _json(one: MemoryStatus) -> str:
    return json.dumps(dataclasses.asdict(one))


def _text(one: MemoryStatus) -> str:
    text = f"{one.container}: {one.text}"
    if one.left:
        of = f" of {format_size(one.total)}" if one.total else ""
        text += f"; {format_size(one.left)}{of} still to come"
    elif one.seconds is not None and one.state == "complete":
        text += f"; it took {one.seconds:.1f} s"
    if one.images and one.state not in ("loading", "unguarded"):
        text += f"; its memory images are in {one.images} (--forget removes them)"
    return text
