# SPDX-License-Identifier: Apache-2.0
"""What [container.NAME] says of a container's disks and trees: the same for each
runtime whose host knows them by its configuration alone."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pyploop.hostconf import ContainerConfig
from pyploop.runtimes import Disk, Tree, volumes
from pyploop.runtimes.folders import remove_contents


class Configured:
    """A part of a Runtime (runtimes/__init__.py)."""

    _config: ContainerConfig

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
        volumes.mount(disk)

    def _mount_all(self) -> None:
        """Those that are not mounted."""
        for disk in self.disks(source=False):
            if not volumes.is_mounted(disk.mount):
                volumes.mount(disk)

    def _discard_places(self, remove: bool) -> None:
        """Unmount all; remove: the images and what is in the trees go."""
        for disk in self._config.disks:
            volumes.unmount({"mount": disk.mount, "image": disk.image})
            if remove:
                Path(disk.image).unlink(missing_ok=True)
        for path in self._config.trees if remove else ():
            remove_contents(path)

    def _remove_folders(self) -> None:
        """Those of `_places` that are empty."""
        for path in self._places():
            with contextlib.suppress(OSError):
                Path(path).rmdir()
