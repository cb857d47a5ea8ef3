# SPDX-License-Identifier: Apache-2.0
"""The steps of a migration on the source, of a container of Podman."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Copied, Facts, Item, copied
from pyploop.runtimes.checks import Checks
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.oci import bundles
from pyploop.runtimes.podman import (
    extras,
    image,
    links,
    movable,
    networks,
    restored,
    sharing,
    systemd,
    wanted,
    watches,
)
from pyploop.runtimes.podman.container import PodmanContainer
from pyploop.runtimes.podman.exported import Exported, export
from pyploop.runtimes.podman.found import Found
from pyploop.runtimes.podman.host import PodmanHost, look
from pyploop.runtimes.runc import contents, host_fit, tmpfs
from pyploop.runtimes.runc.source import SourceSteps, work_of

LOG = "output"
"""Label of a static file."""
_FIRST = (
    *("podman-rootless", "podman-version", "podman-storage", "podman-runtime", "podman-running"),
    *("podman-root", "podman-pod", "podman-privileged", "podman-users", "network-namespace"),
    "podman-dependencies",
)
"""Where one of these fails, what follows could not be checked, or would say it once more."""


class PodmanSource(PodmanContainer, SourceSteps):
    """The source's part of a Runtime."""

    def __init__(self, host: HostConfig, container: str) -> None:
        super().__init__(host, container)
        self._images = Path()
        """Folder of the dump."""
        self._criu_options: Path | None = None
        self._wanted = wanted.NOTHING
        self._lost: list[str] = []
        """Addresses that the container will not have there."""
        self._log_sent = 0
        """Bytes of the output that went ahead."""
        self._files: list[IO[bytes]] = []
        """Static files without a name, as long as they are needed."""

    # ---- checks

    def rewire(self, networks: Sequence[str], ports: Sequence[str]) -> None:
        self._wanted = wanted.parse(networks, ports)

    def _rewired(self, exported: Exported) -> Exported:
        """As --network and --publish say.  MigrateError(15)."""
        self._lost = self._wanted.lost(exported)
        if self._lost:
            wanted.check_sockets(self._init(), self._lost)
            self._left.append(
                f"The container loses {', '.join(self._lost)} (--network): its TCP connections end"
            )
        return self._wanted.put_into(exported)

    def check_source(self, live: bool) -> Facts:
        found, checks = self._need_found(), Checks()
        here = look(self._podman, checks)
        movable.check(self._podman, found, here, checks)
        with checks.named("podman-rm"):
            movable.check_removal(found, live=live, stays=self.keeps_source)
        with checks.named("podman-running"):
            if found.status != "running":
                raise MigrateError(
                    VzExitCode.STOPPED,
                    f"container {found.name} is {found.status}: Podman exports the description "
                    "that another host needs only of a running container, without --live, too",
                    hint=f"podman start {found.name}, and podman stop on the other host afterwards",
                )
        if any(checks.has(name) for name in _FIRST):
            checks.end()
        with checks.named("config-json"):
            config = bundles.read(found.bundle)
        if checks.has("config-json"):
            checks.end()
        with checks.named("podman-mount"):
            movable.check_mounts(config, found.name)
        with checks.named("podman-namespaces"):
            movable.check_namespaces(config, found.name)
        if checks.has("podman-mount") or checks.has("podman-namespaces"):
            checks.end()
        with checks.named("config-host"):
            host_fit.check_source(self._alone(config))
        self._own_users = tmpfs.has_own_users(config)
        with checks.named("places"):
            self._check_places(used=True)
        if live and found.namespace:
            with checks.named("podman-link"):
                self._need_links(found.namespace)
        allowed = self._host.podman_external
        with checks.named("podman-shared"):
            self._check_alone()
        external, unknown = movable.external(config, found, here, self._config, allowed)
        for path in unknown:
            with checks.named("podman-bind"):
                movable.check_bind(path, found.name)
        with checks.named("root"):
            contents.check_root(self._init(), found.merged)
        facts: Facts = {
            "config": config,
            "external": external,
            "kinds": [contents.kind_of(path) for path in external],
        }
        # The target checks all else even if some binds are refused here.
        owned = [*movable.owned(config, found, here), *unknown]
        with checks.named("podman-description"):
            facts["podman"] = self._description(found, here, owned, checks)
        if live:
            places = contents.Places([found.merged], self._config.trees[1:])
            self._check_live(config, places, [*external, *owned], facts, checks)
        if not found.log:
            kind = found.raw["HostConfig"].get("LogConfig", {}).get("Type")
            self._left.append(
                f"Does not move: the output so far, which the log driver {kind} keeps on this host"
            )
        checks.end(facts if "podman" in facts else None)
        return facts

    def _description(
        self, found: Found, here: PodmanHost, owned: list[str], checks: Checks
    ) -> dict[str, Any]:
        """What the target's Podman needs to make the container.  owned: sources of binds that it
        makes itself.  MigrateError(15)."""
        exported = export(self._podman, found, self._host.criu)
        movable.check_exported(exported.config, found)
        with checks.named("podman-network"):
            exported = self._rewired(exported)
        # Of other networks only the target knows what they are.
        kept = () if self._wanted.networks else exported.config.get("newNetworks") or ()
        units = systemd.find(self._podman.timeout, found.id, found.name)
        self.instance["units"] = [unit.sent() for unit in units]
        self._left += [
            f"Does not move: the systemd unit {unit.name}, which is disabled here: {unit.why}"
            for unit in units
            if unit.why
        ]
        return {
            "host": here.told(),
            "config": exported.config,
            "network": exported.network,
            "networks": networks.sent(self._podman, kept),
            "image": image.find(self._podman, str(found.raw["Image"])).sent(),
            "units": self.instance["units"],
            "readdressed": bool(self._lost),
            "root": found.merged,
            "volumes": {v.name: v.path for v in found.volumes},
            "binds": [b for b in found.binds if self._is_moved(b)],
            "owned": owned,
        }

    def _alone(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json without what it shares with containers that move, too."""
        return config

    def _need_found(self) -> Found:
        if self._found is None:
            raise MigrateError(
                VzExitCode.NO_CONTAINER, f"Podman has no container {self.container} on this host"
            )
        if self._found.name != self.container:
            # Locks and records go by the name.
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{self.container} is the ID of the container {self._found.name}",
                hint=f"name it: podman:{self._found.name}",
            )
        return self._found

    def _check_alone(self) -> None:
        """MigrateError(15) when another container uses what is removed when this one has moved."""
        folders = self._config.trees[1:]
        moving = {self.runc_id, *(self._found.together if self._found else ())}
        sharing.check(self._podman, self._host.runc_root, self.container, folders, moving)

    def _need_links(self, namespace: str) -> None:
        """MigrateError(15) when a link cannot be cut."""
        try:
            links.host_ends(namespace)
        except OSError as e:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"cannot look at the network of {self.container} ({namespace}): {e.strerror}",
            ) from e

    def _streams(self) -> Sequence[str]:
        """Podman's monitor has their other ends, here and there."""
        found = []
        for number in range(3):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{self._init()}/fd/{number}"))
        return found

    # ---- static files

    def items(self) -> list[Item]:
        found = self._need_found()
        made: list[Item] = []
        if image.CONFIG in self.peer_wants:
            made += image.save(
                self._podman, str(found.raw["Image"]), self.peer_wants, self._unnamed
            )
        if found.log and (path := self._copied_log(found.log)):
            made.append(Item(LOG, path))
        return made

    def _unnamed(self) -> IO[bytes]:
        """A file without a name on the disk of Podman's storage.  It goes with this process."""
        folder = os.path.dirname(self._need_found().bundle)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `discard` or the end closes it
        self._files.append(file)
        return file

    def _copied_log(self, log: str) -> str:
        """The output so far, which grows meanwhile; empty when there is none."""
        try:
            with open(log, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                if not size:
                    return ""
                file = self._unnamed()
                shutil.copyfileobj(f, file)
                file.flush()
        except OSError as e:
            raise MigrateError(
                VzExitCode.COPY_FAILED, f"cannot copy the output {log}: {e.strerror}", path=log
            ) from e
        self._log_sent = os.fstat(file.fileno()).st_size
        return f"/proc/self/fd/{file.fileno()}"

    # ---- suspend and dump

    def _checkpoint_argv(self, how: str, images: Path, parent: Path | None) -> list[str]:
        argv = super()._checkpoint_argv(how, images, parent)
        freezer = self._freezer()
        watched = watches.paths([self._init(), *freezer.pids()]) if freezer is not None else []
        lines = [f"irmap-scan-path {p}" for p in watched]
        self._criu_options = restored.criu_options(work_of(images), *lines)
        self._images = images
        return argv

    def _criu_environment(self) -> dict[str, str]:
        made = super()._criu_environment()
        if self._criu_options is not None:
            made["CRIU_CONFIG_FILE"] = str(self._criu_options)
        return made

    def _check_suspended(self) -> None:
        super()._check_suspended()
        found = self._need_found()
        extras.pack_shm(found.bundle, self._images)
        if found.log:
            extras.pack_log(found.log, self._log_sent, self._init(), self._images)

    # ---- afterwards

    def kill(self) -> None:
        systemd.release(self._units, self._podman.timeout)
        if not self._exists():
            return
        self._hold_processes()
        # Podman notes that its user has stopped it.  Else it might start it again, as its
        # restart policy says, when the processes end.
        self._podman.run(
            *("container", "stop", "-t", "0", self.runc_id), code=VzExitCode.DUMP_FAILED
        )
        systemd.stop(self._units, self._podman.timeout)

    def resume(self) -> None:
        super().resume()
        status = self._podman.tried(
            *("container", "inspect", "--format", "{{.State.Status}}", self.runc_id)
        )[1]
        freezer = self._freezer()
        if status.strip() == "paused" and freezer is not None:
            # By somebody's `podman pause`, meanwhile.  Podman must know that it runs again, and
            # resumes only what is frozen.
            try:
                freezer.freeze()
                self._podman.run("container", "unpause", self.runc_id, code=VzExitCode.DUMP_FAILED)
            finally:
                freezer.thaw()

    def start(self) -> None:
        if not self.state().running:
            self._podman.run("container", "start", self.runc_id, code=VzExitCode.RESTORE_FAILED)
        systemd.start(self._units, self._podman.timeout)

    def discard(self, remove: bool, known: Copied | None) -> None:
        self._files.clear()
        if not remove:
            if self._exists() and self._found is not None and self._found.name == self.container:
                # Its own name would lead to the stale container.
                self._podman.tried(
                    "container", "rename", self.runc_id, f"{self.container}.migrated"
                )
            return
        systemd.remove(self._units, self._podman.timeout)
        # Another one may have got its name since.
        ours = self._found is not None and self._found.id == self.runc_id
        if ours:
            self._check_alone()  # again: somebody may have started another one meanwhile
        for tree in self._config.trees if ours else ():
            copied.check_same(tree, known)
        if self._exists():
            # With --rm Podman may be doing it just now.
            self._podman.run(
                *("container", "rm", "-f", "-t", "0", "--ignore", "--volumes", self.runc_id),
                code=VzExitCode.DUMP_FAILED,
            )
        for name, path in self.instance["volumes"].items():
            if self._podman.says_yes("volume", "exists", name):
                copied.check_same(path, known)
                self._podman.run("volume", "rm", name, code=VzExitCode.DUMP_FAILED)
        for path in self._found.binds if ours and self._found is not None else ():
            if self._is_moved(path):
                copied.remove_tree(path, known)
                with contextlib.suppress(OSError):
                    os.rmdir(path)
