# SPDX-License-Identifier: Apache-2.0
"""The checks of both hosts, before anything is changed on either."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyploop.disks import ext4_mmp
from pyploop.disks.source import Source
from pyploop.errors import MigrateError, VzExitCode
from pyploop.migration import deadlines
from pyploop.migration.memory_policy import MemoryPolicy
from pyploop.migration.source import (
    host_identity,
    lane_supply,
    lazy,
    memory,
    post_copy,
    tree_flags,
    trees,
)
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.disks import allocated
from pyploop.migration.source.payload import check_number
from pyploop.migration.source.request import Request
from pyploop.report.events import Reporter
from pyploop.runtimes import Copied, Disk, Facts, Runtime, lazy_policy
from pyploop.runtimes.checks import Checks, ChecksFailedError, naming, of
from pyploop.runtimes.config import HostConfig
from pyploop.system import cpu
from pyploop.transport import ssh_cipher
from pyploop.wire.messages import clipped


def connect(host: HostConfig, request: Request, report: Reporter) -> Remote:
    """Connect to the agent.  Its events and messages are passed on to `report`."""

    def on_event(name: str, at: float, fields: dict[str, Any]) -> None:
        if name == "line":
            level = fields.get("level")
            if isinstance(level, int):
                report.line(level, f"{request.host}: {clipped(fields.get('text'))}")
        else:
            report.event("target", name=name, monotonic=at, fields=fields)

    # Where the target's CPU must have all that ours has (checks.py at the target).
    aes = request.live and "cpu" not in request.nodeps and "aes" in cpu.flags()
    choice = ssh_cipher.choose(host.ssh, request.ssh_options, request.host, aes)
    options = (*request.ssh_options, *choice.options)
    remote = Remote(request.host, host.ssh, options, host.agent, on_event)
    asked = ssh_cipher.PREFERRED if choice.preferred else ""
    report.event("connection", cipher=remote.cipher, asked=asked, why=choice.why)
    report.info(
        f"ssh encrypts with {remote.cipher or 'a cipher that it does not name'}; it was "
        f"{f'asked for {asked} first' if asked else 'not asked for another one'} ({choice.why})"
    )
    return remote


@dataclass(frozen=True)
class Here:
    """The result of the checks on the source."""

    runtime: Runtime
    request: Request
    report: Reporter
    running: bool
    """True: the container runs.  False: it is stopped."""
    facts: Facts | None
    """None: a check has failed, and the target cannot check without its result."""
    disks: list[Disk]
    found: Checks
    """Has the checks of the source that have failed."""

    def there(self, remote: Remote, sources: Sequence[Source]) -> Checked:
        """Let the target check.  sources: the opened disks.  MigrateError."""
        runtime, request, facts = self.runtime, self.request, self.facts
        assert facts is not None
        copied = {} if self.found.failed else runtime.copied(self.disks)
        facts["images"] = [0 if s.is_image else s.size for s in sources]
        sizes = [allocated(s) for s in sources]
        checked = remote.call(
            "check",
            deadlines.CHECKING,
            container=runtime.container,
            runtime=runtime.name,
            live=request.live,
            facts=facts,
            sizes=sizes,
            nodeps=sorted(request.nodeps),
        )
        self.found.end()
        remote.capabilities = checked.get("takes", [])  # an older agent does not name them
        runtime.peer_takes = frozenset(remote.capabilities)
        if request.live:
            with naming("ext4-mmp"):
                _check_mmp(self.disks, runtime.peer_takes, f"{remote.version} on {request.host}")
        runtime.peer_wants = frozenset(checked.get("wants", []))
        if runtime.trees() and "tree" not in remote.capabilities:
            with naming("agent-version"):
                raise MigrateError(
                    VzExitCode.CANNOT_CONNECT,
                    f"pyploop {remote.version} on {request.host} is too old to receive directories",
                    hint="install a newer pyploop there",
                )
        if not request.check_only:
            bulk = sum(facts.get("trees") or ())
            if request.live:
                bulk += int(facts.get("memory") or lane_supply.UNKNOWN)
            remote.begin_lanes(self.report, len(sources), sum(sizes), bulk)
        self.report.info(f"Both hosts are checked; {request.host} has pyploop {remote.version}")
        is_lazy = (
            request.live
            and lazy.report_choice(self.report, checked.get("lazy"), facts.get("lazy")).lazy
        )
        planned = post_copy.plan(request, runtime, remote, checked)
        rounds = memory.policy_for(
            runtime,
            request.pre_dumps if request.live else None,
            self.report,
            "memory" in remote.capabilities,
            "with --post-copy always the target's pyploop is too old"
            if planned.want == "always" and "lazy-rounds" not in remote.capabilities
            else "",
        )
        most = rounds.max_rounds if rounds else 0
        check_number(remote, len(sources), len(runtime.trees()), most)
        return Checked(
            sources,
            copied,
            self.running,
            int(facts.get("memory") or 0),
            rounds,
            lazy_policy.memory_of(facts.get("lazy")),
            is_lazy,
            planned,
        )


@dataclass(frozen=True)
class Checked:
    """The result of the checks on both hosts."""

    sources: Sequence[Source]
    copied: Copied
    running: bool
    """True: the container runs.  False: it is stopped."""
    memory: int
    """Bytes of memory in use, 0 when not known."""
    rounds: MemoryPolicy | None
    """The policy for memory rounds; None: there are none."""
    kinds: lazy_policy.Memory | None
    """What of the memory can come later; None: not known."""
    lazy: bool
    """The target will load it lazily, unless the dump turns out to be too small for that."""
    post_copy: post_copy.Plan = post_copy.NOT_WANTED


def here(host: HostConfig, runtime: Runtime, request: Request, report: Reporter) -> Here:
    """Check the source.  MigrateError."""
    state = runtime.state()
    if not state.exists:
        raise MigrateError(
            VzExitCode.NO_CONTAINER, f"there is no container {runtime.container} on this host"
        )
    if request.live and not state.running:
        raise MigrateError(
            VzExitCode.STOPPED,
            f"container {runtime.container} does not run, so it cannot be migrated with --live",
            hint="migrate it without --live",
        )
    if state.suspended:
        raise MigrateError(
            VzExitCode.STOPPED,
            f"container {runtime.container} is suspended, and only a running or stopped one can be "
            "migrated",
            hint="run `pyploop migrate --recover` if an earlier migration has suspended it",
        )
    runtime.drop_exec = request.drop_exec
    runtime.keeps_source = not request.remove_area
    runtime.rewire(request.networks, request.publish)
    if request.live:
        lazy.wait_loaded(host, runtime, report)
    found = Checks()
    facts: Facts | None = None
    try:
        facts = runtime.check_source(request.live)
    except MigrateError as e:
        found.failed += of(e, "other")
        facts = e.facts if isinstance(e, ChecksFailedError) else None
    with found.named("tree"):
        sizes = trees.check_source(runtime.trees(), host.rsync)
    if request.remove_area and not found.has("tree"):
        with found.named("immutable-files"):
            tree_flags.check(runtime.trees())
    disks: list[Disk] = []
    if facts is not None:
        facts |= {"machine": platform.machine(), "cpu": cpu.flags()}
        facts["source"] = host_identity.identity(host.state_dir)
        if runtime.container in host.found:
            facts["found"] = host.found[runtime.container]
        if "lazy" in facts:
            facts["lazy"]["want"] = request.lazy_restore
        disks = runtime.disks(source=True)
    if found.has("tree"):
        facts = None
    elif facts is not None:
        facts["trees"] = sizes
    for text in runtime.left_behind():
        report.note(text)
    return Here(runtime, request, report, state.running, facts, disks, found)


def _check_mmp(disks: list[Disk], peer_takes: frozenset[str], peer: str) -> None:
    """MigrateError(15) when the target would wait before it mounts a disk: its pyploop is too
    old, or does not mount the disk itself."""
    for disk in disks:
        if disk.mount and "mmp" in peer_takes:
            continue
        try:
            seconds = ext4_mmp.seconds(disk.source)
        except OSError:  # the one who opens it says why
            continue
        if seconds:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{disk.image} is an ext4 with multiple mount protection (MMP): the target's "
                f"kernel would wait for {seconds} s before it mounts the copy, with the container "
                f"suspended, because pyploop {peer} cannot prevent that",
                path=disk.image,
                hint="install a newer pyploop there; or stop the container, unmount the disk, run "
                f"tune2fs -O ^mmp {disk.image}, and start it again",
            )
