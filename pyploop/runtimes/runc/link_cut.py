# SPDX-License-Identifier: Apache-2.0
"""The link of a frozen container goes down when nothing is under way on it."""

from __future__ import annotations

import time
from collections.abc import Callable

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.runc import cgroup
from pyploop.runtimes.runc.cgroup import ContainerCgroup
from pyploop.runtimes.runc.connections import Connections

LAST_REQUEST = 0.005
"""Seconds that the link stays up in the freeze, at least.  A client's next request, sent
before it can know of the freeze, is acknowledged by the kernel and moves with its socket;
it would be repeated after 0.2 s or more otherwise."""
ACCEPTS, ACCEPT_PAUSE = 10, 0.004
"""How often the container is let go on, and for how many seconds, to accept a connection
that waits; so often with the link up, and again with the link down."""


def cut(
    freezer: ContainerCgroup,
    container: str,
    connections: Connections,
    down: Callable[[], None],
    *,
    skip_in_flight: bool,
) -> None:
    """The container is frozen, and stays so but for moments.  down: takes the link down.
    skip_in_flight: CRIU drops connections that wait to be accepted.  MigrateError(8), and
    OSError when the kernel cannot be asked."""
    began = time.monotonic()
    _accepted(freezer, container, connections, skip_in_flight)
    time.sleep(max(began + LAST_REQUEST - time.monotonic(), 0.0))
    connections.acknowledged()
    down()
    # No new ones come now from outside, so a busy server has an end.
    waiting = _accepted(freezer, container, connections, skip_in_flight)
    if waiting and not skip_in_flight:
        raise MigrateError(
            VzExitCode.DUMP_FAILED,
            f"the server in {container} does not accept the {waiting} connections that wait for "
            "it, and CRIU cannot move those (In-flight connection): try again when it does",
            hint='to drop them, add "--skip-in-flight" to the container\'s options',
        )


def _accepted(
    freezer: ContainerCgroup, container: str, connections: Connections, skip: bool
) -> int:
    """How many connections still wait to be accepted, after some tries."""
    for _ in range(ACCEPTS):
        waiting = connections.unaccepted()
        if not waiting or skip:
            return waiting
        freezer.thaw()
        time.sleep(ACCEPT_PAUSE)
        cgroup.freeze(freezer, container)
        connections.thawed()
    return connections.unaccepted()
