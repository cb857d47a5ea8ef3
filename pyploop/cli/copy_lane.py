# SPDX-License-Identifier: Apache-2.0
"""`pyploop copy-lane`: started on the other host by `pyploop copy`, through ssh."""

from __future__ import annotations

import os

from pyploop.cli.arguments import Parser
from pyploop.transport import lane_handover
from pyploop.transport.greeting import first_line


def parser() -> Parser:
    return Parser(
        prog="pyploop copy-lane",
        allow_abbrev=False,
        description="Carries data of a remote copy. `pyploop copy` on the other host starts it "
        "through ssh, beside `pyploop copy-agent`.",
    )


def run(args: list[str], level: int) -> int:
    parser().parse_args(args)
    rfd, wfd = os.dup(0), os.dup(1)
    free_standard_streams()
    token = lane_handover.token_of(first_line(rfd, "waiting for the token of a lane"))
    lane_handover.hand_over(token, rfd, wfd)
    return 0


def free_standard_streams() -> None:
    """Descriptors 0 and 1 are the connection's no longer: what anything prints goes to
    stderr."""
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
