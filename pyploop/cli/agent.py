# SPDX-License-Identifier: Apache-2.0
"""`pyploop agent`: started on the target by `pyploop migrate`, through ssh."""

from __future__ import annotations

import os
import signal
import sys

from pyploop.cli.arguments import Parser
from pyploop.migration.target.first_line import WantedError, greet
from pyploop.runtimes import config, policy
from pyploop.system import jobs
from pyploop.transport import lane_handover


def parser() -> Parser:
    p = Parser(
        prog="pyploop agent",
        allow_abbrev=False,
        description="The target's side of a migration. `pyploop migrate` starts it through ssh.",
    )
    p.add_argument(
        "--config", metavar="FILE", help="configuration of this host (/etc/pyploop/migrate.toml)"
    )
    p.add_argument(
        "--source",
        metavar="NAME",
        help="name of the source in [trust] of the configuration, for command= of an ssh key",
    )
    return p


def run(args: list[str], level: int) -> int:
    o = parser().parse_args(args)
    host = config.load(o.config)
    # Frames go to stdout.  What anything else prints must not mix with them.
    rfd, wfd = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    # In the frozen time threads take turns; by default one may wait 5 ms for its turn.
    sys.setswitchinterval(0.0005)
    signal.signal(jobs.INTERRUPT, lambda *_: None)
    source = policy.source_of(o.source, os.environ)
    try:
        early = greet(rfd, wfd)
    except WantedError as e:
        from pyploop.migration.target import page_link

        page_link.hand_over(host, source, e.migration, rfd, wfd)
        return 0
    except lane_handover.LaneError as e:
        lane_handover.hand_over(e.token, rfd, wfd)
        return 0
    from pyploop.migration.target.agent import Agent

    Agent(host, rfd, wfd, source, early).serve()
    return 0
