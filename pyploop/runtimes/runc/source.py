# SPDX-License-Identifier: Apache-2.0
"""The steps of a migration on the source: a runc container is checked and suspended, its
memory is dumped, and in the end it is removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Copied, Facts, Item, lazy_memory, memory_in_use
from pyploop.runtimes.checks import Checks
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.oci import bundles
from pyploop.runtimes.runc import (
    cgroup,
    contents,
    criu,
    criu_options,
    host_fit,
    leftovers,
    limits,
    link,
    link_cut,
    local_packets,
    members,
    memory_tracking,
    preflight,
    preflight_kernel,
    tmpfs,
)
from pyploop.runtimes.runc.connections import Connections, own_network
from pyploop.runtimes.runc.container import RuncContainer
from pyploop.runtimes.runc.page_server import PageServer
from pyploop.system.commands import last_words, run


class SourceSteps(RuncContainer):
    """The source's part of a Runtime."""

    def __init__(self, host: HostConfig, container: str) -> None:
        super().__init__(host, container)
        self._left: list[str] = []
        """Lines for `left_behind`."""
        self._watchers: list[leftovers.Watcher] = []
        self.pages: PageServer | None = PageServer(
            host.criu, self._page_order, self._check_suspended, host.command_timeout
        )
        self._announced = 0
        """Bytes of memory, as the target was told."""
        self._own_users = False
        self._runc_log = Path("/nonexistent")
        """Of the last checkpoint."""

    def check_source(self, live: bool) -> Facts:
        found = Checks()
        with found.named("config-json"):
            config = bundles.read(self._config.bundle)
        found.end()
        with found.named("config-host"):
            host_fit.check_source(config)
        self._own_users = tmpfs.has_own_users(config)
        with found.named("network-namespace"):
            self._check_network(config)
        running = self.state().running
        with found.named("places"):
            self._check_places(used=running)
        places = self._moving()
        external = self._config.external
        facts: Facts = {"mounts": self._places(), "config": config, "external": list(external)}
        with found.named("mounts"):
            sources = contents.check_config(config, self._config.bundle, places, external)
            facts |= {"paths": sources.paths, "kinds": sources.kinds}
        self._left += leftovers.annotations_of(config)
        if running and not found.has("mounts"):
            with found.named("root"):
                contents.check_root(self._init(), self._root_of(config))
        if live:
            self._check_live(config, places, external, facts, found)
        found.end(None if found.has("mounts") or found.has("places") else facts)
        return facts

    def _check_live(
        self,
        config: dict[str, Any],
        places: contents.Places,
        external: Sequence[str],
        facts: Facts,
        found: Checks,
    ) -> None:
        """What only a live migration needs.  Adds to the facts."""
        with found.named("criu"):
            facts["criu"] = list(criu.version(self._host.criu))
            criu.probe(self._host.criu)
        freezer = self._freezer()
        with found.named("freezer"):
            if freezer is None:
                raise self._no_freezer()
        if freezer is None:
            return
        facts["memory"] = self._announced = self._memory_of(freezer)
        with found.named("images-room"):
            self._check_memory(facts)
        with found.named("stopped"):
            cgroup.check_none_stopped(freezer, self.container)
        pids = freezer.pids()
        with found.named("processes"):
            lost = members.check(self.container, self._init(), freezer.pids, self.drop_exec)
            self._left += lost
        with found.named("mounted"):
            contents.check_all_mounted(pids, config, self._config.bundle, places, external)
        file = criu_options.file_of(config)
        own = self._config.criu_options if file == self._criu_file() else ()
        options = criu_options.of_dump(file, self._config.options, own)
        view = preflight.View(
            members.dumped(self._init(), pids),
            config,
            self._config.bundle,
            self._host.criu,
            cuts_link=link.plain(self._config.link_down) is not None,
        )
        preflight.check(found, view, options)
        with found.named("limits"):
            limits.check_readable(pids)
        facts["limits"] = limits.highest(pids)
        with found.named("runc-options"):
            criu_options.check_runc(self._host.runc, "checkpoint", self._config.options)
        facts["criu_options"] = criu_options.told(file, self._config.criu_options)
        facts["cgroups"] = preflight_kernel.controllers(self._cgroups())
        facts["labels"] = preflight_kernel.labels(pids)
        facts["filtered"] = preflight_kernel.filtered(pids)
        streams = self._streams()
        self._left += leftovers.all_of(self.runc_id, pids, config, self._cgroups(), streams)
        self._watchers = leftovers.watchers(pids)
        files = tmpfs.used_by(self._init())
        self._left += tmpfs.in_words(files)
        shared = max(memory_in_use.shared_of(self._cgroups()), sum(f.size for f in files))
        facts["lazy"] = lazy_memory.of_processes(pids, shared).told()

    def _streams(self) -> Sequence[str]:
        """Pipes (as /proc names them) whose other ends are on both hosts."""
        return ()

    def _check_network(self, config: dict[str, Any]) -> None:
        """MigrateError(15) for a container without a network namespace of its own: its sockets
        use the addresses of this host, and no other host can restore them."""
        linux = config.get("linux")
        found = linux.get("namespaces") if isinstance(linux, dict) else None
        own = any(isinstance(n, dict) and n.get("type") == "network" for n in found or ())
        if not own and "network" in self._config.policy.namespaces:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{self._config.bundle}/{bundles.CONFIG} has no network namespace: the container "
                "uses the network of this host, and cannot be migrated",
                path=f"{self._config.bundle}/{bundles.CONFIG}",
            )

    def _criu_file(self) -> str:
        """CRIU's options that pyploop has written when the container came to this host."""
        return f"{self._config.bundle}/{bundles.CRIU}"

    def _no_freezer(self) -> MigrateError:
        return MigrateError(
            VzExitCode.DUMP_FAILED,
            f"{self.container} has no freezer cgroup, and cannot be suspended without one",
        )

    def _ended(self) -> MigrateError:
        return MigrateError(
            VzExitCode.DUMP_FAILED, f"{self.container} ended before it could be suspended"
        )

    def _moving(self) -> contents.Places:
        return contents.Places(self.folders(), self._config.trees)

    def _root_of(self, config: dict[str, Any]) -> str:
        return os.path.join(self._config.bundle, str(config["root"]["path"]))

    def left_behind(self) -> list[str]:
        left, self._left = self._left, []
        return left

    def items(self) -> list[Item]:
        return [Item("config.json", f"{self._config.bundle}/{bundles.CONFIG}")]

    # ---- suspend and dump

    def memory_now(self) -> int:
        freezer = self._freezer()
        return 0 if freezer is None else self._memory_of(freezer)

    def prepare_dump(self, images: Path, parent: Path | None) -> str:
        argv = self._checkpoint_argv("--leave-running", images, parent)
        env = self._criu_environment()
        return self._early.start(images, "dump", argv, self._host.criu, self.keep_fds, env=env)

    def before_suspend(self) -> None:
        freezer = self._freezer()
        if freezer is None:
            raise self._ended() if not self.state().running else self._no_freezer()
        cgroup.check_none_stopped(freezer, self.container)
        memory_in_use.check_growth(self.container, self._announced, self._memory_of(freezer))
        self._await_early()
        if freezer.is_frozen():
            raise MigrateError(
                VzExitCode.DUMP_FAILED,
                f"{self.container} was paused during the migration, and would not be paused on the "
                "target; the rollback resumes it here",
                hint="migrate it again, or pause it again",
            )

    def _await_early(self) -> None:
        """MigrateError(8): the checkpoint that was started ahead has failed, or is late."""
        if not self._early.argv:
            return
        argv = self._early.argv
        try:
            if self._early.ready(self._host.command_timeout):
                return
            status, output = self._early.drop() or (-1, "")
            said = criu.runc_errors_of(self._runc_log) or last_words(output)
            why = f"{' '.join(argv)} ended with {status}: {said}"
        except OSError as e:  # TimeoutError is one
            self._early.drop(patience=0.0)
            why = f"{' '.join(argv)}: {e.strerror or e}"
        raise MigrateError(
            VzExitCode.DUMP_FAILED,
            f"cannot checkpoint {self.container}, which was not suspended yet: {why}",
        )

    def suspend(self) -> None:
        freezer = self._freezer()
        if freezer is None:
            raise self._no_freezer()
        try:
            self._freeze_and_cut(freezer)
        except OSError as e:
            if not self.state().running:
                raise self._ended() from e
            raise MigrateError(
                VzExitCode.DUMP_FAILED,
                f"cannot list the connections of {self.container}: {e.strerror}",
            ) from e

    def _freeze_and_cut(self, freezer: cgroup.ContainerCgroup) -> None:
        """A packet taken in after its socket is dumped would be lost, so the link is down
        before the dump; and after the freeze, with nothing under way."""
        init = self._init()
        if not own_network(init):
            cgroup.freeze(freezer, self.container)
            self._link(self._config.link_down, VzExitCode.DUMP_FAILED)
            return
        with Connections(init) as connections:
            cgroup.freeze(freezer, self.container)
            if self._config.link_down:
                link_cut.cut(
                    freezer,
                    self.container,
                    connections,
                    lambda: self._link(self._config.link_down, VzExitCode.DUMP_FAILED),
                    skip_in_flight="--skip-in-flight" in self._config.options,
                )
            local = connections.local()
        if local and local_packets.available():
            local_packets.close(f"/proc/{init}/ns/net")
        elif local:
            self._left.append(local_packets.MISSING)

    def resume(self) -> None:
        # Do all, whatever fails: a failed checkpoint leaves the link down and the cgroup frozen.
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._link_up_again)
                self._let_packets_in()
        finally:
            if freezer := self._freezer():
                freezer.thaw()

    def _link_up_again(self) -> None:
        self._link(self._config.link_up, VzExitCode.DUMP_FAILED)
        self._announce(f"/proc/{self._init()}/ns/net", resumed=True)

    def why_no_pre_dump(self) -> str:
        return memory_tracking.problem(self._host.criu)

    def pre_dump(self, images: Path, parent: Path | None) -> float | None:
        if freezer := self._freezer():
            cgroup.check_none_stopped(freezer, self.container)
        return memory_tracking.frozen_seconds(self._checkpoint("--pre-dump", images, parent))

    def dump(self, images: Path, parent: Path | None = None) -> None:
        self._checkpoint("--leave-running", images, parent, self._check_suspended)

    def _check_suspended(self) -> None:
        """MigrateError(8) when processes that would be lost have come since `check_source`."""
        freezer, init = self._freezer(), self._init()
        if freezer is not None and not self.drop_exec:
            members.check_suspended(self.container, init, freezer.pids())
        self._left += leftovers.waiting(init, self._watchers)

    def _checkpoint(
        self,
        how: str,
        images: Path,
        parent: Path | None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Path:
        """Run `runc checkpoint`; returns CRIU's working folder.  meanwhile: called while CRIU
        starts."""
        ahead = None
        if self._early.argv:
            ahead, line = self._early.go()
            line.close()
        argv = ahead.argv if ahead else self._checkpoint_argv(how, images, parent)
        try:
            run(
                ahead or argv,
                VzExitCode.DUMP_FAILED,
                self._host.command_timeout,
                self.keep_fds,
                env=self._criu_environment(),
                meanwhile=meanwhile,
            )
        except members.LostProcessError:
            raise
        except MigrateError as e:
            why = criu.why_failed(work_of(images) / "dump.log", self._runc_log, str(e))
            raise MigrateError(
                VzExitCode.DUMP_FAILED, f"cannot checkpoint {self.container}: {why}"
            ) from e
        return work_of(images)

    def _criu_environment(self) -> dict[str, str]:
        return tmpfs.environment(tmpfs.packing(self.peer_takes, self._own_users))

    def _checkpoint_argv(self, how: str, images: Path, parent: Path | None) -> list[str]:
        """Also makes CRIU's working folder."""
        bundles.forget_hook(self._config.bundle)
        criu_options.complete(self._criu_file(), self._config.criu_options)
        with contextlib.suppress(FileExistsError):  # by `prepare_dump`
            work_of(images).mkdir(mode=0o700)
        self._runc_log = work_of(images) / "runc.log"
        argv = [*self._runc(self._runc_log), "checkpoint", how]
        argv += ["--image-path", str(images), "--work-path", str(work_of(images))]
        if parent is not None:
            argv += ["--parent-path", os.path.relpath(parent, images)]
        return [*argv, *self._config.options, self.runc_id]

    def _page_order(self, images: Path, parent: Path | None) -> dict[str, Any]:
        """For the keeper of the page server."""
        freezer = self._freezer()
        if freezer is None:
            raise self._no_freezer()
        work = work_of(images)
        *argv, name = self._checkpoint_argv("--leave-running", images, parent)
        return {
            "argv": argv,
            "name": name,
            "env": self._criu_environment(),
            "config": str(work / "page-server.conf"),
            "log": str(work / "dump.log"),
            "freeze": freezer.order,
            "keep": self.keep_fds,
        }

    # ---- afterwards

    def discard(self, remove: bool, copied: Copied | None) -> None:
        config = Path(self._config.bundle) / bundles.CONFIG
        self._discard_places(remove, copied)
        if remove:
            self._remove_folders()
            config.unlink(missing_ok=True)
            (config.parent / bundles.CRIU).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                config.parent.rmdir()
        elif config.exists():
            config.rename(config.with_name(bundles.CONFIG + ".migrated"))


def work_of(images: Path) -> Path:
    """CRIU's working folder of a checkpoint."""
    return images.with_name(f"{images.name}-work")
