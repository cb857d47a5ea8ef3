# SPDX-License-Identifier: Apache-2.0
"""The steps of a migration on the source, of a pod of Podman."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Copied, Disk, Facts, Item
from pyploop.runtimes.checks import Checks, ChecksFailedError, naming
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.podman import extras, image, networks
from pyploop.runtimes.podman import pod as pods
from pyploop.runtimes.podman.exported import export
from pyploop.runtimes.podman.host import look
from pyploop.runtimes.podman.member import Member
from pyploop.runtimes.podman.pod import Pod
from pyploop.runtimes.podman.pods import LABEL, PodSteps, all_of, folder_of
from pyploop.runtimes.runc import cgroup, link_cut, local_packets
from pyploop.runtimes.runc.cgroup import ContainerCgroup
from pyploop.runtimes.runc.connections import Connections
from pyploop.system.jobs import Job

MOST = 32
"""Containers of a pod."""


class PodCgroup(ContainerCgroup):
    """The cgroups of all its containers."""

    def __init__(self, cgroups: list[ContainerCgroup]) -> None:
        self._all = cgroups
        self.order = ("", "")

    def is_frozen(self) -> bool:
        return all(c.is_frozen() for c in self._all)

    def pids(self) -> list[int]:
        return [pid for c in self._all for pid in c.pids()]

    def freeze(self) -> None:
        for one in self._all:
            one.freeze()

    def thaw(self) -> None:
        for one in self._all:
            one.thaw()


class PodSource(PodSteps):
    """The source's part of a Runtime."""

    def __init__(self, host: HostConfig, container: str) -> None:
        super().__init__(host, container)
        self._left: list[str] = []

    def _need(self) -> Pod:
        if self._pod is None:
            raise MigrateError(
                VzExitCode.NO_CONTAINER, f"Podman has no pod {self.container} on this host"
            )
        return self._pod

    # ---- checks

    def check_source(self, live: bool) -> Facts:
        pod, checks = self._need(), Checks()
        here = look(self._podman, checks)
        with naming("podman-description"):
            exported = export(self._podman, pod.infra, self._host.criu)
        with checks.named("podman-pod"):
            pods.check(pod, exported.config)
            if len(self.members) > MOST:
                raise MigrateError(
                    VzExitCode.BAD_CONFIG, f"the pod {pod.name} has more than {MOST} containers"
                )
        if live:
            with checks.named("podman-pod"):
                pods.check_ipc(pod)
            if pod.infra.namespace:
                with checks.named("podman-link"):
                    self.members[0]._need_links(pod.infra.namespace)
        every: list[Facts | None] = []
        for member in self.members:
            try:
                every.append(member.check_source(live))
            except MigrateError as e:
                if not isinstance(e, ChecksFailedError):
                    raise
                # Some are about the host, and fail for each container.
                checks.failed += [f for f in e.failed if f not in checks.failed]
                every.append(e.facts)
        self._known = {"pod": pod.id, "infra": pod.infra.name}
        facts: Facts = {
            "pod": {
                **pods.told(pod, exported),
                "description": {
                    "host": here.told(),
                    "config": exported.config,
                    "network": exported.network,
                    "networks": networks.sent(
                        self._podman, exported.config.get("newNetworks") or {}
                    ),
                    "image": image.find(self._podman, str(pod.infra.raw["Image"])).sent(),
                    "root": pod.infra.merged,
                    "volumes": {},
                    "binds": [],
                    "owned": [],
                },
            },
            "members": [[m.container, f] for m, f in zip(self.members, every, strict=True)],
        }
        shm = Path(pod.infra.bundle, "shm")
        if "ipc" in pod.shared and shm.is_dir() and any(shm.iterdir()):
            self._left.append(
                "The containers share /dev/shm. It moves, but a container that Podman restarts on "
                "the target has one of its own from then on"
            )
        if live:
            facts["memory"] = sum(int((f or {}).get("memory") or 0) for f in every)
        checks.end(facts if None not in every else None)
        return facts

    def left_behind(self) -> list[str]:
        left, self._left = self._left, []
        return left + [
            f"{line} ({member.container})"
            for member in self.members
            for line in member.left_behind()
        ]

    def copied(self, disks: list[Disk]) -> Copied:
        found: Copied = {}
        for member in self.members:
            found |= member.copied([])
        return found

    def items(self) -> list[Item]:
        made = []
        for n, member in enumerate(self.members):
            wants = (LABEL.fullmatch(label) for label in self.peer_wants)
            member.peer_wants = frozenset(w[2] for w in wants if w and int(w[1]) == n)
            made += [replace(i, label=f"{n}.{i.label}") for i in member.items()]
        return made

    # ---- suspend and dump

    def memory_now(self) -> int:
        return sum(m.memory_now() for m in self.members)

    def prepare_dump(self, images: Path, parent: Path | None) -> str:
        for n, member in enumerate(self.members):
            folder = folder_of(images, n)
            folder.mkdir(mode=0o700, parents=True)
            if why := member.prepare_dump(folder, None):
                self.give_up()
                return f"{member.container}: {why}"
        return ""

    def before_suspend(self) -> None:
        pod, now = self._need(), self._look()
        if now is None or now.id != pod.id or {*now.ids} != {*pod.ids}:
            raise MigrateError(
                VzExitCode.DUMP_FAILED,
                f"the pod {pod.name} has other containers now than when the migration began",
                hint="migrate it again",
            )
        pods.check_ipc(pod)
        for member in self.members:
            member.before_suspend()

    def _cgroup(self) -> PodCgroup:
        found = []
        for member in self.members:
            freezer = member._freezer()
            if freezer is None:
                raise member._ended() if not member.state().running else member._no_freezer()
            found.append(freezer)
        return PodCgroup(found)

    def suspend(self) -> None:
        pod, every = self._need(), self._cgroup()

        def down() -> None:
            self._link(False, pod.pid)

        try:
            if not pod.pid or "net" not in pod.shared:
                cgroup.freeze(every, pod.name)
                return
            with Connections(pod.pid) as connections:
                cgroup.freeze(every, pod.name)
                link_cut.cut(every, pod.name, connections, down, skip_in_flight=False)
            local_packets.close(f"/proc/{pod.pid}/ns/net")
        except OSError as e:
            raise MigrateError(
                VzExitCode.DUMP_FAILED,
                f"cannot list the connections of the pod {pod.name}: {e.strerror}",
            ) from e

    def resume(self) -> None:
        # Do all of it, whatever fails.
        pid = self._pod.pid if self._pod is not None else 0
        namespace = f"/proc/{pid}/ns/net"
        steps: list[tuple[str, Callable[[], object]]] = []
        if pid:
            steps.append(("the pod", partial(local_packets.open_again, namespace)))
            steps.append(("the pod", partial(self._link, True, pid)))
        steps += [(m.container, partial(_thaw, m)) for m in self.members]
        all_of(steps)
        if pid and self.members:
            self.members[0]._announce(namespace, resumed=True)

    def why_no_pre_dump(self) -> str:
        return "the memory of a pod moves while it is suspended"

    def pre_dump(self, images: Path, parent: Path | None) -> float | None:
        raise MigrateError(VzExitCode.DUMP_FAILED, self.why_no_pre_dump())

    def dump(self, images: Path, parent: Path | None = None) -> None:
        pod = self._need()
        pods.check_ipc(pod)
        steps: list[tuple[str, Callable[[], object]]] = []
        for n, member in enumerate(self.members):
            folder = folder_of(images, n)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            job = Job(partial(member.dump, folder, None)).start()
            steps.append((member.container, job.join))
        shared = "ipc" in pod.shared

        def pack() -> None:
            if shared:
                extras.pack_shm(pod.infra.bundle, folder_of(images, 0))

        # All of them end, whatever fails: a dump that is cut off damages its container.
        all_of([("/dev/shm", pack), *steps])

    # ---- afterwards

    def kill(self) -> None:
        for member in self.members:
            member.kill()

    def stop(self) -> None:
        for member in self.members:
            member.stop()
        if self._pod is not None:
            self._podman.run(
                *("container", "stop", "-t", "0", self._pod.infra.id), code=VzExitCode.DUMP_FAILED
            )

    def discard(self, remove: bool, copied: Copied | None) -> None:
        for member in reversed(self.members):  # the first ones bring what others use, too
            member.discard(remove, copied)
        if not self._known or not self._podman.says_yes("pod", "exists", self._known["pod"]):
            return
        if not remove:
            self._podman.run(
                *("pod", "stop", "-t", "0", self._known["pod"]), code=VzExitCode.DUMP_FAILED
            )
            return
        now = self._look()
        if now is not None and now.id == self._known["pod"] and now.members:
            raise MigrateError(
                VzExitCode.LOCKED,
                f"the pod {now.name} has got the container {now.members[0]} since, which has not "
                "moved",
                hint="move or remove that container, and run `pyploop migrate --recover`",
            )
        self._podman.run(
            *("pod", "rm", "-f", "-t", "0", self._known["pod"]), code=VzExitCode.DUMP_FAILED
        )


def _thaw(member: Member) -> None:
    if freezer := member._freezer():
        freezer.thaw()
