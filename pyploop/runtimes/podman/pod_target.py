# SPDX-License-Identifier: Apache-2.0
"""The steps of a migration on the target, of a pod of Podman."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import LARGEST_FILE, Disk, Facts
from pyploop.runtimes.checks import Checks, ChecksFailedError, naming
from pyploop.runtimes.config import NAME
from pyploop.runtimes.podman import extras, fitting, links
from pyploop.runtimes.podman import pod as pods
from pyploop.runtimes.podman.fitting import Coming
from pyploop.runtimes.podman.host import look
from pyploop.runtimes.podman.member import Member
from pyploop.runtimes.podman.movable import refuse
from pyploop.runtimes.podman.pod import Pod
from pyploop.runtimes.podman.pods import IMAGE, LABEL, PodSteps, all_of, folder_of
from pyploop.runtimes.runc import local_packets
from pyploop.system.jobs import Job

AGREED = "agreed"
"""A file beside the images: all containers are committed, and run."""


class PodTarget(PodSteps):
    """The target's part of a Runtime."""

    _words: tuple[str, ...] = ()
    """Options of `podman pod create`."""
    _infra: Coming | None = None
    _facts: tuple[Facts, ...] = ()

    # ---- checks

    def check_target(self, facts: Facts, live: bool) -> None:
        checks = Checks()
        with checks.named("exists"):
            if self._podman.says_yes("pod", "exists", self.container):
                raise MigrateError(
                    VzExitCode.EXISTS,
                    f"Podman has a pod {self.container} on this host already",
                    hint="remove it (podman pod rm), or rename the other one",
                )
        with naming("podman-description"):
            told, members = self._described(facts)
        here = look(self._podman, checks)
        assert self._infra is not None
        name = str(told["infra"])
        fitting.check(self._podman, name, here, self._infra, checks, live=live)
        pause = self._podman.run("images", "--quiet", f"--filter=reference={pods.PAUSE}").strip()
        self._known = {"pod": "", "infra": name, "pause": bool(pause), "blocked": self._infra.id}
        self.members = [Member(self._host, n, None) for n, _ in members]
        self._facts = tuple({**facts_of, "source": facts.get("source")} for _, facts_of in members)
        images: set[str] = set()
        wants: set[str] = set()
        for n, (member, its) in enumerate(zip(self.members, self._facts, strict=True)):
            try:
                member.check_target({**its, "nodeps": facts.get("nodeps") or []}, live)
            except ChecksFailedError as e:
                checks.failed += [f for f in e.failed if f not in checks.failed]
                continue
            image = member.instance["image"]
            if image in images:
                member.wants = frozenset()  # it comes with another one
            images.add(image)
            wants |= {f"{n}.{label}" for label in member.wants}
        self.wants = frozenset(wants)
        checks.end()

    def _described(self, facts: Facts) -> tuple[dict[str, Any], list[tuple[str, Facts]]]:
        """MigrateError(15) for what no pyploop sends."""
        try:
            told, members = dict(facts["pod"]), [(str(n), dict(f)) for n, f in facts["members"]]
            self._infra = fitting.coming({"podman": told["description"]})
            self._words = tuple(pods.words(told, fitting.ports(self._infra.exported.config)))
            names = [n for n, _ in members]
            if told["name"] != self.container or len({*names}) != len(names):
                raise ValueError("names")
            if not names or not all(NAME.fullmatch(n) for n in names):
                raise ValueError("names of containers")
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            refuse(f"the source's description of the pod is not one: {e!r}")
        return told, members

    # ---- files

    def destination(self, label: str) -> str:
        found = LABEL.fullmatch(label)
        if not found or int(found[1]) >= len(self.members):
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"the source sends the file {label[:80]!r}, which no pod has",
            )
        return self.members[int(found[1])].destination(found[2])

    def largest(self, label: str) -> int:
        return LARGEST_FILE

    def root_of(self, path: str) -> str:
        return ""

    def makes(self, facts: Facts) -> list[str]:
        its = zip(self.members, self._facts, strict=True)
        return [path for m, f in its for path in m.makes(f)]

    def settled(self) -> list[str]:
        return [text for member in self.members for text in member.settled()]

    def folders(self) -> list[str]:
        return []

    def placed(self, facts: Facts) -> None:
        for member, its in zip(self.members, self._facts, strict=True):
            member.placed(its)

    def attach(self, disk: Disk) -> list[dict[str, Any]]:
        return []

    def mount(self, disk: Disk) -> None:
        raise MigrateError(VzExitCode.BAD_CONFIG, "a pod of Podman has no disks")

    # ---- restore

    def _make(self, agreed: Path) -> Pod:
        """Make the pod, with its infra container.  It runs, and its links are down."""
        infra = self._infra
        assert infra is not None
        if self._pod is not None:  # of a restore that has failed
            self._remove()
        if infra.networks:
            links.block(infra.id, infra.addresses)
        self._podman.run("pod", "create", *self._words, code=VzExitCode.RESTORE_FAILED)
        pod = pods.look(self._podman, self.container)
        if pod is None:
            raise MigrateError(VzExitCode.RESTORE_FAILED, "podman did not make the pod")
        self._pod = pod
        self._podman.run("container", "start", pod.infra.id, code=VzExitCode.RESTORE_FAILED)
        self._pod = pod = pods.look(self._podman, self.container) or pod
        self._link(False, pod.pid)
        links.unblock(infra.id)
        for member in self.members:
            member.join(pod, infra.id, agreed)
        return pod

    def prepare_undump(self, images: Path) -> str:
        self._make(images.parent / AGREED)
        for n, member in enumerate(self.members):
            folder = folder_of(images, n)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            member.prepare_undump(folder)
        return ""

    def check_images(self, images: Path) -> None:
        for path in sorted(images.iterdir()):
            found = IMAGE.fullmatch(path.name)
            if not found or int(found[1]) >= len(self.members):
                raise MigrateError(
                    VzExitCode.BAD_CONFIG,
                    f"the source sent the image {path.name[:80]!r}, which no pod has",
                )
            path.rename(folder_of(images, int(found[1])) / found[2])
        for n, member in enumerate(self.members):
            member.check_images(folder_of(images, n))

    def release(self) -> None:
        pass

    def undump(self, images: Path, commit: Callable[[], None]) -> None:
        pod = self._pod
        assert pod is not None
        if "ipc" in pod.shared:
            extras.unpack_shm(pod.infra.bundle, folder_of(images, 0))
        try:
            for member in self.members:
                member.fill()
        except OSError as e:
            raise MigrateError(
                VzExitCode.RESTORE_FAILED, f"podman does not restore {self.container}: {e.strerror}"
            ) from e
        folders = [folder_of(images, n) for n in range(len(self.members))]
        if pod.pid and local_packets.available() and local_packets.in_images(folders):
            local_packets.close(namespace := f"/proc/{pod.pid}/ns/net")
            committed = commit

            def commit() -> None:
                local_packets.open_again(namespace)
                committed()

        both = Together(len(self.members), commit, images.parent / AGREED)
        jobs = []
        for n, member in enumerate(self.members):
            member.resuming = both.run
            restore = partial(member.undump, folder_of(images, n), both.unlock)
            jobs.append(Job(both.each(restore)))
        for job in jobs:
            job.start()
        both.end(jobs)

    def start(self) -> None:
        """Without a dump; or, after a rollback, on the source."""
        if self._infra is not None:
            self._make(Path("/nonexistent"))
            self._link(True, self._pod.pid if self._pod else 0)
        for member in self.members:
            member.start()

    # ---- undo

    def abandon(self) -> None:
        if not self._known:
            return
        # The first ones bring what others use, too.
        all_of((m.container, m.abandon) for m in reversed(self.members))
        self._remove()
        if blocked := self._known.get("blocked"):
            links.unblock(blocked)

    def _remove(self) -> None:
        pod = self._pod or self._look()
        if pod is None or pod.infra.name != self._known["infra"]:
            return
        now = self._look()
        if now is not None and (others := {*now.members} - {m.container for m in self.members}):
            raise MigrateError(
                VzExitCode.RESTORE_FAILED,
                f"the pod {now.name} has got the container {min(others)} on this host since",
                hint="move or remove that container",
            )
        with contextlib.suppress(MigrateError, OSError):
            self._link(False, pod.pid)
        self._podman.run(*("pod", "rm", "-f", "-t", "0", pod.id), code=VzExitCode.RESTORE_FAILED)
        if not self._known.get("pause"):
            self._podman.tried("image", "rm", str(pod.infra.raw["ImageName"]))
        self._pod = None


class Together:
    """The restores of all containers, each in a thread of its own.  All are committed at once,
    and then all run at once.  When one fails before that, none runs."""

    def __init__(self, number: int, commit: Callable[[], None], agreed: Path) -> None:
        """commit: called once, when all of them are restored.  agreed: a file that is made when
        all of them may run, whatever becomes of this process."""
        self._agreed = agreed
        self._unlock = threading.Barrier(number, commit)
        self._run = threading.Barrier(number, self._agree)

    def _agree(self) -> None:
        os.close(os.open(self._agreed, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))

    def unlock(self) -> None:
        self._wait(self._unlock)

    def run(self) -> None:
        self._wait(self._run)

    def _wait(self, barrier: threading.Barrier) -> None:
        try:
            barrier.wait()
        except threading.BrokenBarrierError as e:
            raise OtherFailedError from e

    def each(self, restore: Callable[[], None]) -> Callable[[], None]:
        """That of one container: its failure ends those of the others."""

        def work() -> None:
            try:
                restore()
            except BaseException:
                self._unlock.abort()
                self._run.abort()
                raise

        return work

    def end(self, jobs: list[Job[None]]) -> None:
        """Wait for all.  The first failure that was not another one's."""
        for job in jobs:
            job.over.wait()
        failed = [j.failure for j in jobs if j.failure is not None]
        own = [f for f in failed if not isinstance(f, OtherFailedError)]
        if failed:
            raise (own or failed)[0]


class OtherFailedError(MigrateError):
    """Another container of the pod was not restored."""

    def __init__(self) -> None:
        super().__init__(VzExitCode.RESTORE_FAILED, "another container of the pod was not restored")
