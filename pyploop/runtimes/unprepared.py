# SPDX-License-Identifier: Apache-2.0
"""A runtime that starts nothing before the container is suspended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode

NOTHING = "this runtime starts nothing ahead"


class Unprepared:
    """These steps of Runtime, with nothing in them."""

    name: str
    container: str
    first_image = ""
    needs_trust = False
    keeps_source = False
    wants: frozenset[str] = frozenset()
    peer_wants: frozenset[str] = frozenset()
    instance: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def image_folders(self, images: Path) -> dict[str, Path]:
        return {"": images}

    def prepare_dump(self, images: Path, parent: Path | None) -> str:
        return NOTHING

    def before_suspend(self) -> None:
        pass

    def prepare_undump(self, images: Path) -> str:
        return NOTHING

    def begin_undump(self) -> None:
        pass

    def give_up(self) -> None:
        pass

    def rewire(self, networks: Sequence[str], ports: Sequence[str]) -> None:
        if networks or ports:
            raise MigrateError(
                VzExitCode.USAGE,
                "--network and --publish are for containers of Podman: "
                f"{self.container} is run by {self.name}",
            )

    def settled(self) -> list[str]:
        return []
