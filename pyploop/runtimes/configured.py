# SPDX-License-Identifier: Apache-2.0
"""What [container.NAME] says of a container's disks and trees: the same for each
runtime whose host knows them by its configuration alone."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Copied, Disk, Tree, copied, volumes
from pyploop.runtimes.config import ContainerConfig


class Configured:
    """A part of a Runtime (runtimes/__init__.py)."""

    _config: ContainerConfig
    drop_exec = False
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
        volumes.mount(disk, others, restricted=True)

    def release(self) -> None:
        for disk in self.disks(source=False):
            volumes.release(disk)

    def root_of(self, path: str) -> str:
        return ""  # nothing of a container's comes to a folder of another part of it

    def check_images(self, images: Path) -> None:
        """Nobody knows what they are."""

    def _check_access(self) -> None:
        """On the target.  MigrateError(15)."""
        for place in self._places() if self._config.policy.private else ():
            volumes.check_private(place)

    def _mount_all(self) -> None:
        """Those that are not mounted."""
        for disk in self.disks(source=False):
            if not volumes.is_mounted(disk.mount):
                volumes.mount(disk)

    def _check_places(self, used: bool) -> None:
        """MigrateError(15) unless what would be copied is what is configured.  used:
        the container runs."""
        for disk in self.disks(source=False):
            copied.check_disk(disk, used)
        for tree in self.trees():
            copied.check_tree(tree)

    def copied(self, disks: list[Disk]) -> Copied:
        """See Runtime."""
        for disk in disks:
            if disk.source != (volumes.device_of(disk.mount) or disk.image):
                raise MigrateError(
                    VzExitCode.BAD_CONFIG, f"what is mounted on {disk.mount} has changed meanwhile"
                )
        self._check_places(used=False)
        try:
            return copied.of_places(disks, self.trees())
        except OSError as e:
            raise MigrateError(VzExitCode.BAD_CONFIG, f"{e.filename}: {e.strerror}") from e

    def _discard_places(self, remove: bool, known: Copied | None) -> None:
        """Unmount all; remove: the images and what is in the trees go, if they are
        what was copied."""
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
        """Those of `_places` that are empty."""
        for path in self._places():
            with contextlib.suppress(OSError):
                Path(path).rmdir()
