# SPDX-License-Identifier: Apache-2.0
"""Container runtimes as a migration drives them: one small interface.

The same class serves on both hosts, each time with its own host's
configuration.  A runtime decides nothing about the order of a migration; it
knows how one step is done, and its undoing steps can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Facts = dict[str, Any]
"""What the source tells the target before anything starts; JSON."""

Copied = dict[str, list[int]]
"""What a copy was made of: path -> [device, inode, generation]; JSON."""

LARGEST_FILE = 1 << 50
"""Bytes of one file of a container that are taken."""


@dataclass(frozen=True)
class State:
    """Of a container on this host."""

    exists: bool
    running: bool = False
    """Its processes are there, suspended or not."""
    suspended: bool = False
    mounted: bool = False


@dataclass(frozen=True)
class Disk:
    """A disk of the container on this host."""

    image: str
    """The file that travels: the image, or the top delta."""
    mount: str
    fstype: str
    options: str
    source: str = ""
    """What is opened for copying; on the target empty."""


@dataclass(frozen=True)
class Tree:
    """A directory of the container on this host, moved as it is."""

    path: str


@dataclass(frozen=True)
class Item:
    """A file that is copied while the container runs: its label says what it
    is, and the target's runtime where it goes."""

    label: str
    path: str


class Runtime(Protocol):
    """Steps raise MigrateError, with the code of what failed."""

    name: str
    container: str
    keep_fds: tuple[int, ...]
    """Inherited by commands: a lock that lasts until they have ended."""

    lock_dir: str
    """Where the container's lock file lies."""

    locks_itself: bool
    """Its commands take that lock on the target, so nobody else may have it there."""

    def state(self) -> State: ...

    def disks(self, source: bool) -> list[Disk]:
        """source: with what is opened for copying."""

    def trees(self) -> list[Tree]:
        """On the target after `check_target`."""

    # ---- on the source

    dump_writes: bool
    """A dump may add something to the trees, which then has to be copied after it."""

    drop_exec: bool
    """Processes that are in the container without being its own end with the move."""

    def check_source(self, live: bool) -> Facts:
        """All that can be known before anything starts."""

    def left_behind(self) -> list[str]:
        """What of the container does not move, in words, as `check_source` and `dump`
        find; each once."""

    def copied(self, disks: list[Disk]) -> Copied:
        """What is copied, now that the disks' sources are open.  MigrateError when
        that is not what `check_source` has seen."""

    def items(self) -> list[Item]: ...

    def suspend(self) -> None:
        """No process of it runs and no packet of it goes, until `resume`."""

    def resume(self) -> None:
        """Undo `suspend`, also a half-done one, and what a failed `dump` left."""

    def why_no_pre_dump(self) -> str:
        """Why `pre_dump` cannot work here; empty when it does."""

    def pre_dump(self, images: Path, parent: Path | None) -> float | None:
        """The running container's memory into the folder, from the second time on
        only what was written to since `parent`, the folder before.  Returns for
        how many seconds it stood still, None when that is not known.  After a
        failure, which `resume` undoes, there is no parent for what follows."""

    def dump(self, images: Path, parent: Path | None = None) -> None:
        """The suspended container's memory into the folder, or what was written to
        since the pre-dump in `parent`; it stays suspended."""

    def kill(self) -> None:
        """End the suspended container, for it runs on the target."""

    def stop(self) -> None: ...

    def start(self) -> None: ...

    def discard(self, remove: bool, copied: Copied | None) -> None:
        """What is left on the source after `kill` or `stop`.  copied: what `copied`
        returned, None when that is not known; nothing else is removed."""

    # ---- on the target

    def check_target(self, facts: Facts, live: bool) -> None: ...

    def destination(self, label: str) -> str:
        """Where an item goes; MigrateError for a label that is none."""

    def largest(self, label: str) -> int:
        """Bytes of an item at most, holes included."""

    def root_of(self, path: str) -> str:
        """The folder above this one of its paths in which names and links came from
        the source; empty: there is none."""

    def makes(self, facts: Facts) -> list[str]:
        """Files that `placed` makes."""

    def folders(self) -> list[str]:
        """Folders that must be there before a restore."""

    def placed(self, facts: Facts) -> None:
        """All items are there: fit them to this host."""

    def attach(self, disk: Disk) -> list[dict[str, Any]]:
        """Journal entries for what `mount` is about to do."""

    def mount(self, disk: Disk) -> None: ...

    def check_images(self, images: Path) -> None:
        """The dump has come, and nothing of it changes any more: MigrateError(15)
        when a process in it may do more than the container."""

    def release(self) -> None:
        """Nothing but the restore, or the start, is left: what was kept without
        effect until now, such as set-user-ID bits, has its effect."""

    def undump(self, images: Path, commit: Callable[[], None]) -> None:
        """Restore and resume.  Calls `commit` when all that may fail is done,
        before the container runs or answers; when that raises, the container
        does not run."""

    def abandon(self) -> None:
        """Undo a restore, done or half-done."""
