# SPDX-License-Identifier: Apache-2.0
"""The target's part of a probe of the connection: one file comes as memory images do, into
memory without a name, and is forgotten."""

from __future__ import annotations

import os
from collections.abc import Callable

from pyploop.migration.file_stream import Budget, Place
from pyploop.migration.image_channels import ImageReader


def receiver(images: ImageReader, size: int) -> Callable[[], None]:
    """The work that receives it.  size: bytes that are accepted."""

    def create(name: str) -> int:
        return os.memfd_create("pyploop-probe")

    place = Place(create, largest=lambda _: size, most_files=1, budget=Budget(size))

    def work() -> None:
        images.receive(place)

    return work
