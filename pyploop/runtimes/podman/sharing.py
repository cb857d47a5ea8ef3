# SPDX-License-Identifier: Apache-2.0
"""Other containers of this host that use the folders of one.  Its folders are removed here when it
has moved, and the others would lose them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.podman.command import Podman
from pyploop.runtimes.runc import discovered


def _used(podman: Podman, runc_root: str, moving: Collection[str]) -> Iterator[tuple[str, str]]:
    """(container, path): what is bound into them, volumes too, running or stopped."""
    known = set(moving)
    for raw in podman.all_inspected():
        if raw.get("Id") in moving:
            continue
        known.add(str(raw.get("Id")))
        for mount in raw.get("Mounts") or ():
            if mount.get("Type") in ("bind", "volume") and mount.get("Source"):
                yield str(raw.get("Name")), str(mount["Source"])
    # Those that run by runc, and that Podman does not know.
    yield from discovered.used(runc_root, known)


def check(
    podman: Podman, runc_root: str, name: str, folders: Iterable[str], moving: Collection[str]
) -> None:
    """MigrateError(15) when a container whose ID is not in `moving` uses one of the folders.
    name: that of the container which has them."""
    if use := discovered.first_use(folders, _used(podman, runc_root, moving)):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{use.folder} of {name} is used by the container {use.container}, too ({use.path}), "
            "which would lose it",
            path=use.folder,
            hint="give each container a folder or volume of its own; or name the folder in "
            "[podman] external, if both hosts have it",
        )
