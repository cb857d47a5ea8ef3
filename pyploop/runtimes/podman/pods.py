# SPDX-License-Identifier: Apache-2.0
"""A pod of Podman, moved as one: all its containers are frozen together, and one commit record
says where all of them run.

Each step of a migration is that of the containers (member.py), one after the other, or at the
same time where the containers are suspended.  docs/internals/podman.md says what is different.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, PyploopError, VzExitCode
from pyploop.runtimes import Disk, Lazy, Pages, State, Tree
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.podman import pod as pods
from pyploop.runtimes.podman.command import Podman
from pyploop.runtimes.podman.member import Member
from pyploop.runtimes.podman.pod import Pod
from pyploop.runtimes.unprepared import Unprepared

LABEL = re.compile(r"(\d{1,3})\.(.+)")
"""Of an item, and the same with `@` of an image: the container's number before its own name."""
IMAGE = re.compile(r"(\d{1,3})@(.+)")


class PodSteps(Unprepared):
    """What both hosts do with it."""

    name = "podman-pod"
    needs_trust = True
    locks_itself = False
    dump_writes = False
    lazy: Lazy | None = None
    pages: Pages | None = None

    def __init__(self, host: HostConfig, container: str) -> None:
        self.container, self.lock_dir = container, host.lock_dir
        self._host = host
        self._podman = Podman(host.podman, host.command_timeout)
        self._keep_fds: tuple[int, ...] = ()
        self._drop_exec = False
        self._peer_takes: frozenset[str] = frozenset()
        self._known: dict[str, Any] = {}
        self._pod = self._look()
        self.members: list[Member] = self._found()

    def _look(self) -> Pod | None:
        pod = pods.look(self._podman, self.container)
        return pod if pod is not None and pod.name == self.container else None

    def _found(self) -> list[Member]:
        """Of the pod that is here.  What several of them use is brought by the first."""
        made: list[Member] = []
        taken: tuple[str, ...] = ()
        for name in self._pod.members if self._pod else ():
            made.append(Member(self._host, name, self._pod, taken))
            taken += made[-1].brings
        return made

    # ---- attributes that each container has, too

    @property
    def keep_fds(self) -> tuple[int, ...]:
        return self._keep_fds

    @keep_fds.setter
    def keep_fds(self, fds: tuple[int, ...]) -> None:
        self._keep_fds = fds
        for member in self.members:
            member.keep_fds = fds

    @property
    def drop_exec(self) -> bool:
        return self._drop_exec

    @drop_exec.setter
    def drop_exec(self, drop: bool) -> None:
        self._drop_exec = drop
        for member in self.members:
            member.drop_exec = drop

    @property
    def peer_takes(self) -> frozenset[str]:
        return self._peer_takes

    @peer_takes.setter
    def peer_takes(self, takes: frozenset[str]) -> None:
        self._peer_takes = takes
        for member in self.members:
            member.peer_takes = takes

    @property
    def instance(self) -> dict[str, Any]:
        members = [[m.container, m.instance] for m in self.members]
        return {**self._known, "members": members} if self._known else {}

    @instance.setter
    def instance(self, value: dict[str, Any]) -> None:
        """Of a record: the containers are those that it names."""
        self._known = {k: v for k, v in value.items() if k != "members"}
        here = {m.container: m for m in self.members}
        self.members = []
        for name, instance in value["members"]:
            member = here.get(name) or Member(self._host, name, None)
            member.instance, member.keep_fds = dict(instance), self._keep_fds
            self.members.append(member)
        if self._pod is not None and not self._is_ours(self._pod):
            self._pod = None

    def _is_ours(self, pod: Pod) -> bool:
        """Whether it is the one that the record names, and not another one of its name."""
        own = self._known.get("pod")
        return pod.id == own if own else pod.infra.name == self._known.get("infra")

    def state(self) -> State:
        states = [m.state() for m in self.members]
        exists = self._podman.says_yes("pod", "exists", self.container)
        return State(
            exists or any(s.exists for s in states),
            running=bool(states) and all(s.running for s in states),
            suspended=any(s.suspended for s in states),
        )

    def disks(self, source: bool) -> list[Disk]:
        return []

    def trees(self) -> list[Tree]:
        return [tree for m in self.members for tree in m.trees()]

    def image_folders(self, images: Path) -> dict[str, Path]:
        """Each container has its own: CRIU gives images of two containers the same names."""
        return {f"{n}@": folder_of(images, n) for n in range(len(self.members))}

    def give_up(self) -> None:
        for member in self.members:
            member.give_up()

    def _link(self, up: bool, pid: int) -> None:
        """Set the pod's links on this host."""
        if self.members and pid:
            first = self.members[0]
            command = first._link_command(f"/proc/{pid}/ns/net", up)
            first._link(command, VzExitCode.DUMP_FAILED)


def folder_of(images: Path, number: int) -> Path:
    """The folder of one container's images, and of what comes beside them."""
    return images.parent / f"pod-{number}" / images.name


def all_of(steps: Iterable[tuple[str, Callable[[], object]]]) -> None:
    """Run each, whatever the others do; then raise the first failure, with all of their words.
    steps: (whose it is, what to do)."""
    failed: list[tuple[str, BaseException]] = []
    for name, step in steps:
        try:
            step()
        except (OSError, PyploopError) as e:
            failed.append((name, e))
    if failed:
        _, first = failed[0]
        if len(failed) == 1 or not isinstance(first, MigrateError):
            raise first
        raise MigrateError(
            first.exit_code, "; ".join(f"{name}: {e}" for name, e in failed), hint=first.hint
        )
