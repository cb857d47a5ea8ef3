# SPDX-License-Identifier: Apache-2.0
"""The memory images of a container with a user namespace of its own.

CRIU opens some of them when its process is in that namespace already.  To the kernel it is then
the user of this host that the namespace has for root.  So that user's group may read them, and
no other user.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGES = "images"
"""The folder of the dump's images (migration.image_chain)."""


def group_of(config: Mapping[str, Any]) -> int | None:
    """The group of this host that is root's in the container.  None: it is that of this host.
    config: as it was checked (oci.config_json)."""
    for mapping in (config.get("linux") or {}).get("gidMappings") or ():
        if mapping.get("containerID", 0) == 0 and mapping.get("size", 0) > 0:
            return int(mapping.get("hostID", 0))
    return None


def let_read(folder: Path, group: int | None) -> None:
    """Let the group read the folders of images in `folder`, which only root can change."""
    if group is None:
        return
    os.chown(folder, -1, group)
    folder.chmod(0o710)
    for images in folder.iterdir():
        ours = images.name == IMAGES or images.name.isdecimal()  # of the dump, of a memory round
        if images.is_symlink() or not images.is_dir() or not ours:
            continue
        os.chown(images, -1, group)
        images.chmod(0o750)
        for image in images.iterdir():
            if image.is_file() and not image.is_symlink():
                os.chown(image, -1, group)
                image.chmod(0o640)
