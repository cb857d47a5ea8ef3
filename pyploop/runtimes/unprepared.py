# SPDX-License-Identifier: Apache-2.0
"""A runtime that starts nothing before the container is suspended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NOTHING = "this runtime starts nothing ahead"


class Unprepared:
    """These steps of Runtime, with nothing in them."""

    first_image = ""
    needs_trust = False
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

    def settled(self) -> list[str]:
        return []
