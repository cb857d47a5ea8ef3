# SPDX-License-Identifier: Apache-2.0
"""A part of the restore is done while the images are on their way."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

from pyploop.errors import MigrateError, VzExitCode
from pyploop.migration.target.early_restore import EarlyRestore
from pyploop.runtimes import Runtime
from pyploop.runtimes.runc import cgroup_moves
from pyploop.runtimes.runc.cgroup_moves import CgroupMoves
from pyploop.system.jobs import Job

SECONDS = 30.0


class _Runtime:
    """It notes what is asked of it."""

    first_image = "first"

    def __init__(self, trees: int = 0) -> None:
        self.done: list[str] = []
        self.refused = False
        self._trees = trees

    def trees(self) -> list[int]:
        return [0] * self._trees

    def release(self) -> None:
        if self.refused:
            raise MigrateError(VzExitCode.BAD_CONFIG, "a link leads elsewhere")
        self.done.append("release")

    def begin_undump(self) -> None:
        self.done.append("begin")


class Scene:
    """A target, its disks and its dump still to come."""

    def __init__(self, trees: int = 0) -> None:
        self.runtime = _Runtime(trees)
        self.disks, self.dumped = threading.Event(), threading.Event()
        self.dump: Job[Any] = Job(lambda: self.dumped.wait(SECONDS)).start()
        self.early = EarlyRestore(cast(Runtime, self.runtime), {"dump": self.dump}, self._wait)
        self.early.start()

    def _wait(self) -> None:
        assert self.disks.wait(SECONDS)

    def all_is_there(self) -> None:
        self.disks.set()
        self.dumped.set()
        self.dump.join(SECONDS)
        self.early.finish(SECONDS)


def test_it_begins_with_the_disks_and_the_first_image_before_the_others_come() -> None:
    scene = Scene()
    scene.early.complete("first")
    scene.disks.set()
    scene.early.job.join(SECONDS)
    assert scene.runtime.done == ["release", "begin"]
    assert not scene.dump.over.is_set()
    scene.all_is_there()
    assert scene.runtime.done == ["release", "begin"]


def test_nothing_is_done_before_the_disks_are_there() -> None:
    scene = Scene()
    scene.early.complete("first")
    assert not scene.early.job.over.wait(0.05)
    assert scene.runtime.done == []
    scene.all_is_there()
    assert scene.runtime.done == ["release", "begin"]


@pytest.mark.parametrize("trees", [0, 1])
def test_without_the_first_image_or_with_trees_only_the_disks_are_released(trees: int) -> None:
    scene = Scene(trees)
    scene.early.complete("first" if trees else "second")
    scene.all_is_there()
    assert scene.runtime.done == ["release"]


def test_disks_that_may_not_be_released_are_refused_when_all_is_there() -> None:
    scene = Scene()
    scene.runtime.refused = True
    scene.early.complete("first")
    with pytest.raises(MigrateError, match="a link leads elsewhere"):
        scene.all_is_there()
    assert scene.runtime.done == []


def test_a_process_finds_a_cgroup_of_its_own_to_move_to(tmp_path: Path) -> None:
    assert cgroup_moves.own_processes(str(tmp_path)) is None
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, own = line.split(":", 2)
        folder = tmp_path / controllers.removeprefix("name=") / own.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").touch()
    found = cgroup_moves.own_processes(str(tmp_path))
    assert found is not None and found.name == "cgroup.procs"


def test_the_moves_begin_and_end_and_change_nothing() -> None:
    if cgroup_moves.own_processes() is None:
        pytest.skip("needs a cgroup that this process may write to (root)")
    where = Path("/proc/self/cgroup").read_text()
    before = set(os.listdir("/proc/self/task"))
    moves = CgroupMoves()
    moves.start()
    moves.start()
    assert len(set(os.listdir("/proc/self/task")) - before) == 1
    moves.stop()
    deadline = time.monotonic() + SECONDS
    while set(os.listdir("/proc/self/task")) - before and time.monotonic() < deadline:
        time.sleep(0.002)
    assert not set(os.listdir("/proc/self/task")) - before
    assert Path("/proc/self/cgroup").read_text() == where
