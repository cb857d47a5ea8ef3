# SPDX-License-Identifier: Apache-2.0
"""The hosts of a fuzzed conversation: a made-up container, folders in memory, and
what must be so after each conversation."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Copied, Disk, Item, Lazy, State, Tree
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.policy import Source
from pyploop.runtimes.unprepared import Unprepared

SOURCE = Source("made-up-source")
"""As the agent knows it; its memory images are restored."""


class Finding(AssertionError):
    """Something that must not be."""


@dataclass
class Box(Unprepared):
    """A container on one host, without processes or kernels: a runtime."""

    folder: Path
    status: State
    name: str = "command"
    container: str = "box"
    keep_fds: tuple[int, ...] = ()
    dump_writes: bool = False
    drop_exec: bool = False
    peer_takes: frozenset[str] = frozenset()
    locks_itself: bool = False
    lazy: Lazy | None = None
    has_disk: bool = False
    told: list[str] = field(default_factory=list)
    """The steps that were done to it."""

    @property
    def lock_dir(self) -> str:
        return str(self.folder / "lock")

    def state(self) -> State:
        return self.status

    def disks(self, source: bool) -> list[Disk]:
        mount = str(self.folder / "mount")
        return [Disk(str(self.folder / "image"), mount, "ext4", "rw")] if self.has_disk else []

    def trees(self) -> list[Tree]:
        return []

    def check_source(self, live: bool) -> dict[str, Any]:
        return {"memory": 4096}

    def left_behind(self) -> list[str]:
        return []

    def copied(self, disks: list[Disk]) -> Copied:
        return {}

    def items(self) -> list[Item]:
        return [Item("conf", str(self.folder / "box.conf"))]

    def _becomes(self, step: str, **state: bool) -> None:
        self.told.append(step)
        self.status = State(**state)

    def memory_now(self) -> int:
        return 4096

    def prepare_dump(self, images: Path, parent: Path | None) -> str:
        return "made up"

    def prepare_undump(self, images: Path) -> str:
        return "made up"

    def before_suspend(self) -> None: ...

    def give_up(self) -> None: ...

    def suspend(self) -> None:
        self._becomes("suspend", exists=True, running=True, suspended=True)

    def resume(self) -> None:
        self._becomes("resume", exists=True, running=True)

    def why_no_pre_dump(self) -> str:
        return "made up"

    def pre_dump(self, images: Path, parent: Path | None) -> float | None:
        raise MigrateError(VzExitCode.COPY_FAILED, "made up")

    def dump(self, images: Path, parent: Path | None = None) -> None:
        (images / "pages-1.img").write_bytes(b"p" * 5000)
        (images / "core-1.img").write_bytes(b"core")

    def kill(self) -> None:
        self._becomes("kill", exists=True)

    def stop(self) -> None:
        self._becomes("stop", exists=True)

    def start(self) -> None:
        self._becomes("start", exists=True, running=True)

    def discard(self, remove: bool, *_: object) -> None:
        self._becomes("discard", exists=False)

    # ---- target

    def check_target(self, facts: dict[str, Any], live: bool) -> None:
        pass

    def destination(self, label: str) -> str:
        if label not in ("conf", "large"):
            raise MigrateError(
                VzExitCode.COPY_FAILED, f"no item {label[:80]!r} belongs to this container"
            )
        return str(self.folder / "bundle" / label)

    def largest(self, label: str) -> int:
        return 1 << 17

    def root_of(self, path: str) -> str:
        return ""

    def makes(self, facts: dict[str, Any]) -> list[str]:
        return [str(self.folder / "bundle" / "made")]

    def folders(self) -> list[str]:
        return [str(self.folder / "mount"), str(self.folder / "bundle")]

    def placed(self, facts: dict[str, Any]) -> None:
        (self.folder / "bundle" / "made").touch()

    def attach(self, disk: Disk) -> list[dict[str, Any]]:
        return [{"kind": "remove", "path": str(self.folder / "mounted")}]

    def mount(self, disk: Disk) -> None:
        (self.folder / "mounted").touch()

    def check_images(self, images: Path) -> None:
        self.told.append("check images")

    def release(self) -> None:
        self.told.append("release")

    def undump(self, images: Path, commit: Callable[[], None]) -> None:
        if not (images / "core-1.img").exists():
            raise MigrateError(VzExitCode.RESTORE_FAILED, "no image of it came")
        commit()
        self._becomes("undump", exists=True, running=True)

    def abandon(self) -> None:
        self._becomes("abandon", exists=False)


# ---- what is left


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def rss() -> int:
    """MiB in use."""
    text = Path("/proc/self/statm").read_text().split()[1]
    return int(text) * resource.getpagesize() >> 20


class World:
    """Folders of both hosts, and what must be so after each conversation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = 0
        self.moved = 0
        self.doubts = 0
        self._clean()
        self._fds = descriptors()
        self._threads = threading.active_count()
        self.grown = 0
        """MiB since the 1,000th conversation, at most."""
        self._rss = 0

    def _clean(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("state", "lock", "images"):
            (self.folder / name).mkdir(parents=True, mode=0o700)
        (self.folder / "box.conf").write_text("made up\n")

    def host(self) -> HostConfig:
        state, lock, images = (str(self.folder / name) for name in ("state", "lock", "images"))
        return HostConfig(
            "/made/up.toml",
            state_dir=state,
            lock_dir=lock,
            images_dir=images,
            ssh=("made-up",),
            trusted_live=(SOURCE.name,),
        )

    def files(self) -> set[str]:
        """Of a migration, wherever it may leave some."""
        left = {str(p.relative_to(self.folder)) for p in self.folder.rglob("*")}
        # Kept for the next ones: the source's identity, places, empty folders.
        return {
            name
            for name in left - {"state", "lock", "images", "box.conf"}
            if not re.fullmatch(r"lock/migration\.\d|state/identity", name)
        }

    def check(self, *, doubt: bool = False, moved: bool = False) -> None:
        """Nothing is left; in doubt the record is, for --recover."""
        self.runs += 1
        self.doubts += doubt
        self.moved += moved
        deadline = time.monotonic() + 5
        while threading.active_count() > self._threads or descriptors() > self._fds:
            if time.monotonic() > deadline:
                names = [t.name for t in threading.enumerate()]
                fds = {n: _link(n) for n in os.listdir("/proc/self/fd")}
                raise Finding(f"threads {names}, descriptors {fds} are left")
            time.sleep(0.0005)
            gc.collect()  # a failure holds what it came by
        if (left := self.files()) and not doubt and not moved:
            raise Finding(f"files are left: {sorted(left)}")
        if left:
            self._clean()
        if self.runs == 1000:
            gc.collect()
            self._rss = rss()
        elif self._rss:
            self.grown = max(self.grown, rss() - self._rss)
            if self.grown > 64:
                raise Finding(f"{self.grown} MiB more than after 1,000 conversations")

    def figures(self) -> str:
        return (
            f"{self.runs} conversations, {self.moved} moved, {self.doubts} in doubt; "
            f"memory grew by {self.grown} MiB"
        )


def _link(name: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{name}")
    return ""


@contextlib.contextmanager
def world() -> Iterator[World]:
    """In memory: nothing here is to outlive a power cut."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="pyploop-fuzz-", dir=where))
    try:
        yield World(folder / "world")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
