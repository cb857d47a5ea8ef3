# SPDX-License-Identifier: Apache-2.0
"""`pyploop copy-agent`: started on the other host by `pyploop copy`, through ssh."""

from __future__ import annotations

import os
import signal
import sys

from pyploop.cli.arguments import Parser
from pyploop.cli.copy_lane import free_standard_streams
from pyploop.copyagent.agent import CopyAgent
from pyploop.copyagent.permits import Permits
from pyploop.system import jobs
from pyploop.transport import lane_handover


def parser() -> Parser:
    p = Parser(
        prog="pyploop copy-agent",
        allow_abbrev=False,
        description="The other host's end of a remote copy. `pyploop copy` starts it through ssh. "
        "The options are for command= of an ssh key: with any of them, only what they name is "
        "allowed.",
    )
    add = p.add_argument
    add(
        "--read",
        action="append",
        default=[],
        metavar="PATH",
        help="allow this source, or those in this folder; may be given several times",
    )
    add(
        "--write",
        action="append",
        default=[],
        metavar="PATH",
        help="allow new files in this folder, and this device or those in this folder "
        "(--to-device); may be given several times",
    )
    add(
        "--update",
        action="store_true",
        help="allow --update, which replaces files in the folders of --write",
    )
    add(
        "--stops",
        action="store_true",
        help="allow -F, --freeze, --mount, --before-thaw and --throttle, which run commands, and "
        "stop containers and file systems",
    )
    return p


def _let_go(rfd: int, wfd: int) -> None:
    """The ssh that started us has ended.  What writes to its stderr would die of that."""
    os.close(rfd)
    os.close(wfd)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


def run(args: list[str], level: int) -> int:
    o = parser().parse_args(args)
    permits = Permits.of(o.read, o.write, update=o.update, stops=o.stops)
    # Frames go to stdout.  What anything else prints must not mix with them.
    rfd, wfd = os.dup(0), os.dup(1)
    free_standard_streams()
    signal.signal(jobs.INTERRUPT, lambda *_: None)
    # In the frozen time threads take turns; by default one may wait 5 ms for its turn.
    sys.setswitchinterval(0.0005)
    try:
        agent = CopyAgent(rfd, wfd, permits, lambda: _let_go(rfd, wfd))
    except lane_handover.LaneError as e:
        lane_handover.hand_over(e.token, rfd, wfd)
        return 0
    agent.serve()
    return 0
