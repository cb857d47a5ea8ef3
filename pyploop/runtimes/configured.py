# SPDX-License-Identifier: Apache-2.0
"""The disks and trees of a container as [container.NAME] names them: the same for each
runtime that knows them only from the configuration."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Copied, Disk, Lazy, Pages, Tree, copied, volumes
from pyploop.runtimes.config import ContainerConfig
from pyploop.runtimes.unprepared import Unprepared


class Configured(Unprepared):
    """The part of a Runtime that concerns disks and trees (see runtimes/__init__.py)."""

    _config: ContainerConfig
    lazy: Lazy | None = None
    pages: Pages | None = None
    drop_exec = False
    peer_takes: frozenset[str] = frozenset()
    locks_itself = False

    def _places(self) -> list[str]:
        """Folders that hold the container's files: disks, then trees."""
        return [*self.folders(), *self._config.trees]

    def disks(self, source: bool) -> list[Disk]:
        result = []
        for d in self._config.disks:
            opened = (volumes.device_of(d.mount) or d.image) if source else ""
            result.append(Disk(d.image, d.mount, d.fstype, d.options, opened))
        return result

    def trees(self) -> list[Tree]:
        return [Tree(path) for path in self._config.trees]

    def folders(self) -> list[str]:
        return [d.mount for d in self._config.disks]

    def attach(self, disk: Disk) -> list[dict[str, Any]]:
        return [{"kind": "unmount", "mount": disk.mount, "image": disk.image}]

    def mount(self, disk: Disk) -> None:
        others = [place for place in self._places() if place != disk.mount]
        volumes.mount(disk, others, restricted=True, copied=True)

    def release(self) -> None:
        for disk in self.disks(source=False):
            volumes.release(disk)

    def root_of(self, path: str) -> str:
        return ""  # no disk and no tree lies in another (config.py)

    def check_images(self, images: Path) -> None:
        """The images are in a format of the runtime's own: there is nothing to check."""

    def _check_access(self) -> None:
        """On the target: MigrateError(15) when other users could reach the files."""
        for place in self._places() if self._config.policy.private else ():
            volumes.check_private(place)

    def _mount_all(self) -> None:
        """Mount each disk that is not mounted."""
        for disk in self.disks(source=False):
            if not volumes.is_mounted(disk.mount):
                volumes.mount(disk)

    def _check_places(self, used: bool) -> None:
        """MigrateError(15) unless the disks and trees are what the configuration names.
        used: the container runs, so each disk must be mounted."""
        for disk in self.disks(source=False):
            copied.check_disk(disk, used)
        for tree in self.trees():
            copied.check_tree(tree)

    def copied(self, disks: list[Disk]) -> Copied:
        """See Runtime."""
        for disk in disks:
            if disk.source != (volumes.device_of(disk.mount) or disk.image):
                raise MigrateError(
                    VzExitCode.BAD_CONFIG,
                    f"another device is mounted on {disk.mount} now than when the migration began: "
                    "migrate the container again",
                    path=disk.mount,
                )
        self._check_places(used=False)
        try:
            return copied.of_places(disks, self.trees())
        except OSError as e:
            raise MigrateError(
                VzExitCode.BAD_CONFIG, f"cannot examine {e.filename}: {e.strerror}", path=e.filename
            ) from e

    def _discard_places(self, remove: bool, known: Copied | None) -> None:
        """Unmount all disks.  remove: also remove the images and what is in the trees, if
        they are what was copied."""
        disks = self.disks(source=False)
        for disk in disks if remove else ():
            copied.check_same(disk.image, known)
            copied.check_unhidden(disk)
        for disk in disks:
            volumes.unmount({"mount": disk.mount, "image": disk.image})
            if remove:
                copied.remove_image(disk.image, known)
        for path in self._config.trees if remove else ():
            copied.remove_tree(path, known)

    def _remove_folders(self) -> None:
        """Remove each folder of `_places` that is empty."""
        for path in self._places():
            with contextlib.suppress(OSError):
                Path(path).rmdir()
