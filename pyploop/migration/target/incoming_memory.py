# SPDX-License-Identifier: Apache-2.0
"""The incoming memory images of one migration.  They are received into tmpfs while the
source writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from pyploop.errors import ProtocolError, WriteError
from pyploop.migration.file_stream import Budget, Place, cannot_write
from pyploop.migration.image_chain import Chain
from pyploop.migration.image_channels import ImageReader
from pyploop.runtimes import LARGEST_FILE, memory_in_use

IMAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,127}")
"""A name of CRIU's images, or of vzctl's dump."""


class IncomingMemory:
    """The memory images of one migration."""

    def __init__(self, folder: Path, announced: int | None) -> None:
        """folder: for all images.  announced: bytes of memory that the source announced in
        `check`."""
        self._chain = Chain(folder)
        self._budget = Budget(memory_in_use.most_taken(announced) if announced else LARGEST_FILE)

    def check(self, number: int, parent: int) -> None:
        """ProtocolError unless these images may come next (image_chain.Chain)."""
        self._chain.check(number, parent)

    def receive(
        self,
        channel: ImageReader,
        number: int,
        parent: int,
        dumped: Callable[[Path], None],
        completed: Callable[[str], None],
    ) -> Callable[[], None]:
        """Returns the work that receives the images of a pre-dump, or (0) of the dump.
        dumped: called with the folder of the complete dump.  completed: with the name of each
        complete image."""
        try:
            images = self._chain.append(number, parent)
        except OSError as e:
            raise WriteError.of("cannot make a folder for memory images", e) from e

        def opened(name: str, flags: int) -> int:
            if not IMAGE_NAME.fullmatch(name) or name == "parent":
                raise ProtocolError(f"{name[:80]!r} is not the name of a memory image")
            flags |= os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                return os.open(images / name, flags, 0o600)
            except OSError as e:  # no room, above all
                raise cannot_write(name, e) from e

        def work() -> None:
            place = Place(
                lambda name: opened(name, os.O_CREAT | os.O_EXCL),
                lambda name: opened(name, 0),
                largest=lambda _: self._budget.most,
                budget=self._budget,
                completed=completed,
            )
            channel.receive(place)
            if not number:
                # Now, and not when the restore is requested: the last blocks of the disks
                # are still on their way, so this costs no downtime.
                dumped(images)

        return work
