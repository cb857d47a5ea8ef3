# SPDX-License-Identifier: Apache-2.0
"""The steps of a migration on the target, of a container of Podman."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import LARGEST_FILE, Facts
from pyploop.runtimes.checks import Checks, naming
from pyploop.runtimes.config import ContainerConfig, HostConfig
from pyploop.runtimes.oci import bundles, config_json, criu_images, destinations
from pyploop.runtimes.podman import extras, fitting, image, links, networks, systemd
from pyploop.runtimes.podman.container import STAGE, PodmanContainer
from pyploop.runtimes.podman.exported import Exported
from pyploop.runtimes.podman.fitting import Coming
from pyploop.runtimes.podman.host import PodmanHost, look
from pyploop.runtimes.podman.new_volumes import NewVolumes
from pyploop.runtimes.podman.placed import Placed
from pyploop.runtimes.podman.restored import FOLDER, Order
from pyploop.runtimes.podman.source import LOG
from pyploop.runtimes.runc import contents, criu_gate, host_fit
from pyploop.runtimes.runc.target import TargetSteps, work_of
from pyploop.system import kernel
from pyploop.system.commands import Command, last_words


class PodmanTarget(PodmanContainer, TargetSteps):
    """The target's part of a Runtime."""

    _unset: tuple[str, ...] = ()
    """What could not be set after the commit, in words."""

    def __init__(self, host: HostConfig, container: str) -> None:
        super().__init__(host, container)
        self._here: PodmanHost | None = None
        self._coming: Coming | None = None
        self._spec: dict[str, Any] = {}
        """The source's config.json."""
        self._images: Path = Path()
        self._pod = ("", "")
        """The ID of its pod on this host, and the folder that is its /dev/shm, if it is shared."""
        self.wants: frozenset[str] = frozenset()
        self._settings: dict[str, str] = {}
        """Of its network namespace."""

    # ---- checks

    def check_target(self, facts: Facts, live: bool) -> None:
        found = Checks()
        self._here = here = look(self._podman, found)
        with naming("podman-description"):
            self._coming = it = fitting.coming(facts)
        fitting.check(self._podman, self.container, here, it, found, live=live)
        known = self._podman.says_yes("image", "exists", it.image.id)
        self.wants = frozenset() if known else image.lacking(self._podman, it.image)
        self.instance = {
            "id": it.id,
            "volumes": {v: f"{here.volumes}/{v}/_data" for v in it.volumes},
            "image": it.image.id,
            "image_known": known,
            "image_names": image.free_names(self._podman, it.image),
            "graph": here.graph_root,
            "units": [unit.sent() for unit in it.units],
            "removes_itself": it.removes_itself,
            "health": systemd.interval_of(it.exported.config),
        }
        self._config = self._coming_config(it, here)
        self.lazy = self._lazy_restore()
        with found.named("exists"):
            self._check_stage()
        with found.named("external"):
            contents.check_external(it.external, facts.get("kinds") or ())
        self._check_config(facts, live, found)
        if live:
            self._check_live_target(facts, found)
        found.end()

    def _check_stage(self) -> None:
        stage = Path(self._stage)
        if stage.exists() and any(not p.name.endswith(".pyploop-kept") for p in stage.iterdir()):
            raise MigrateError(
                VzExitCode.EXISTS,
                f"{stage} has what an earlier migration of this container has left: remove it",
                path=str(stage),
            )

    def _check_config(self, facts: Facts, live: bool, found: Checks) -> None:
        it = self._coming
        assert it is not None
        self._spec = dict(facts.get("config") or {})
        config: dict[str, Any] | None = None
        with found.named("policy"):
            config = self._fitted_spec(self._spec, it.root, list(it.volumes.values()))
            self.lazy.limit = bundles.memory_limit(config)
        if config is not None:
            namespaces = config["linux"]["namespaces"]
            config["linux"]["namespaces"] = [{"type": n["type"]} for n in namespaces]
            with found.named("config-host"):
                host_fit.check_target(config, live)
            self._settings = networks.settings(config)

    @property
    def _new_volumes(self) -> NewVolumes:
        return NewVolumes(self._podman, self.runc_id)

    @property
    def _stage(self) -> str:
        return f"{self.instance['graph']}/{STAGE}/{self.runc_id}"

    def _coming_config(self, it: Coming, here: PodmanHost) -> ContainerConfig:
        staged = [f"{self._stage}/volume-{n}" for n in range(len(it.volumes))]
        return replace(
            self._config,
            bundle=f"{here.folders_of(it.id)[1]}/userdata",
            trees=(f"{self._stage}/root", *staged, *it.binds),
            external=tuple(it.external),
        )

    def _fitted_spec(self, spec: Any, root: str, volumes: list[str]) -> dict[str, Any]:
        """A config.json within this host's policy.  root, volumes: as it names them."""
        it = self._coming
        assert it is not None
        namespaces = ((spec.get("linux") or {}).get("namespaces") or ()) if spec else ()
        own = [str(n.get("path") or "") for n in namespaces if n.get("type") == "network"]
        label = str((spec.get("process") or {}).get("apparmorProfile") or "")
        policy = self._config.policy
        if label.startswith("containers-default-"):  # Podman loads it itself
            policy = replace(policy, apparmor=(*policy.apparmor, label))
        ours = replace(
            self._config,
            trees=(root, *volumes, *it.binds),
            external=(*it.external, *map(os.path.realpath, it.external), *it.owned),
            netns=own[0] if own else "",
            cgroup=str((spec.get("linux") or {}).get("cgroupsPath") or ""),
            policy=policy,
        )
        return config_json.fit(spec, {}, {}, ours, "/dev/null")

    # ---- files

    def destination(self, label: str) -> str:
        if label != LOG and label not in self.wants:
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"the source sends the file {label[:80]!r}, which no container of Podman has",
            )
        return f"{self._stage}/{label}"

    def largest(self, label: str) -> int:
        return LARGEST_FILE

    def makes(self, facts: Facts) -> list[str]:
        return [f"{self._stage}/{image.ARCHIVE}"] if self.wants else []

    def placed(self, facts: Facts) -> None:
        assert self._coming is not None
        coming = self._coming.image
        if Path(self._stage, image.CONFIG).exists():
            image.load(self._podman, coming, Path(self._stage))
        if not self._podman.says_yes("image", "exists", coming.id):
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"the image {coming.id[:12]} of the container did not come to this host",
            )
        image.name(self._podman, coming.id, self.instance["image_names"])

    # ---- restore

    first_image = ""

    def prepare_undump(self, images: Path) -> str:
        """Unlike runc's, this must succeed: what fails here would fail while the container is
        suspended."""
        self._images = images
        lazy = self.lazy.choice.lazy
        work = self.lazy.work if lazy else work_of(images)
        argv = self._restore_argv(images, work, *(["--lazy-pages"] if lazy else ()))
        if why := self._start(images, argv):
            raise MigrateError(VzExitCode.RESTORE_FAILED, f"cannot start podman: {why}")
        self._need_ready()
        return ""

    def _restore_argv(self, images: Path, work: Path, *options: str) -> list[str]:
        command = str(images.parent / FOLDER / "restore")
        return [command, "--criu", self._host.criu, str(images), str(work), *options]

    def _start(self, images: Path, argv: list[str]) -> str:
        it = self._coming
        assert it is not None and self._here is not None
        _, _, _, _, work, *options = argv
        Path(work).mkdir(mode=0o700, exist_ok=True)
        if self._exists():  # of a restore that has failed
            self._clear()
        fitting.check_volumes(self._podman, it)
        self._new_volumes.make(it.volumes, it.image.id)
        programs = {
            "podman": self._podman.program,
            "conmon": self._here.conmon,
            "runc": self._here.runc,
        }
        try:
            order = Order(images.parent / FOLDER)
            order.write(
                self._named(it.exported),
                self._spec,
                programs=programs,
                close=self.keep_fds,
                images=images,
                work=Path(work),
                options=options,
                pod=self._pod,
                close_tcp=it.readdressed,
            )
        except OSError as e:
            return f"{e.filename}: {e.strerror}"
        if it.networks:
            links.block(it.id, it.addresses)
        # Its output may say what fails, and no process of the container inherits it.
        criu = self._host.criu
        return self._early.start(images, "restore", argv, criu, self.keep_fds, groups=())

    def _named(self, exported: Exported) -> Exported:
        """With a name of the image that leads to that image here."""
        config = dict(exported.config)
        name = str(config.get("rootfsImageName") or "")
        if not name or image.id_of(self._podman, name) != config["rootfsImageID"]:
            config["rootfsImageName"] = config["rootfsImageID"]
        return replace(exported, config=config)

    def _need_ready(self) -> None:
        """Podman has made the container, and its link is down.  MigrateError(7)."""
        try:
            if not self._early.ready(self._host.command_timeout):
                _, output = self._early.drop() or (-1, "")
                raise MigrateError(
                    VzExitCode.RESTORE_FAILED,
                    f"podman cannot restore {self.container}: {last_words(output)}",
                )
            self._cut()
            if not self.instance.get("removes_itself"):
                self._new_volumes.remove()  # the container has them now
        except OSError as e:  # TimeoutError is one
            self._early.drop(patience=0.0)
            raise MigrateError(
                VzExitCode.RESTORE_FAILED,
                f"podman does not restore {self.container}: {e.strerror or e}",
            ) from e

    def _cut(self) -> None:
        """Set the container's links down, before they are let go."""
        namespaces = bundles.read(self._config.bundle)["linux"]["namespaces"]
        paths = [n.get("path") for n in namespaces if n.get("type") == "network"]
        if paths and paths[0]:
            self._config = replace(
                self._config,
                link_up=self._link_command(str(paths[0]), True),
                link_down=self._link_command(str(paths[0]), False),
            )
            self._link(self._config.link_down, VzExitCode.RESTORE_FAILED)
            networks.set_all(str(paths[0]), self._settings)
        links.unblock(self.runc_id)

    def _awaits_root(self) -> bool:
        try:
            waits = bool(self._early.argv) and self._early.ready(self._host.command_timeout)
        except TimeoutError:
            return False
        return waits and self._early.kind == criu_gate.VERSION

    def _let_go(self) -> tuple[Command, Any] | None:
        if not self._early.ready(self._host.command_timeout):
            return None
        if self._early.kind == criu_gate.VERSION and not self._early.advanced:
            self._cut()
            self._fill()
        return super()._let_go()

    def _placed(self) -> Placed:
        known = self.instance
        return Placed(known["graph"], self._stage, list(known["volumes"].values()))

    def _fill(self) -> None:
        """Put the container's files into the places that Podman has made for them."""
        try:
            self._placed().put(self._written_config()["root"]["path"])
            extras.unpack_shm(self._config.bundle, self._images)
            log, before = f"{self._config.bundle}/ctr.log", Path(self._stage, LOG)
            extras.unpack_log(log, before, self._images)
            # Now: nobody would do it for an agent that is killed after the commit.
            self._placed().tidy()
        except OSError as e:
            raise MigrateError(
                VzExitCode.RESTORE_FAILED,
                f"cannot put the files of {self.container} into their place: {e.filename}: "
                f"{e.strerror}",
            ) from e
        destinations.check(self._written_config())

    def _written_config(self) -> dict[str, Any]:
        """The config.json that Podman has written here, within the policy."""
        if self._written is None:
            spec = bundles.read(self._config.bundle)
            volumes = list(self.instance["volumes"].values())
            root = str((spec.get("root") or {}).get("path") or "")
            self._placed().check_root(root)
            self._written = self._fitted_spec(spec, root, volumes)
        return self._written

    def check_images(self, images: Path) -> None:
        self._moves.start()
        policy = self._config.policy
        config = self._written_config()
        own = str(config["process"].get("apparmorProfile") or "")
        labels = [*policy.apparmor, *policy.selinux, *([own] if own else [])]
        criu_images.check(images, config, labels)

    def release(self) -> None:
        pass  # `_fill` does it

    def undump(self, images: Path, commit: Callable[[], None]) -> None:
        super().undump(images, commit)
        if not self._config.link_up:
            # CRIU has made the namespace, in which nothing comes in yet, and sets none of them.
            try:
                networks.set_all(f"/proc/{self._init()}/ns/net", self._settings)
            except MigrateError as e:  # it is committed
                self._unset = (f"setting sysctls of the container's network: {e}",)

    def start(self) -> None:
        """Without a dump: Podman makes the container, and starts it when its files are in their
        place."""
        if self._coming is None:
            super().start()
            return
        assert self._here is not None
        self._new_volumes.make(self._coming.volumes, self._coming.image.id)
        with contextlib.ExitStack() as stack:
            folder = Path(self._stage, FOLDER)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            programs = {
                "podman": self._podman.program,
                "conmon": self._here.conmon,
                "runc": self._here.runc,
            }
            order = Order(folder)
            order.write(
                self._named(self._coming.exported),
                self._spec,
                programs=programs,
                close=self.keep_fds,
                pod=self._pod,
            )
            words = [str(folder / "restore"), "--criu", self._host.criu]
            _, output = Command(words, self.keep_fds).wait(self._host.command_timeout)
        if not self._exists():
            raise MigrateError(
                VzExitCode.RESTORE_FAILED,
                f"podman cannot make {self.container}: {last_words(output)}",
            )
        self._new_volumes.remove()
        spec = bundles.read(self._config.bundle)
        root = str((spec.get("root") or {}).get("path") or "")
        self._placed().check_root(root)
        self._placed().put(root)
        extras.unpack_log(f"{self._config.bundle}/ctr.log", Path(self._stage, LOG), None)
        self._podman.run("container", "start", self.runc_id, code=VzExitCode.RESTORE_FAILED)
        self._placed().tidy()

    def settled(self) -> list[str]:
        """Its files have been renamed, and a power failure could undo that."""
        graph = str(self.instance.get("graph") or "")
        if graph:
            fd = os.open(graph, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                kernel.syncfs(fd, graph)
            finally:
                os.close(fd)
        if self.instance.get("removes_itself"):
            self._new_volumes.remove()
        return [*self._unset, *(self._started_by_systemd() if graph else ())]

    def _started_by_systemd(self) -> list[str]:
        """Returns what failed, in words."""
        failed = []
        try:
            if self._units:
                systemd.install(self._units, self._podman.timeout)
        except (MigrateError, OSError) as e:
            failed.append(f"installing the container's systemd unit: {e}")
        try:
            if interval := self.instance.get("health"):
                systemd.watch_health(self._podman, self.runc_id, interval)
        except MigrateError as e:
            failed.append(f"starting the container's health checks: {e}")
        return failed

    # ---- undo

    def abandon(self) -> None:
        """Of a later process, too: `instance` names the container that came."""
        if not self.runc_id or "graph" not in self.instance:
            return
        self._clear()
        if known := self.instance.get("image"):
            names, here = self.instance["image_names"], self.instance["image_known"]
            image.remove(self._podman, known, names, came=not here)

    def _clear(self) -> None:
        self._written = None
        ours = self._new_volumes.remove()
        if self._exists():
            ours = True
            self._cut_anyhow()
            self._hold_processes()
            with contextlib.suppress(MigrateError, OSError):
                spec = bundles.read(self._bundle)
                self._placed().take_back(str((spec.get("root") or {}).get("path") or ""))
            self._podman.run(
                *("container", "rm", "-f", "-t", "0", "--ignore", self.runc_id),
                code=VzExitCode.RESTORE_FAILED,
            )
        # Only with one of them: else somebody else has made the volumes.
        for volume in self.instance["volumes"] if ours else ():
            if self._podman.says_yes("volume", "exists", volume):
                self._podman.run("volume", "rm", volume, code=VzExitCode.RESTORE_FAILED)
        links.unblock(self.runc_id)

    @property
    def _bundle(self) -> str:
        return f"{self.instance['graph']}/overlay-containers/{self.runc_id}/userdata"

    def _cut_anyhow(self) -> None:
        """No packet of the ending processes may reach the peers."""
        with contextlib.suppress(MigrateError, OSError, KeyError):
            namespaces = bundles.read(self._bundle)["linux"]["namespaces"]
            for n in namespaces:
                if n.get("type") == "network" and os.path.exists(str(n.get("path") or "")):
                    down = self._link_command(str(n["path"]), False)
                    self._link(down, VzExitCode.RESTORE_FAILED)
