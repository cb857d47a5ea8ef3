# SPDX-License-Identifier: Apache-2.0
"""The end of a device that is less than a sector, and the end of a file that its loop device
does not show."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from pyploop.errors import ReadError
from pyploop.system.kernel import LoopStatus


@dataclass(frozen=True)
class Tail:
    """`size` bytes (less than a sector) at byte `pos` of `fd`, with buffered reads."""

    size: int
    name: str
    """The name of what they are read from."""
    fd: int
    pos: int


def find_tail(source: str, at: int, end: int, file: int | None, base: int) -> Tail:
    """The bytes from `at` to `end` of the device `source`.  Its byte 0 is at `base` of `file`,
    if it has a backing file.  The caller closes the descriptor.  ReadError when nothing can
    read them.

    Only kernels before Linux 6.11 read them through the device's page cache.  Later ones
    refuse any request for a part of a sector."""
    size = end - at
    ways = [(source, source, at)]
    if file is not None:
        ways.insert(0, ("the backing file", f"/proc/self/fd/{file}", base + at))
    for name, path, pos in ways:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if len(os.pread(fd, size, pos)) == size:
                    return Tail(size, name, os.dup(fd), pos)
            finally:
                os.close(fd)
    raise ReadError(
        f"the last {size} bytes of {source} are less than one of its sectors, and this kernel "
        "cannot read them: copy the image file or device below it instead"
    )


def left_out(device: str, size: int, file: str, file_size: int, status: LoopStatus) -> list[str]:
    """A note when the loop device shows less of its file than it should.  It shows whole
    sectors only, and only the size that the file had when it was attached."""
    wanted = file_size - status.offset
    if status.sizelimit:
        wanted = min(wanted, status.sizelimit)
    if wanted <= size:
        return []
    why = "a loop device shows whole sectors only"
    if wanted - size >= 512:
        why = "the file has grown since it was attached (losetup --set-capacity)"
    return [
        f"The last {wanted - size} of {wanted} bytes of {file} are not on {device}, and so not "
        f"in the copy: {why}"
    ]
