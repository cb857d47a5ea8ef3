# SPDX-License-Identifier: Apache-2.0
"""What the target checks before anything is made here, and the places and locks that
it takes for it."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import Any

from pyploop.errors import BusyError, MigrateError, ProtocolError, VzExitCode
from pyploop.migration import locks
from pyploop.migration.target import incoming_trees, resumable_files, resumable_trees
from pyploop.migration.target.settle import settle_dead
from pyploop.runtimes import Facts, Runtime, config, policy, volumes
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.policy import Source
from pyploop.system import cpu

CAPABILITIES = ("memory", "tree", "channels")
"""What an agent of this major version need not know: rounds of memory, trees, and numbers
of channels beyond channels.LAST_OLD."""


def check_trust(host: HostConfig, source: Source) -> None:
    """Memory images make processes as they say, root's on this host as well: no
    check of them can be complete."""
    if not policy.trusts(host.trusted_live, source):
        entry = source.name or source.address or "NAME"
        how = "" if entry != "NAME" else ", and start the agent with --source NAME"
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"this host does not restore memory that comes from {source}: who sends it "
            f'can become root here. If it may, write [trust] live = ["{entry}"] in '
            f"{host.path or config.DEFAULT} here{how}; without --live the container "
            "moves as it is",
        )


def lock(host: HostConfig, runtime: Runtime, taken: contextlib.ExitStack) -> None:
    """Take one of the host's places and the container's lock, until `taken` is closed.
    MigrateError(20)."""
    folder = Path(host.lock_dir)
    try:
        taken.enter_context(locks.host_slot(folder, host.migrations, 0))
        if not runtime.locks_itself:
            taken.enter_context(locks.container_lock(folder, runtime.container))
    except BusyError as e:
        raise MigrateError(VzExitCode.LOCKED, str(e)) from e


def check_all(
    host: HostConfig,
    chosen: Runtime,
    live: bool,
    facts: Facts,
    *,
    sizes: list[int],
    nodeps: list[str],
) -> dict[str, Any]:
    """The answer to `check`.  MigrateError."""
    settle_dead(host, chosen)
    if platform.machine() != facts.get("machine"):
        raise MigrateError(
            VzExitCode.CPU,
            f"the target is {platform.machine()}, the source {facts.get('machine')}",
        )
    if live and "cpu" not in nodeps:
        missing = set(facts.get("cpu") or ()) - set(cpu.flags())
        if missing:
            raise MigrateError(
                VzExitCode.CPU,
                f"the VzExitCode.CPU lacks {' '.join(sorted(missing))} (--nodeps=cpu goes on)",
            )
    chosen.check_target({**facts, "nodeps": nodeps}, live)
    disks = chosen.disks(source=False)
    if len(disks) != len(sizes):
        raise ProtocolError(
            f"the source has {len(sizes)} disks, and the target's configuration {len(disks)}"
        )
    there = resumable_files.allocated(host, chosen, facts)
    for n, (disk, size) in enumerate(zip(disks, sizes, strict=True)):
        volumes.check_free(disk, max(size - there.get(f"disk {n}", 0), 0))
    kept = resumable_trees.allocated(
        host.state_dir, chosen.name, chosen.container, resumable_files.source_of(facts)
    )
    incoming_trees.check(host.rsync, chosen.trees(), facts.get("trees") or [], kept)
    return {"disks": [d.image for d in disks], "takes": list(CAPABILITIES)}
