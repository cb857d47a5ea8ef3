# SPDX-License-Identifier: Apache-2.0
"""Which runtime has a container."""

from __future__ import annotations

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Runtime
from pyploop.runtimes.config import CTID, HostConfig

RUNTIMES = ("vzctl", "runc", "command")


def make_runtime(host: HostConfig, name: str | None, container: str) -> Runtime:
    """`name`, or what the configuration says for this container; a number that
    it does not know is vzctl's."""
    if name is None:
        known = host.containers.get(container)
        if known is None and not CTID.fullmatch(container):
            host.container(container)  # says what is missing
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
    raise MigrateError(VzExitCode.USAGE, f"no runtime {name!r} (there are {', '.join(RUNTIMES)})")
