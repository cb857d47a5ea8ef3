# SPDX-License-Identifier: Apache-2.0
"""The container's files on the target: from where they come to the places that Podman has made.

They come into folders of their own on the same file system, while Podman does not know the
container yet.  Then they are renamed: the upper directory of its root, and each volume.
Each step may be repeated, and undone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.config import within
from pyploop.system import kernel, mount_table

KEPT = ("lowerdir", "upperdir", "workdir", "metacopy", "redirect_dir", "index", "volatile")
"""Options of an overlay that are used again.  The kernel shows others, which are its own."""
MOUNTING = 30.0
"""Seconds for a mount."""


class Placed:
    """Of one container."""

    def __init__(self, graph: str, stage: str, volumes: Sequence[str]) -> None:
        """graph: Podman's graph root, in which all the others lie.  stage: the folder into which
        they come.  volumes: the folders of their files."""
        self._graph, self._stage = graph, Path(stage)
        self._volumes = [
            (self._stage / f"volume-{n}", Path(path)) for n, path in enumerate(volumes)
        ]

    @contextlib.contextmanager
    def _pairs(self, merged: str) -> Iterator[list[tuple[Path, Path]]]:
        """(where it came, where it belongs), of the root and of each volume.  Podman mounts its
        folder of layers on itself, and nothing can be renamed from one mount to another.  So
        the paths lead through a mount on which there is none."""
        fd = kernel.clone_mount(self._graph)
        try:
            top = Path(f"/proc/self/fd/{fd}")
            pairs = [(self._stage / "root", Path(merged).with_name("diff")), *self._volumes]
            inside = [[top / p.relative_to(self._graph) for p in pair] for pair in pairs]
            yield [(come, place) for come, place in inside]
        finally:
            os.close(fd)

    def check_root(self, merged: str) -> None:
        """MigrateError(15) unless it is the root of a container in Podman's storage."""
        if not within(merged, f"{self._graph}/overlay") or os.path.basename(merged) != "merged":
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"Podman made the container with the root {merged[:200]}, which is not one of its "
                "overlays",
            )

    def put(self, merged: str) -> None:
        """Podman has made the container, and its root may be mounted there.  OSError."""
        mounted = mount_table.at(merged)
        if mounted is not None:
            # An overlay does not see what is changed below it.
            kernel.umount(merged)
        with self._pairs(merged) as pairs:
            for come, place in pairs:
                self._exchange(come, place)
        if mounted is not None:
            _mount_again(mounted, merged)

    def _exchange(self, come: Path, place: Path) -> None:
        if not come.exists():
            return  # done before
        old = come.with_name(f"{come.name}-old")
        with contextlib.suppress(FileNotFoundError):
            place.rename(old)
        come.rename(place)

    def take_back(self, merged: str) -> None:
        """Undo `put`, before Podman removes the container with all that is in its places."""
        self._stage.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._pairs(merged) as pairs:
            for come, place in pairs:
                if not come.exists() and place.exists():
                    place.rename(come)
        self._remove_old()

    def tidy(self) -> None:
        """All is in its place: remove what was there, and the folders on the way."""
        self._remove_old()
        for folder in (self._stage, self._stage.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _remove_old(self) -> None:
        for come in (self._stage / "root", *(c for c, _ in self._volumes)):
            shutil.rmtree(come.with_name(f"{come.name}-old"), ignore_errors=True)


def _mount_again(entry: mount_table.Entry, point: str) -> None:
    """Mount an overlay as it was.  Podman may have named its layers relative to its folder of
    them, because there are too many for absolute paths."""
    words = [o for o in entry.escaped_options.split(",") if o.partition("=")[0] in KEPT]
    options = ",".join(mount_table.unescape(w) for w in words)
    # Of a container that removes itself (--rm), which Podman mounts with `volatile`: the kernel's
    # note that the overlay was not synced before it was unmounted, for which it refuses to mount
    # it again.  Nothing was written there yet.
    work = Path(point).parents[1] / str(entry.option("workdir"))
    shutil.rmtree(work / "work/incompat/volatile", ignore_errors=True)
    lower = entry.option("lowerdir") or ""
    if all(layer.startswith("/") for layer in lower.split(":")):
        kernel.mount("overlay", point, "overlay", 0, options)
        return
    command = ["mount", "-t", "overlay", "overlay", "-o", options, point]
    home = Path(point).parents[1]
    try:
        done = subprocess.run(command, cwd=home, capture_output=True, timeout=MOUNTING, check=False)
        why = done.stderr.decode(errors="replace").strip() if done.returncode else ""
    except subprocess.TimeoutExpired as e:
        why = str(e)
    if why:
        raise MigrateError(
            VzExitCode.RESTORE_FAILED, f"cannot mount the container's root {point}: {why[:300]}"
        )
