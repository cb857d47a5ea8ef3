# SPDX-License-Identifier: Apache-2.0
"""Container runtimes behind one small protocol, `Runtime`: how each step of a migration is
done.

    runc     runc and CRIU (package `runc`; `oci` checks what another host sends)
    podman   Podman, which runs its containers by runc (package `podman`)
    podman-pod   one of Podman's pods, by the steps of its containers
    vzctl    OpenVZ (package `vzctl`)
    command  any other runtime, by commands of migrate.toml (module `command`)

The same class serves on both hosts, on each with that host's configuration (`config` and
`policy` read migrate.toml).  A runtime does not know the order of a migration.  It knows
how one step is done, and each step that undoes something can be repeated.  `copied`,
`volumes` and `tree_folders` do what all runtimes need for disks and trees.

A new runtime is a class with the attributes and methods of `Runtime`:
 1. Write it in a module or package of its own.  If the host knows its disks and trees only
    from the configuration, begin with `configured.Configured`.
 2. Add its name to `registry.RUNTIMES` and a branch to `make_runtime`, its keys of
    migrate.toml to `config`, and a package of its own to the table of
    tests/unit/test_layers.py.
 3. Nothing that the source sends may become a path, an option or a command before it is
    checked.  Follow `vzctl.conf_check` and `oci`, and docs/internals/trust.md.
 4. Let each of its commands fail on both hosts, as tests/migrate/test_runc_failures.py does.
Often runtime = "command" is enough, without a line of Python.

This package may import `disks` and what is below it.  The packages in it may import it,
and only `registry` imports those of single runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pyploop.runtimes.lazy_policy import Choice, Wanted

Facts = dict[str, Any]
"""The source facts: what the source tells the target before anything starts.  JSON."""

Copied = dict[str, list[int]]
"""The files and folders that were copied: path -> [device, inode, generation].  JSON."""

LARGEST_FILE = 1 << 50
"""Bytes that a target accepts for one file of a container."""


@dataclass(frozen=True)
class State:
    """The state of a container on this host."""

    exists: bool
    running: bool = False
    """It has processes, suspended or not."""
    suspended: bool = False
    mounted: bool = False


@dataclass(frozen=True)
class Disk:
    """A disk of the container on this host."""

    image: str
    """The file that is copied: the image, or the top delta."""
    mount: str
    fstype: str
    options: str
    source: str = ""
    """The device or file that is opened for copying; empty on the target."""


@dataclass(frozen=True)
class Tree:
    """A directory of the container on this host, which is copied as it is."""

    path: str


@dataclass(frozen=True)
class Item:
    """A static file, which is copied while the container runs.  Its label says what it is;
    the target's runtime decides from that where it goes."""

    label: str
    path: str


class Lazy(Protocol):
    """How a runtime restores memory lazily: the container runs, and its memory is loaded
    behind it (docs/internals/lazy-restore.md)."""

    choice: Choice

    post_copy: float
    """Seconds for which the pages may not come from the source; 0: they are on this host."""

    chained: bool
    """Some are in images of memory rounds."""

    def choose(self, want: Wanted, told: Any) -> Choice:
        """Whether this container's restore will be lazy.  told: the source's words about its
        memory."""

    def why_no_post_copy(self, want: Wanted, told: Any) -> str:
        """Why pages cannot be loaded from the source; empty: they can."""

    def start(self, folder: Path, commit: Path, record: Path, **fields: Any) -> None:
        """Before the container is suspended.  folder: of all images.  commit: the commit
        record.  record: the record to make, with these fields."""

    def serve(self, images: Path) -> None:
        """All images are there, and checked."""

    def keep(self) -> None:
        """The container runs."""

    def stop(self) -> None:
        """It does not run, or its memory is all there."""


class Pages(Protocol):
    """The page server of a post-copy migration (docs/internals/post-copy.md)."""

    served: tuple[int, int]
    """When it has ended: bytes of pages, and requests for them."""

    def problem(self) -> str:
        """Why this host cannot serve pages; empty: it can."""

    def start(self, record: Path, keep: Sequence[int], **fields: Any) -> None:
        """Connect to the target, before the container is suspended."""

    def dump(self, images: Path, parent: Path | None) -> None:
        """As Runtime.dump, but for the pages that can be loaded lazily: they are served from
        then on.  The container stays suspended, whatever becomes of the page server."""

    def wait(self, seconds: float) -> tuple[str, str] | None:
        """(state, why) when it has ended; None: not yet."""

    def bye(self) -> None:
        """The source is tidied."""

    def stop(self) -> None:
        """The target has not committed."""


class Runtime(Protocol):
    """One container of one host.  Each step raises MigrateError with the exit code for what
    failed."""

    name: str
    container: str
    keep_fds: tuple[int, ...]
    """Descriptors that the runtime's commands inherit: a lock, which so lasts until they
    have ended."""

    lock_dir: str
    """The folder of the container's lock file."""

    locks_itself: bool
    """Its commands take that lock themselves on the target, so pyploop must not hold it
    there."""

    needs_trust: bool
    """What comes cannot be checked in full, whether the memory comes with it or not: only from
    sources that this host trusts."""

    instance: dict[str, Any]
    """What tells this container from another one of the same name, and what is needed to undo
    its steps later; empty: the name is enough.  JSON.  It is in each journal."""

    def state(self) -> State: ...

    def disks(self, source: bool) -> list[Disk]:
        """source: fill in Disk.source."""

    def trees(self) -> list[Tree]:
        """On the target only after `check_target`."""

    # ---- on the source

    dump_writes: bool
    """A dump may add files to the trees.  They have to be copied after it."""

    drop_exec: bool
    """--drop-exec: processes in the container that its first process has not started may
    end with the migration."""

    keeps_source: bool
    """-r no: the container stays here, stopped.  Set before `check_source`."""

    peer_takes: frozenset[str]
    """Optional parts of the agent's protocol that the target knows."""

    peer_wants: frozenset[str]
    """The target's `wants`."""

    def rewire(self, networks: Sequence[str], ports: Sequence[str]) -> None:
        """--network, --publish: before `check_source`.  MigrateError(1) when they cannot be."""

    def check_source(self, live: bool) -> Facts:
        """Check all that can be checked before anything starts.  Returns the source facts."""

    def left_behind(self) -> list[str]:
        """Lines for the user about what is not migrated, as `check_source` and `dump` have
        found it.  Each line is returned once."""

    def copied(self, disks: list[Disk]) -> Copied:
        """The identity of what is copied, now that the disks' sources are open.
        MigrateError when it is not what `check_source` has checked."""

    def items(self) -> list[Item]:
        """The static files."""

    def memory_now(self) -> int:
        """Bytes of memory that the running container uses; 0 when that is not known."""

    def image_folders(self, images: Path) -> dict[str, Path]:
        """The folders of a dump: what comes before the names of its images on the way -> the
        folder.  images: the folder that `dump` gets."""

    def prepare_dump(self, images: Path, parent: Path | None) -> str:
        """The container is about to be suspended, and then `dump` is called with the same
        arguments: start ahead what it needs, which waits, and has no effect on the container.
        Returns why nothing is started; empty when it is."""

    def before_suspend(self) -> None:
        """The last checks before `suspend`.  MigrateError(8), also when what `prepare_dump`
        has started has failed: nothing is suspended yet."""

    def give_up(self) -> None:
        """End what `prepare_dump` or `prepare_undump` has started, if it still waits."""

    def suspend(self) -> None:
        """Until `resume` no process of the container runs, and it sends no packet."""

    def resume(self) -> None:
        """Undo `suspend`, also one that failed half-way, and what a failed `dump` left."""

    def why_no_pre_dump(self) -> str:
        """Why `pre_dump` cannot work on this host; empty when it can."""

    def pre_dump(self, images: Path, parent: Path | None) -> float | None:
        """Write the running container's memory into the folder `images`.  With `parent`, the
        folder of the pre-dump before, only what was written since.  Returns for how many
        seconds the container stood still; None when that is not known.  After a failure
        the caller does `resume`, and the next dump has no parent."""

    def dump(self, images: Path, parent: Path | None = None) -> None:
        """Write the suspended container's memory into the folder `images`.  With `parent` only
        what was written since that pre-dump.  It stays suspended."""

    @property
    def pages(self) -> Pages | None:
        """None: it cannot."""

    def kill(self) -> None:
        """End the suspended container, after it has begun to run on the target."""

    def stop(self) -> None: ...

    def start(self) -> None: ...

    def discard(self, remove: bool, copied: Copied | None) -> None:
        """Put away what is left on the source after `kill` or `stop`.  remove: delete the
        disks and trees, and nothing but what `copied` has returned.  copied: that; None
        when it is not known."""

    # ---- on the target

    @property
    def lazy(self) -> Lazy | None:
        """None: it cannot."""

    def check_target(self, facts: Facts, live: bool) -> None:
        """Check that the container fits this host, which has none of that name."""

    wants: frozenset[str]
    """Labels of optional items that this host lacks, as `check_target` has found."""

    def destination(self, label: str) -> str:
        """Where the item with this label goes.  MigrateError for an unknown label."""

    def largest(self, label: str) -> int:
        """Bytes that an item may have, holes included."""

    def root_of(self, path: str) -> str:
        """The folder above one of the container's paths in which names and links came from the
        source; empty when there is none."""

    def makes(self, facts: Facts) -> list[str]:
        """Files that `placed` creates."""

    def folders(self) -> list[str]:
        """Folders that must exist before a restore."""

    def placed(self, facts: Facts) -> None:
        """All items have arrived: fit them to this host."""

    def attach(self, disk: Disk) -> list[dict[str, Any]]:
        """Journal entries for what `mount` is about to do."""

    def mount(self, disk: Disk) -> None: ...

    def prepare_undump(self, images: Path) -> str:
        """As `prepare_dump`: for `undump`.  The images are still to come, and the disks are
        not mounted yet.  `abandon` is in the journal."""

    first_image: str
    """Name of the image that `begin_undump` needs; empty: `begin_undump` does nothing."""

    def begin_undump(self) -> None:
        """What `prepare_undump` has started may do all that needs the disks and the first
        image, but none of the others.  `release` was called."""

    def check_images(self, images: Path) -> None:
        """The dump is complete.  MigrateError(15) when a process in it may do more than the
        container may."""

    def release(self) -> None:
        """Only the restore or the start is left.  What had no effect until now, such as
        set-user-ID bits and action scripts, gets its effect."""

    def undump(self, images: Path, commit: Callable[[], None]) -> None:
        """Restore and resume.  Calls `commit` when all that may fail is done, before the
        container runs or answers.  When `commit` raises, the container does not run."""

    def settled(self) -> list[str]:
        """The container runs here, and its files are about to be removed at the source: write to
        the disk what was done with them since they came (OSError).  And make what must not be
        there before, such as a unit that starts it at boot.  Returns what of that failed, in
        words."""

    def abandon(self) -> None:
        """Undo a restore, also one that failed half-way."""
