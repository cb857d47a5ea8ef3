# SPDX-License-Identifier: Apache-2.0
"""Whether a block device still shows the same contents as at the start.

An open loop device can get another file (LOOP_CHANGE_FD) or another part of its file
(LOOP_SET_STATUS), and the medium of a drive can be changed.  Then all contents change
without a write, so no tracker sees it.
"""

from __future__ import annotations

import os

from pyploop.errors import ReadError
from pyploop.system import kernel
from pyploop.system.kernel import LoopStatus


class Identity:
    """The medium of one disk ('loop0') at the time it was opened."""

    def __init__(self, disk: str, loop_fd: int = -1) -> None:
        """loop_fd: the open loop device; it is not closed here.  OSError when nothing is
        attached."""
        self._path, self._loop_fd = f"/dev/{disk}", loop_fd
        try:
            # Kept open: it is read inside the freeze, where opening it takes too long.
            self._sequence_fd = os.open(f"/sys/block/{disk}/diskseq", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # before Linux 5.15
            self._sequence_fd = -1
        try:
            self._at_start = self._read()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self._sequence_fd >= 0:
            os.close(self._sequence_fd)
            self._sequence_fd = -1

    def _read(self) -> tuple[bytes, LoopStatus | None]:
        """The sequence number of the medium (diskseq), and the loop device's status."""
        sequence = os.pread(self._sequence_fd, 32, 0) if self._sequence_fd >= 0 else b""
        if self._loop_fd < 0:
            return sequence, None
        # The I/O mode may change, as that does not change the contents.
        return sequence, kernel.loop_status(self._loop_fd, self._path)._replace(direct_io=False)

    def check(self) -> None:
        """ReadError when the device shows other contents now."""
        try:
            now = self._read()
        except OSError as e:
            what = f"{self._path} has no medium or file any more"
            raise ReadError.of(f"{what}; no target was made", e) from e
        if now == self._at_start:
            return
        (_, before), (_, loop) = self._at_start, now
        what = "another medium than"
        if before is not None and loop is not None and loop != before:
            same_file = loop[:2] == before[:2]
            what = "another part of its file than" if same_file else "another file than"
        raise ReadError(
            f"{self._path} shows {what} at the start of the copy (it was reconfigured "
            "meanwhile); no target was made: start the copy again",
            path=self._path,
        )
