# SPDX-License-Identifier: Apache-2.0
"""What a block device shows, and whether that is the same as at the start.

An open loop device can be given another file (LOOP_CHANGE_FD) or another part of
its file (LOOP_SET_STATUS), and the medium of a drive can be changed.  All
contents change then, and no write passes through the queue: no tracker sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pyploop import kernel
from pyploop.errors import ReadError
from pyploop.kernel import LoopStatus


@dataclass(frozen=True)
class Identity:
    """Of one disk ('loop0'), as it was when it was opened."""

    disk: str
    sequence: str
    """The kernel's number of the medium; empty before Linux 5.15."""
    loop: LoopStatus | None = None
    fd: int = field(default=-1, compare=False)
    """Of the loop device; borrowed."""

    @classmethod
    def of(cls, disk: str, loop_fd: int = -1) -> Identity:
        """OSError when nothing is attached to the loop device."""
        loop = None
        if loop_fd >= 0:
            # How it reads and writes may change: that changes no contents.
            loop = kernel.loop_status(loop_fd, f"/dev/{disk}")._replace(direct_io=False)
        try:
            sequence = (Path("/sys/block") / disk / "diskseq").read_text().strip()
        except OSError:
            sequence = ""
        return cls(disk, sequence, loop, loop_fd)

    def check(self) -> None:
        """ReadError when the device shows something else now."""
        try:
            now = Identity.of(self.disk, self.fd)
        except OSError as e:
            what = f"/dev/{self.disk} shows no file any more"
            raise ReadError.of(f"{what}; no target was made", e) from e
        if now == self:
            return
        what = "another medium than"
        if self.loop is not None and now.loop is not None and now.loop != self.loop:
            same_file = now.loop[:2] == self.loop[:2]
            what = "another part of its file than" if same_file else "another file than"
        raise ReadError(
            f"/dev/{self.disk} shows {what} at the start of the copy (it was reconfigured "
            "meanwhile); no target was made, start again"
        )
