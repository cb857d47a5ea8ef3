# SPDX-License-Identifier: Apache-2.0
"""runc and CRIU.

The container is suspended by its cgroup's freezer, written directly; it stays
so through the dump (--leave-running), and is killed, or thawed, afterwards:
nothing but this host decides that it runs here again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, PyploopError, VzExitCode
from pyploop.freeze.cgroup_freezer import freezer_in
from pyploop.runtimes import Copied, Facts, Item, State, memory_in_use, volumes
from pyploop.runtimes.config import HostConfig, within
from pyploop.runtimes.configured import Configured
from pyploop.runtimes.oci import bundles, destinations
from pyploop.runtimes.oci import criu_images as image_check
from pyploop.runtimes.runc import (
    cgroup,
    contents,
    criu,
    host_fit,
    leftovers,
    members,
    memory_tracking,
)
from pyploop.runtimes.runc.cgroup import ContainerCgroup
from pyploop.system import beneath
from pyploop.system.commands import Command, last_words, run
from pyploop.undo import journal

PREVIEW = 0.25
"""Part of the memory that a dump may be larger than what is in use."""


class Runc(Configured):
    """One container of one host."""

    name = "runc"

    def __init__(self, host: HostConfig, container: str) -> None:
        self.container = container
        self.keep_fds: tuple[int, ...] = ()
        self.lock_dir = host.lock_dir
        self._host = host
        self._config = host.container(container)
        if not self._config.bundle.startswith("/") or not self._places():
            raise MigrateError(
                VzExitCode.USAGE,
                f"[container.{container}] needs an absolute bundle, and a disk or a tree",
            )
        self._left: list[str] = []
        self._watchers: list[leftovers.Watcher] = []
        self._told = 0
        """Bytes of memory that the target was told of."""
        # CRIU names a deleted file that has other names anew, for the restore.
        self.dump_writes = "--link-remap" in self._config.options
        self._written: dict[str, Any] | None = None
        """On the target: its config.json, as `placed` has written it."""

    # ---- what there is

    def _record(self) -> dict[str, Any] | None:
        """runc's own state file, which names the first process and the cgroups."""
        path = Path(self._host.runc_root) / self.container / "state.json"
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            raise MigrateError(VzExitCode.NO_CONTAINER, f"cannot read {path}: {e}") from e
        return record if isinstance(record, dict) else None

    def _freezer(self) -> ContainerCgroup | None:
        record = self._record()
        if record is None:
            return None
        paths = record.get("cgroup_paths") or {}
        folder = paths.get("freezer") or paths.get("")
        freezer = freezer_in(Path(folder)) if folder else None
        return ContainerCgroup(freezer) if freezer else None

    def state(self) -> State:
        record = self._record()
        mounted = any(volumes.is_mounted(d.mount) for d in self._config.disks)
        if record is None:
            return State(False, mounted=mounted)
        started = journal.start_time(int(record.get("init_process_pid") or 0))
        running = started is not None and started == record.get("init_process_start")
        # Until then its first process is runc's own, which a file of the container's may
        # keep waiting for ever (a FIFO as /etc/passwd).
        running &= not Path(self._host.runc_root, self.container, "exec.fifo").exists()
        freezer = self._freezer()
        frozen = running and freezer is not None and freezer.is_frozen()
        return State(True, running, frozen, mounted)

    def _init(self) -> int:
        """The container's first process; 0: it does not run."""
        return int((self._record() or {}).get("init_process_pid") or 0)

    # ---- source

    def check_source(self, live: bool) -> Facts:
        config = bundles.read(self._config.bundle)
        host_fit.check_source(config)
        self._check_network(config)
        running = self.state().running
        self._check_places(used=running)
        places = self._moving()
        external = self._config.external
        sources = contents.check_config(config, self._config.bundle, places, external)
        facts: Facts = {
            "mounts": self._places(),
            "config": config,
            "paths": sources.paths,
            "external": list(external),
            "kinds": sources.kinds,
        }
        self._left += leftovers.annotations_of(config)
        if running:
            contents.check_root(self._init(), self._root_of(config))
        if live:
            facts["criu"] = list(criu.version(self._host.criu))
            criu.probe(self._host.criu)
            freezer = self._freezer()
            if freezer is None:
                raise MigrateError(
                    VzExitCode.DUMP_FAILED, f"{self.container} has no freezer cgroup"
                )
            facts["memory"] = self._told = self._memory_of(freezer)
            self._check_memory(facts)
            cgroup.check_none_stopped(freezer, self.container)
            pids = freezer.pids()
            self._left += members.check(self.container, self._init(), freezer.pids, self.drop_exec)
            contents.check_all_mounted(pids, config, self._config.bundle, places, external)
            self._left += leftovers.all_of(self.container, pids, config, self._cgroups())
            self._watchers = leftovers.watchers(pids)
        return facts

    def _cgroups(self) -> dict[str, str]:
        """Controller -> folder; '' of v2."""
        return (self._record() or {}).get("cgroup_paths") or {}

    def _memory_of(self, freezer: ContainerCgroup) -> int:
        return memory_in_use.memory_of(freezer.pids(), self._cgroups())

    def _moving(self) -> contents.Places:
        return contents.Places(self.folders(), self._config.trees)

    def _root_of(self, config: dict[str, Any]) -> str:
        return os.path.join(self._config.bundle, str(config["root"]["path"]))

    def left_behind(self) -> list[str]:
        left, self._left = self._left, []
        return left

    def _check_network(self, config: dict[str, Any]) -> None:
        """Its sockets are this host's without a network namespace of its own, and
        another host cannot restore those."""
        linux = config.get("linux")
        found = linux.get("namespaces") if isinstance(linux, dict) else None
        own = any(isinstance(n, dict) and n.get("type") == "network" for n in found or ())
        if not own and "network" in self._config.policy.namespaces:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{self._config.bundle}/{bundles.CONFIG} has no network namespace: the container "
                "uses the network of this host, which cannot be moved",
            )

    def items(self) -> list[Item]:
        return [Item("config.json", f"{self._config.bundle}/{bundles.CONFIG}")]

    def suspend(self) -> None:
        freezer = self._freezer()
        if freezer is None:
            raise MigrateError(VzExitCode.DUMP_FAILED, f"{self.container} has no freezer cgroup")
        cgroup.check_none_stopped(freezer, self.container)
        memory_in_use.check_growth(self.container, self._told, self._memory_of(freezer))
        # A packet taken in after its socket is dumped would be lost.
        link = self._start_link(self._config.link_down)
        try:
            cgroup.freeze(freezer, self.container)
        finally:
            self._end_link(link, VzExitCode.DUMP_FAILED)

    def _start_link(self, argv: tuple[str, ...]) -> Command | None:
        try:
            return Command(argv) if argv else None
        except OSError as e:
            raise MigrateError(VzExitCode.DUMP_FAILED, f"{argv[0]}: {e.strerror}") from e

    def _end_link(self, link: Command | None, code: int) -> None:
        if link is None:
            return
        try:
            status, said = link.wait(self._host.command_timeout)
        except TimeoutError as e:
            raise MigrateError(code, f"{' '.join(link.argv)}: {e}") from e
        if status:
            raise MigrateError(
                code, f"{' '.join(link.argv)} ended with {status}: {last_words(said)}"
            )

    def resume(self) -> None:
        # Both, whatever fails: a checkpoint that failed leaves both behind.
        try:
            self._end_link(self._start_link(self._config.link_up), VzExitCode.DUMP_FAILED)
        finally:
            if freezer := self._freezer():
                freezer.thaw()

    def why_no_pre_dump(self) -> str:
        return memory_tracking.problem(self._host.criu)

    def pre_dump(self, images: Path, parent: Path | None) -> float | None:
        if freezer := self._freezer():
            cgroup.check_none_stopped(freezer, self.container)
        return memory_tracking.frozen_seconds(self._checkpoint("--pre-dump", images, parent))

    def dump(self, images: Path, parent: Path | None = None) -> None:
        self._checkpoint("--leave-running", images, parent, self._check_suspended)

    def _check_suspended(self) -> None:
        """Nobody has come since `check_source` who would be lost."""
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
        """CRIU's working folder.  meanwhile: done while CRIU gets ready."""
        bundles.forget_hook(self._config.bundle)
        work = images.with_name(f"{images.name}-work")
        work.mkdir(mode=0o700)
        command = [*self._runc(), "checkpoint", how]
        command += ["--image-path", str(images), "--work-path", str(work)]
        if parent is not None:
            command += ["--parent-path", os.path.relpath(parent, images)]
        command += [*self._config.options, self.container]
        self._criu(
            command, work / "dump.log", VzExitCode.DUMP_FAILED, "cannot checkpoint", meanwhile
        )
        return work

    def _runc(self) -> list[str]:
        return [self._host.runc, "--root", self._host.runc_root, "--criu", self._host.criu]

    def _criu(
        self,
        argv: list[str],
        log: Path,
        code: int,
        what: str,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        try:
            run(argv, code, self._host.command_timeout, self.keep_fds, meanwhile=meanwhile)
        except members.LostProcessError:
            raise
        except MigrateError as e:
            why = criu.errors_of(log) or str(e)
            raise MigrateError(code, f"{what} {self.container}: {why}") from e

    def kill(self) -> None:
        if freezer := self._freezer():
            freezer.kill()
        if self._record() is not None:
            run(
                [*self._runc(), "delete", "--force", self.container],
                VzExitCode.DUMP_FAILED,
                self._host.command_timeout,
            )

    def stop(self) -> None:
        pid = self._init()
        if pid and self.state().running:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + self._config.stop_timeout
            while self.state().running and time.monotonic() < deadline:
                time.sleep(0.02)
        self.kill()
        self._end_link(self._start_link(self._config.link_down), VzExitCode.DUMP_FAILED)

    def start(self) -> None:
        self._mount_all()
        if not self.state().exists:
            self._run()
        self._end_link(self._start_link(self._config.link_up), VzExitCode.RESTORE_FAILED)

    def _run(self) -> None:
        command = [*self._runc(), "run", "--detach", "--bundle", self._config.bundle]
        command.append(self.container)
        run(
            command,
            VzExitCode.RESTORE_FAILED,
            self._host.command_timeout,
            self.keep_fds,
            silent=True,
        )

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

    # ---- target

    def check_target(self, facts: Facts, live: bool) -> None:
        if self._record() is not None:
            raise MigrateError(VzExitCode.EXISTS, f"{self.container} exists")
        if Path(self._config.bundle, bundles.CONFIG).exists():
            raise MigrateError(VzExitCode.EXISTS, f"{self._config.bundle} holds a {bundles.CONFIG}")
        mounts = facts.get("mounts")
        if (
            not isinstance(mounts, list)
            or len(mounts) != len(self._places())
            or not all(isinstance(m, str) and m.startswith("/") for m in mounts)
        ):
            raise MigrateError(
                VzExitCode.BAD_CONFIG, "the two hosts configure another number of disks or trees"
            )
        config = self._fitted(facts.get("config"), facts)
        contents.check_external(self._config.external, facts.get("kinds") or ())
        host_fit.check_target(config, live)
        self._check_access()
        if not live:
            return
        ours, theirs = criu.version(self._host.criu), _version(facts.get("criu"))
        if ours < theirs:
            raise MigrateError(
                VzExitCode.CHECKPOINT_VERSION,
                f"CRIU {ours} here is older than the source's {theirs}",
            )
        criu.probe(self._host.criu)
        self._check_memory(facts)

    def _check_memory(self, facts: Facts) -> None:
        """There is room for the dump, on either host.  MigrateError(6)."""
        need = int(_size(facts.get("memory")) * (1 + PREVIEW))
        st = os.statvfs(self._host.images_dir)
        if st.f_bavail * st.f_frsize < need:
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"{self._host.images_dir} has no room for {need >> 20} MiB of memory",
            )

    def _fitted(self, config: Any, facts: Facts) -> dict[str, Any]:
        """The source's config.json with our paths, all of which are known here."""
        return bundles.adapt(config, *self._mapping(facts), self._config)

    def _mapping(self, facts: Facts) -> tuple[dict[str, str], dict[str, str]]:
        """For bundles.adapt: the source's paths as its configuration writes them,
        and its mount points, trees and external paths -> ours."""
        theirs, ours = facts.get("external"), self._config.external
        if theirs is None:  # an older source: its paths are taken as they are
            theirs = ours
        if len(theirs) != len(ours):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the configuration of {self.container} has {len(ours)} external paths here, that "
                f"of the source {len(theirs)}: they must be the same, in the same order",
            )
        pairs = zip([*facts["mounts"], *theirs], [*self._places(), *ours], strict=True)
        return dict(facts.get("paths") or {}), dict(pairs)

    def destination(self, label: str) -> str:
        if label != "config.json":
            raise MigrateError(
                VzExitCode.COPY_FAILED, f"no item {label!r} belongs to a runc container"
            )
        return f"{self._config.bundle}/{bundles.RECEIVED}"

    def largest(self, label: str) -> int:
        return bundles.LARGEST

    def makes(self, facts: Facts) -> list[str]:
        return [f"{self._config.bundle}/{name}" for name in (bundles.CONFIG, bundles.CRIU)]

    def placed(self, facts: Facts) -> None:
        received = bundles.read(self._config.bundle, bundles.RECEIVED)
        config = self._fitted(received, facts)
        if config != self._fitted(facts.get("config"), facts):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                "config.json has changed since it was checked: migrate it again",
            )
        (Path(self._config.bundle) / bundles.RECEIVED).unlink()
        bundles.write(self._config.bundle, config)
        self._written = config
        # Nothing may answer in its place before the restore.
        self._end_link(self._start_link(self._config.link_down), VzExitCode.BAD_CONFIG)

    def check_images(self, images: Path) -> None:
        if self._written is None:
            raise MigrateError(VzExitCode.BAD_CONFIG, "the dump came before config.json")
        policy = self._config.policy
        image_check.check(images, self._written, (*policy.apparmor, *policy.selinux))

    def release(self) -> None:
        super().release()
        for path in bundles.paths_of(self._written or {}):
            for place in self._places():
                if path != place and within(path, place):
                    self._check_no_link(path, place)
        if self._written is not None:
            destinations.check(self._written)

    def _check_no_link(self, path: str, place: str) -> None:
        """The disk has come: a link on it could lead runc anywhere on this host."""
        try:
            with beneath.place(path, place) as at:
                mode = os.lstat(at.name, dir_fd=at.dir_fd).st_mode
        except OSError as e:
            raise MigrateError(VzExitCode.BAD_CONFIG, f"{path} of config.json: {e.strerror}") from e
        if stat.S_ISLNK(mode):
            raise MigrateError(VzExitCode.BAD_CONFIG, f"{path} of config.json is a symbolic link")

    def undump(self, images: Path, commit: Callable[[], None]) -> None:
        work = images.parent / "restore-work"
        work.mkdir(mode=0o700)
        argv = [*self._runc(), "restore", "--detach", "--bundle", self._config.bundle]
        argv += ["--image-path", str(images), "--work-path", str(work)]
        argv += [*self._config.options, self.container]

        def unlock() -> None:
            commit()
            # With an agent that is killed here the restore ends, too: a link that came
            # up after that would answer the peers in its place, with resets.
            up = self._config.link_up
            argv = ("setpriv", "--pdeathsig", "KILL", "--", *up) if up else ()
            self._end_link(self._start_link(argv), VzExitCode.RESTORE_FAILED)

        with criu.Hook(images.parent, unlock) as hook:
            bundles.write_criu(self._config.bundle, hook.script)
            try:
                # CRIU leaves its own groups to a process that had none.
                command = Command(argv, self.keep_fds, silent=True, groups=())
                status, said = hook.serve(command, self._host.command_timeout)
            except OSError as e:
                status, said = -1, str(e)
            bundles.write_criu(self._config.bundle, None)
        if status == 0 and hook.unlocked:
            return
        if isinstance(hook.refusal, PyploopError):
            raise hook.refusal
        why = criu.errors_of(work / "restore.log") or last_words(said)
        raise MigrateError(VzExitCode.RESTORE_FAILED, f"cannot restore {self.container}: {why}")

    def abandon(self) -> None:
        # Down first: nothing of what ends here may reach the peers.
        try:
            self._end_link(self._start_link(self._config.link_down), VzExitCode.RESTORE_FAILED)
        finally:
            self.kill()


def _version(value: Any) -> tuple[int, ...]:
    """Of CRIU, as the source told it; () for none."""
    if not isinstance(value, list) or not all(type(v) is int for v in value):
        return ()
    return tuple(value)


def _size(value: Any) -> int:
    """Bytes, as the source told them.  MigrateError(15) for what is no size."""
    if type(value) is not int and value is not None:
        raise MigrateError(
            VzExitCode.BAD_CONFIG, f"the source told {str(value)[:40]!r} bytes of memory"
        )
    return min(max(value or 0, 0), 1 << 60)
