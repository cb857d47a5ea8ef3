# SPDX-License-Identifier: Apache-2.0
"""The steps of a migration on the target: the configuration of a runc container is fitted
to this host, its memory images are checked, and it is restored.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, PyploopError, VzExitCode
from pyploop.runtimes import Facts
from pyploop.runtimes.checks import Checks
from pyploop.runtimes.config import HostConfig, within
from pyploop.runtimes.oci import bundles, criu_images, destinations
from pyploop.runtimes.runc import (
    contents,
    criu,
    criu_gate,
    criu_options,
    host_fit,
    limits,
    local_packets,
    loopback,
    preflight_kernel,
    private_images,
    restored_mounts,
    tmpfs,
)
from pyploop.runtimes.runc.announce import Announcer
from pyploop.runtimes.runc.cgroup_moves import CgroupMoves
from pyploop.runtimes.runc.container import RuncContainer
from pyploop.runtimes.runc.lazy_restore import LazyRestore
from pyploop.system import beneath
from pyploop.system.commands import Command, last_words

PREPARING = 5.0
"""Seconds to wait, before the freeze, until the restore that is started ahead waits."""


def _restoring() -> dict[str, Any]:
    """Options of Command.  A process that had no groups would get those of CRIU."""
    return {"silent": True, "groups": (), "env": tmpfs.environment(tmpfs.PLAIN)}


class _NotRestoredError(MigrateError):
    """CRIU or runc have failed."""

    def __init__(self, text: str, unlocked: bool) -> None:
        """unlocked: the container is committed, and may answer its peers."""
        super().__init__(VzExitCode.RESTORE_FAILED, text)
        self.unlocked = unlocked


class TargetSteps(RuncContainer):
    """The target's part of a Runtime."""

    def __init__(self, host: HostConfig, container: str) -> None:
        super().__init__(host, container)
        self._moves = CgroupMoves()
        self._written: dict[str, Any] | None = None
        """Its config.json, as `placed` has written it."""
        self.lazy: LazyRestore = self._lazy_restore()

    def _lazy_restore(self) -> LazyRestore:
        return LazyRestore(
            self._host.criu, Path(self._host.runc_root) / self.runc_id / "state.json"
        )

    def check_target(self, facts: Facts, live: bool) -> None:
        found = Checks()
        with found.named("exists"):
            self._check_absent()
        with found.named("same-places"):
            self._check_same_places(facts)
        if not found.has("same-places"):
            self._check_config(facts, live, found)
        with found.named("private"):
            self._check_access()
        if live:
            self._check_live_target(facts, found)
        found.end()

    def _check_absent(self) -> None:
        if self._record() is not None:
            raise MigrateError(
                VzExitCode.EXISTS, f"runc has a container {self.container} on this host already"
            )
        if Path(self._config.bundle, bundles.CONFIG).exists():
            raise MigrateError(
                VzExitCode.EXISTS,
                f"{self._config.bundle} has a {bundles.CONFIG} already: move it away",
                path=self._config.bundle,
            )

    def _check_same_places(self, facts: Facts) -> None:
        mounts = facts.get("mounts")
        if (
            not isinstance(mounts, list)
            or len(mounts) != len(self._places())
            or not all(isinstance(m, str) and m.startswith("/") for m in mounts)
        ):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"[container.{self.container}] has another number of disks or trees on this host "
                "than on the source: they must be the same, in the same order",
            )

    def _check_config(self, facts: Facts, live: bool, found: Checks) -> None:
        config: dict[str, Any] | None = None
        with found.named("policy"):
            config = self._fitted(facts.get("config"), facts)
            self.lazy.limit = bundles.memory_limit(config)
        with found.named("external"):
            contents.check_external(self._config.external, facts.get("kinds") or ())
        if config is not None:
            with found.named("config-host"):
                host_fit.check_target(config, live)

    def _check_live_target(self, facts: Facts, found: Checks) -> None:
        with found.named("criu"):
            ours, theirs = criu.version(self._host.criu), version_of(facts.get("criu"))
            if ours < theirs:
                raise MigrateError(
                    VzExitCode.CHECKPOINT_VERSION,
                    f"CRIU {'.'.join(map(str, ours))} on this host is older than "
                    f"{'.'.join(map(str, theirs))} on the source: install that version or a newer "
                    "one",
                )
            criu.probe(self._host.criu)
        with found.named("images-room"):
            self._check_memory(facts)
        with found.named("runc-options"):
            criu_options.check_runc(self._host.runc, "restore", self._config.options)
        if cgroups := facts.get("cgroups"):  # an older source does not tell
            with found.named("cgroups"):
                preflight_kernel.check_cgroups(cgroups)
        with found.named("limits"):
            limits.check(facts.get("limits") or {})
        with found.named("lsm"):
            preflight_kernel.check_labels(facts.get("labels") or ())
        with found.named("seccomp"):
            used = bool(facts.get("filtered"))
            preflight_kernel.check_seccomp(facts.get("config") or {}, used)

    def _fitted(self, config: Any, facts: Facts) -> dict[str, Any]:
        """The source's config.json with the paths of this host."""
        return bundles.adapt(config, *self._mapping(facts), self._config)

    def _mapping(self, facts: Facts) -> tuple[dict[str, str], dict[str, str]]:
        """For bundles.adapt: the source's paths as its migrate.toml writes them, and its mount
        points, trees and external paths -> those of this host."""
        theirs, ours = facts.get("external"), self._config.external
        if theirs is None:  # an older source: the same paths on both hosts
            theirs = ours
        if len(theirs) != len(ours):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"[container.{self.container}] has {len(ours)} external paths on this host, but "
                f"{len(theirs)} on the source: they must be the same, in the same order",
            )
        pairs = zip([*facts["mounts"], *theirs], [*self._places(), *ours], strict=True)
        return dict(facts.get("paths") or {}), dict(pairs)

    # ---- files

    def destination(self, label: str) -> str:
        if label != "config.json":
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"the source sends the file {label[:80]!r}, which no runc container has",
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
                "the source's config.json has changed since it was checked: migrate the container "
                "again",
            )
        (Path(self._config.bundle) / bundles.RECEIVED).unlink()
        options = criu_options.merged(facts.get("criu_options"), self._config.criu_options)
        bundles.write(self._config.bundle, config, options)
        self._written = config
        # Before the restore nothing must answer in the container's place.
        self._link(self._config.link_down, VzExitCode.BAD_CONFIG)

    first_image = "descriptors.json"
    """runc's own.  It reads it before it asks CRIU for the restore."""

    def begin_undump(self) -> None:
        # The processes of the dump are moved soon.
        self._moves.start()
        if self._awaits_root():
            self._early.advance()

    def _awaits_root(self) -> bool:
        """Whether the restore that was started ahead waits, and has not mounted the root:
        runc makes a folder when it does, and the root was not there then."""
        try:
            waits = bool(self._early.argv) and self._early.ready(PREPARING)
        except TimeoutError:
            return False
        mounted = Path(self._host.runc_root, self.runc_id, "criu-root").exists()
        return waits and self._early.kind == criu_gate.VERSION and not mounted

    def give_up(self) -> None:
        self._moves.stop()
        super().give_up()

    def check_images(self, images: Path) -> None:
        self._moves.start()
        private_images.let_read(images.parent, private_images.group_of(self._written or {}))
        if self._written is None:
            raise MigrateError(VzExitCode.BAD_CONFIG, "the source sent the dump before config.json")
        policy = self._config.policy
        criu_images.check(images, self._written, (*policy.apparmor, *policy.selinux))

    def release(self) -> None:
        super().release()
        for path in bundles.paths_of(self._written or {}):
            for place in self._places():
                if path != place and within(path, place):
                    self._check_no_link(path, place)
        if self._written is not None:
            destinations.check(self._written)

    def _check_no_link(self, path: str, place: str) -> None:
        """The disk has arrived.  A link on it could lead runc anywhere on this host."""
        try:
            with beneath.place(path, place) as at:
                mode = os.lstat(at.name, dir_fd=at.dir_fd).st_mode
        except OSError as e:
            raise MigrateError(
                VzExitCode.BAD_CONFIG, f"cannot use {path} of config.json: {e.strerror}", path=path
            ) from e
        if stat.S_ISLNK(mode):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{path} of config.json is a symbolic link, and could lead anywhere on this host",
                path=path,
            )

    # ---- restore

    def undump(self, images: Path, commit: Callable[[], None]) -> None:
        serving = self.lazy.serving()
        if self.lazy.post_copy and not serving:
            raise MigrateError(
                VzExitCode.RESTORE_FAILED,
                f"cannot restore {self.container} with post-copy: {self.lazy.choice.why}",
            )
        if serving:
            try:
                self._restore(images, self.lazy.work, commit, "--lazy-pages")
                return
            except _NotRestoredError as e:
                if e.unlocked or self.lazy.post_copy:
                    raise
                # The images are as they were, and nobody has heard of it.
                self.lazy.failed(str(e))
                self._clear()
        work_of(images).mkdir(mode=0o700, exist_ok=True)  # runc, started ahead, has made it
        self._restore(images, work_of(images), commit)

    def _restore(self, images: Path, work: Path, commit: Callable[[], None], *options: str) -> None:
        argv = self._restore_argv(images, work, *options)
        held = self._hold_packets(images)

        def unlock() -> None:
            if held:
                # All sockets are there.  First, for nobody would do it if this process were
                # killed after the commit.
                local_packets.open_again(held)
            restored_mounts.check(images, self._init())
            commit()
            # If the agent is killed here, the restore ends too.  A link that came up after
            # that would answer the peers with resets, in the container's place.
            up = self._config.link_up
            if up and not self._linked(up):
                argv = ("setpriv", "--pdeathsig", "KILL", "--", *up)
                self._link(argv, VzExitCode.RESTORE_FAILED)
            for announcer in announcers:
                # A neighbour that misses it asks by itself when its entry is too old.
                with contextlib.suppress(OSError):
                    announcer.wait_for_links()
                    announcer.forget_unanswered()
                    announcer.send()

        restoring = criu.Restoring(unlock, self._resuming)
        with contextlib.ExitStack() as sockets:
            announcers = self._announcers(sockets)
            try:
                command, line = self._waiting(images, argv)
                with line:
                    status, output = restoring.serve(command, line, self._host.command_timeout)
            except OSError as e:
                status, output = -1, str(e)
            self._moves.stop()
            if status == 0 and restoring.unlocked:
                # Nobody waits for this.  The kernel takes 10 ms to close a packet socket, and
                # the container is suspended until the source has heard of the restore.
                later = threading.Thread(
                    target=self._announce_again, args=(sockets.pop_all(),), daemon=True
                )
                later.start()
                return
        if isinstance(restoring.refusal, PyploopError):
            raise restoring.refusal
        why = criu.why_failed(work / "restore.log", _runc_log(images), output)
        raise _NotRestoredError(f"cannot restore {self.container}: {why}", restoring.unlocked)

    def _hold_packets(self, images: Path) -> str:
        """While sockets are restored that are connected with each other.  Returns the network
        namespace, or nothing: then the script for its loopback does it, if need be."""
        if not local_packets.available() or not local_packets.in_images([images]):
            return ""
        for path in self._networks():
            local_packets.close(path)
            return path
        (images.parent / loopback.HOLD).write_text(local_packets.RULES)
        return ""

    def _resuming(self) -> None:
        """Committed, and restored: it is about to run.  When this raises, it does not."""

    def prepare_undump(self, images: Path) -> str:
        root = os.path.join(self._config.bundle, str((self._written or {})["root"]["path"]))
        if not os.path.isdir(root):
            return f"{root} is on a disk that is not mounted yet"
        lazy = self.lazy.choice.lazy
        work = self.lazy.work if lazy else work_of(images)
        argv = self._restore_argv(images, work, *(["--lazy-pages"] if lazy else ()))
        why = self._start(images, argv)
        # The source waits, so that all of it is over before the freeze.
        with contextlib.suppress(TimeoutError):
            self._early.ready(PREPARING)
        return why

    def _start(self, images: Path, argv: list[str]) -> str:
        keep, criu_, made = self.keep_fds, self._host.criu, _restoring()
        try:
            made["env"] |= loopback.environment(images.parent, self._written or {})
        except OSError as e:
            return f"{e.filename}: {e.strerror}"
        return self._early.start(images, "restore", argv, criu_, keep, **made)

    def _restore_argv(self, images: Path, work: Path, *options: str) -> list[str]:
        argv = [
            *self._runc(_runc_log(images)),
            "restore",
            "--detach",
            "--bundle",
            self._config.bundle,
        ]
        argv += ["--image-path", str(images), "--work-path", str(work)]
        return [*argv, *self._config.options, *options, self.runc_id]

    def _waiting(self, images: Path, argv: list[str]) -> tuple[Command, socket.socket]:
        """The restore, and where it asks.  It was started ahead, or is started now.  OSError."""
        early = self._early
        try:
            if early.argv == argv and (early.advanced or self._awaits_root()):
                going = self._let_go()
                if going is not None:
                    return going
            early.drop()
            if why := self._start(images, argv):
                raise OSError(why)
            going = self._let_go()
        except TimeoutError:
            early.drop(patience=0.0)
            raise
        if going is None:
            status, output = early.drop() or (-1, "")
            said = criu.runc_errors_of(_runc_log(images)) or last_words(output)
            raise OSError(f"{' '.join(argv)} ended with {status}: {said}")
        return going

    def _let_go(self) -> tuple[Command, socket.socket] | None:
        """None: it has ended.  TimeoutError."""
        early, timeout = self._early, self._host.command_timeout
        if not early.ready(timeout):
            return None
        if early.kind == criu_gate.VERSION:
            early.advance()
            if not early.ready(timeout):
                return None
        return early.go()

    def _networks(self) -> list[str]:
        """Those of its config.json."""
        found = (self._written or {}).get("linux", {}).get("namespaces", ())
        return [n["path"] for n in found if n["type"] == "network" and n.get("path")]

    def _announcers(self, stack: contextlib.ExitStack) -> list[Announcer]:
        made = []
        for path in self._networks():
            with contextlib.suppress(OSError):
                made.append(stack.enter_context(Announcer(path)))
        return made

    def _announce_again(self, sockets: contextlib.ExitStack) -> None:
        """A switch may have missed the first time."""
        with sockets:
            for path in self._networks():
                self._announce(path)

    def _clear(self) -> None:
        """Of a restore that has failed, so that another one may begin."""
        self.kill()

    def abandon(self) -> None:
        # The link goes down first: no packet of the ending processes may reach the peers.
        try:
            self._link(self._config.link_down, VzExitCode.RESTORE_FAILED)
        finally:
            self.kill()
        # Of a restore that was killed before it could remove it.  It would be in the way.
        with contextlib.suppress(OSError):
            Path(self._host.runc_root, self.runc_id).rmdir()


def _runc_log(images: Path) -> Path:
    return images.parent / "runc.log"


def work_of(images: Path) -> Path:
    """CRIU's working folder of a restore."""
    return images.parent / "restore-work"


def version_of(value: Any) -> tuple[int, ...]:
    """CRIU's version, as the source sent it; () when it sent none."""
    if not isinstance(value, list) or not all(type(v) is int for v in value):
        return ()
    return tuple(value)
