# SPDX-License-Identifier: Apache-2.0
"""The memory images of one migration that comes to this host, received into tmpfs as
they are written at the source."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from pyploop.errors import ProtocolError
from pyploop.migration import file_stream
from pyploop.migration.file_stream import Budget, Place
from pyploop.migration.image_chain import Chain
from pyploop.runtimes import LARGEST_FILE, memory_in_use

IMAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,127}")
"""Of CRIU's images, and vzctl's dump."""


class IncomingMemory:
    """Of one migration."""

    def __init__(self, folder: Path, announced: int | None, stall: float) -> None:
        """folder: of all its images.  announced: bytes of memory that `check` announced.
        stall: seconds without a byte after which the stream is given up."""
        self._chain, self._stall = Chain(folder), stall
        self._budget = Budget(memory_in_use.most_taken(announced) if announced else LARGEST_FILE)

    def check(self, number: int, parent: int) -> None:
        """ProtocolError unless these images may come next; see Chain."""
        self._chain.check(number, parent)

    def receive(
        self, fd: int, number: int, parent: int, dumped: Callable[[Path], None]
    ) -> Callable[[], None]:
        """The work of receiving the images of a pre-dump, or (0) of the dump, which
        `dumped` gets then."""
        images = self._chain.append(number, parent)

        def opened(name: str, flags: int) -> int:
            if not IMAGE_NAME.fullmatch(name) or name == "parent":
                raise ProtocolError(f"{name[:80]!r} is not the name of a memory image")
            flags |= os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(images / name, flags, 0o600)

        def work() -> None:
            place = Place(
                lambda name: opened(name, os.O_CREAT | os.O_EXCL),
                lambda name: opened(name, 0),
                largest=lambda _: self._budget.most,
                budget=self._budget,
            )
            file_stream.receive(fd, self._stall, place)
            if not number:
                # Here, and not when the restore is asked for: the last blocks of the
                # disks are on their way meanwhile.
                dumped(images)

        return work
