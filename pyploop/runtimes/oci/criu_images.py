# SPDX-License-Identifier: Apache-2.0
"""The check of CRIU's images against the config.json that this host has written, before
they are restored.

A restore makes processes as the images say, whatever the configuration says: their
capabilities, namespaces, mounts and cgroups.  This check refuses images that give more
than the configuration does.  It cannot make an untrusted source safe: CRIU reads the
images as root, and memory, the contents of tmpfs and seccomp filters are not checked.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pyploop.runtimes.oci.image_cgroups import Cgroups
from pyploop.runtimes.oci.image_files import Images
from pyploop.runtimes.oci.image_mounts import Mounts
from pyploop.runtimes.oci.image_processes import Processes
from pyploop.wire.criu import File
from pyploop.wire.protobuf import Malformed, Message

_EXTERNAL_BEGINS = (File.REGULAR_EXTERNAL << 3, File.REGULAR_EXTERNAL << 3 | 0x80)


def check(folder: Path, config: dict[str, Any], labels: Collection[str] = ()) -> None:
    """MigrateError(15) when the images in the folder give more than config.json does.

    config: as this host has written it.  labels: AppArmor and SELinux labels that the
    policy allows.  The kernel gives some to processes whose configuration has none."""
    images = Images(folder)
    try:
        _check_all(images, config, labels)
    except Malformed as e:
        images.refuse(f"is damaged: {e}")
    except OSError as e:
        images.refuse(f"cannot be read: {e.strerror}")


def _check_all(images: Images, config: dict[str, Any], labels: Collection[str]) -> None:
    names = images.names()
    images.check_streams()
    processes = Processes(images, config, labels)
    mounts, cgroups = Mounts(images, config), Cgroups(images, config)
    processes.check_ids(names)
    for name, kind in names.items():
        images.name = name
        if kind == "core":
            processes.check_core(images.only(name, kind))
        elif kind == "mountpoints":
            mounts.check(images.listed(name, kind))
        elif kind == "files":
            for entry in images.entries(name, kind):
                _check_file(images, entry)
        elif kind == "userns":
            processes.check_user_namespace(images.only(name, kind))
        elif kind == "cgroup":
            cgroups.check(images.only(name, kind))


def _check_file(images: Images, entry: Message) -> None:
    external = entry.number32(File.TYPE) == File.TYPE_EXTERNAL
    regular = entry.raw(File.REGULAR)
    # The field begins with one of these bytes.  Most of thousands of files have neither.
    if regular and any(byte in regular for byte in _EXTERNAL_BEGINS):
        external = external or bool(Message(regular).number32(File.REGULAR_EXTERNAL))
    if external:
        images.refuse("has an open file from outside the container")
