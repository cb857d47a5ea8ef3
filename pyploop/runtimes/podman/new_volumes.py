# SPDX-License-Identifier: Apache-2.0
"""Volumes that Podman must not take for new ones any more.

When a container starts for the first time with a volume, Podman gives the volume's folder the
owner and mode of its place in the image, or else of the container's user.  On this host that
start would come after the files: another owner may keep the container from its own data.  So a
container that is never run has that first start, before the files are in their place.
"""

from __future__ import annotations

from collections.abc import Iterable

from pyploop.errors import VzExitCode
from pyploop.runtimes.podman.command import Podman


class NewVolumes:
    """Of one container that comes."""

    def __init__(self, podman: Podman, container_id: str) -> None:
        self._podman = podman
        self._name = f"pyploop-{container_id[:32]}"
        """Of the container that is never run."""

    def make(self, volumes: Iterable[str], image: str) -> None:
        """Make the volumes.  They are this migration's as long as the container is there.
        MigrateError(7)."""
        binds = [f"--volume={name}:/pyploop-{n}" for n, name in enumerate(volumes)]
        if not binds:
            return
        self._podman.run(
            *("container", "create", f"--name={self._name}", "--pull=never", "--network=none"),
            *("--no-healthcheck", "--log-driver=none", *binds, image, "/pyploop-nothing"),
            code=VzExitCode.RESTORE_FAILED,
        )
        # It fails, for there is no such program.  Podman has seen to the volumes before that.
        self._podman.tried("container", "init", self._name)

    def remove(self) -> bool:
        """Remove the container, and leave the volumes.  Whether it was there.  MigrateError(7)."""
        if not self._podman.says_yes("container", "exists", self._name):
            return False
        self._podman.run(
            *("container", "rm", "-f", "-t", "0", self._name), code=VzExitCode.RESTORE_FAILED
        )
        return True
