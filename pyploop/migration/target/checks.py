# SPDX-License-Identifier: Apache-2.0
"""The checks of the target, before anything is made there, and the locks that it takes."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyploop.errors import BusyError, MigrateError, ProtocolError, PyploopError, VzExitCode
from pyploop.migration import locks
from pyploop.migration.target import incoming_trees, resumable_files, resumable_trees
from pyploop.migration.target.settle import settle_dead
from pyploop.runtimes import Disk, Facts, Runtime, config, lazy_policy, policy, volumes
from pyploop.runtimes.checks import Checks
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.lazy_policy import NOT_LIVE, UNABLE, Choice
from pyploop.runtimes.lazy_record import LazyRecord
from pyploop.runtimes.policy import Source
from pyploop.system import cpu, file_systems, helpers

CAPABILITIES = (
    *("memory", "tree", "channels", "window", "probe", "post-copy", "lazy-rounds"),
    *("lanes", "mmp"),
)
"""Optional parts of this major version of the protocol: memory rounds, trees, channels
with a number above channels.LAST_OLD, the window of a channel of memory images, probes
of the connection, pages that come after the commit, lanes, and disks with ext4's multiple mount
protection.  `capabilities` adds what this host has."""


def capabilities() -> list[str]:
    """`tmpfs`: one that our tar has packed is unpacked without gzip."""
    return [*CAPABILITIES, *(["tmpfs"] if helpers.has_tar() else [])]


def check_trust(host: HostConfig, source: Source, runtime: str) -> None:
    """MigrateError(15) unless this host takes such a container from this source.  Memory images
    say which processes a restore makes, root's on this host too, and Podman's description of a
    container names files that are written here.  No check of either can be complete."""
    if policy.trusts(host.trusted_live, source):
        return
    entry = f"--key {source.name}" if source.name else source.address or "--key NAME"
    how = "" if source.name or source.address else " (and its key starts the agent with --source)"
    what, why = "memory", "the sender of a memory image can become root here"
    without = ". Without --live no trust is needed"
    if runtime.startswith("podman"):
        what = "containers of Podman"
        why = "Podman makes them as the source describes them, which can make it root here"
        without = ""
    raise MigrateError(
        VzExitCode.BAD_CONFIG,
        f"this host takes no {what} from {source}, because {why}. If you trust the source with "
        f"that, run on this host: pyploop trust {entry}{how}{without}",
        path=host.path or config.DEFAULT,
    )


def lock(host: HostConfig, runtime: Runtime, taken: contextlib.ExitStack) -> None:
    """Take one of the host's places for migrations, and the container's lock, until `taken`
    is closed.  MigrateError(20)."""
    folder = Path(host.lock_dir)
    try:
        taken.enter_context(locks.host_slot(folder, host.migrations, 0))
        if not runtime.locks_itself:
            taken.enter_context(locks.container_lock(folder, runtime.container))
    except BusyError as e:
        raise MigrateError(VzExitCode.LOCKED, str(e), path=e.path, hint=e.hint) from e


def check_all(
    host: HostConfig,
    chosen: Runtime,
    live: bool,
    facts: Facts,
    *,
    sizes: list[int],
    nodeps: list[str],
    found: Checks,
) -> dict[str, Any]:
    """The answer to `check`.  found: has the checks that have failed before.  MigrateError."""
    settle_dead(host, chosen)
    with found.named("machine"):
        _check_machine(facts)
    if live and "cpu" not in nodeps:
        with found.named("cpu"):
            _check_cpu(facts)
    with found.named("other"):
        chosen.check_target({**facts, "nodeps": nodeps}, live)
    lazy = Choice(NOT_LIVE)
    if live:
        with found.named("busy"):
            lazy = choose_lazy(host, chosen, facts)
    _check_room(host, chosen, facts, sizes, found)
    found.end()
    return {
        "disks": [d.image for d in chosen.disks(source=False)],
        "takes": capabilities(),
        "wants": sorted(chosen.wants),
        "lazy": {"lazy": lazy.lazy, "why": lazy.why},
        "post_copy": {"why": why_no_post_copy(host, chosen, facts) if live else NOT_LIVE},
    }


def _check_machine(facts: Facts) -> None:
    if platform.machine() != facts.get("machine"):
        raise MigrateError(
            VzExitCode.CPU,
            f"this host is a {platform.machine()} machine, and the source is a "
            f"{facts.get('machine')} machine",
        )


def _check_cpu(facts: Facts) -> None:
    missing = set(facts.get("cpu") or ()) - set(cpu.flags())
    if missing:
        raise MigrateError(
            VzExitCode.CPU,
            f"the CPU of this host lacks {' '.join(sorted(missing))}, which the source has "
            "(--nodeps=cpu ignores that, at your own risk)",
        )


def _check_file_systems(disks: Sequence[Disk]) -> None:
    for disk in disks:
        if disk.fstype and not file_systems.has(disk.fstype):
            raise MigrateError(
                VzExitCode.NO_KERNEL,
                f"the kernel of this host has no file system {disk.fstype}, which the disk "
                f"{disk.image} needs",
                path=disk.image,
                hint="load its module, or correct fstype in migrate.toml",
            )


def _check_room(
    host: HostConfig, chosen: Runtime, facts: Facts, sizes: list[int], found: Checks
) -> None:
    """ProtocolError when the numbers of disks differ, and no check has said so."""
    try:
        disks = chosen.disks(source=False)
        if len(disks) != len(sizes):
            raise ProtocolError(
                f"the container has {len(sizes)} disks on the source, and {len(disks)} in the "
                "target's configuration",
                hint="name the same disks in migrate.toml on both hosts",
            )
        with found.named("file-system"):
            _check_file_systems(disks)
        there = resumable_files.allocated(host, chosen, facts)
        for n, (disk, size) in enumerate(zip(disks, sizes, strict=True)):
            with found.named("disk-room"):
                volumes.check_free(disk, max(size - there.get(f"disk {n}", 0), 0))
        kept = resumable_trees.allocated(
            host.state_dir, chosen.name, chosen.container, resumable_files.source_of(facts)
        )
        with found.named("tree-room"):
            incoming_trees.check(host.rsync, chosen.trees(), facts.get("trees") or [], kept)
    except PyploopError:
        # What this needs may be what an earlier check has missed.
        found.end()
        raise


def _wanted(host: HostConfig, facts: Facts) -> lazy_policy.Wanted:
    want = (facts.get("lazy") or {}).get("want")
    return lazy_policy.wanted(host.lazy_restore, want if want in lazy_policy.WANTED else "auto")


def why_no_post_copy(host: HostConfig, runtime: Runtime, facts: Facts) -> str:
    """Why the pages cannot come from the source while the container runs here; empty: they
    can."""
    if runtime.lazy is None:
        return UNABLE
    return runtime.lazy.why_no_post_copy(_wanted(host, facts), facts.get("lazy"))


def choose_post_copy(host: HostConfig, runtime: Runtime, facts: Facts, seconds: float) -> None:
    """The source wants it.  MigrateError(13) when it cannot be."""
    if why := why_no_post_copy(host, runtime, facts):
        raise MigrateError(VzExitCode.RESTORE_FAILED, f"no post-copy on this host: {why}")
    assert runtime.lazy is not None
    runtime.lazy.post_copy = seconds
    runtime.lazy.choice = Choice()


def choose_lazy(host: HostConfig, runtime: Runtime, facts: Facts) -> Choice:
    """Whether memory will be loaded lazily.  MigrateError(20) while that of an earlier
    restore of the container is."""
    record = LazyRecord.read(LazyRecord.path_of(host.state_dir, runtime.name, runtime.container))
    if record is not None and record.busy:
        raise MigrateError(
            VzExitCode.LOCKED,
            f"an earlier restore of {runtime.container} has not ended here (process "
            f"{record.process('guard') or record.process('daemon')})",
        )
    if runtime.lazy is None:
        return Choice(UNABLE)
    return runtime.lazy.choose(_wanted(host, facts), facts.get("lazy") or {})
