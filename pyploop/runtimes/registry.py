# SPDX-License-Identifier: Apache-2.0
"""Which runtime a container belongs to."""

from __future__ import annotations

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Runtime
from pyploop.runtimes.config import CTID, HostConfig

RUNTIMES = ("vzctl", "runc", "command")


def make_runtime(host: HostConfig, name: str | None, container: str) -> Runtime:
    """The runtime `name`, or that of the configuration for this container.  A number that
    is not in the configuration is a container of vzctl."""
    if name is None:
        known = host.containers.get(container)
        if known is None and not CTID.fullmatch(container):
            host.container(container)  # raises: the name is unknown
        name = known.runtime if known else "vzctl"
    if name == "runc":
        from pyploop.runtimes.runc.runtime import Runc

        return Runc(host, container)
    if name == "vzctl":
        from pyploop.runtimes.vzctl.runtime import Vzctl

        return Vzctl(host, container)
    if name == "command":
        from pyploop.runtimes.command import CommandRuntime

        return CommandRuntime(host, container)
    raise MigrateError(
        VzExitCode.USAGE, f"unknown runtime {name!r}: choose one of {', '.join(RUNTIMES)}"
    )
