# SPDX-License-Identifier: Apache-2.0
"""`pyploop migrate --explain`: what a container has, how each part of it would move, and what
stands in the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pyploop.report.events import Reporter
from pyploop.runtimes import Runtime
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.found_config import keys_of, toml


@contextlib.contextmanager
def explained(host: HostConfig, runtime: Runtime, report: Reporter) -> Iterator[None]:
    """Log what was found, then do the body, which checks, and then log the lines for
    migrate.toml, whether a check has failed or not."""
    name = runtime.container
    where = "found in runc's state" if name in host.found else f"as {host.path or 'the defaults'}"
    report.note(f"Container {name} (runtime {runtime.name}), {where} has it:")
    for disk in runtime.disks(source=False):
        report.note(
            f"  disk {disk.image}, {disk.fstype} on {disk.mount}: copied as blocks while the "
            "container runs, and the last ones while it is suspended"
        )
    for tree in runtime.trees():
        report.note(f"  tree {tree.path}: copied by rsync, in passes; the last one while suspended")
    known = host.containers.get(name)
    for path in known.external if known is not None else ():
        report.note(f"  {path}: not copied; it must be on the target already")
    if known is not None and known.netns:
        report.note(f"  network namespace {known.netns}: not copied; the target has its own")
    memory = runtime.memory_now()
    if memory:
        report.note(f"  memory, {memory >> 20} MiB: dumped by CRIU while suspended, with --live")
    try:
        yield
        report.note("Nothing stands in the way")
    finally:
        if known is not None and runtime.name == "runc":
            report.note("For /etc/pyploop/migrate.toml on both hosts, with their own paths:")
            for line in toml(name, keys_of(known)):
                report.note(line)
