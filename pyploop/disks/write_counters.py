# SPDX-License-Identifier: Apache-2.0
"""Whether a source was written between two moments, by the kernel's own word.

No tracker's event is needed for it: a block device has its accounting, a plain
file its times.  A look costs some microseconds.  What is dirty in a device's
page cache shows only once it is written back (`Source.write_back`).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pyploop.disks.source import Source
from pyploop.system import sysblock
from pyploop.system.sysblock import BlockDevice

_WRITTEN, _DISCARDED = 6, 13
"""Fields of a device's `stat`: sectors written and discarded (Linux 4.19)."""


class Writes:
    """Of one source; `close` when done."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._file = source.fd if source.kind == "file" else -1
        self._stat = -1
        self._iostats: Path | None = None
        if (device := _accounted(source)) is not None:
            major, minor = device.dev
            self._iostats = Path("/sys/block") / device.disk / "queue/iostats"
            # A partition has an accounting of its own.
            with contextlib.suppress(OSError):
                self._stat = os.open(f"/sys/dev/block/{major}:{minor}/stat", os.O_RDONLY)

    @property
    def knows(self) -> bool:
        """The accounting is there, and on."""
        if self._file >= 0:
            return True
        if self._stat < 0 or self._iostats is None:
            return False
        try:
            return self._iostats.read_text().strip() == "1"
        except OSError:
            return False

    def stamp(self) -> tuple[int, ...]:
        """Differs from an earlier one when the source was written since."""
        if self._file >= 0:
            st = os.fstat(self._file)
            # The modification time can be put back (touch -r, rsync -t).
            return st.st_mtime_ns, st.st_ctime_ns, st.st_size
        if self._stat < 0:
            return ()
        fields = os.pread(self._stat, 4096, 0).split()
        return tuple(int(fields[n]) for n in (_WRITTEN, _DISCARDED) if n < len(fields))

    def begin(self) -> tuple[int, ...]:
        """The stamp, before a pass reads the source.  A store through a mapping
        moves a file's times only when its page is clean: so it is written back,
        after the stamp, for nothing may come in between unseen."""
        stamp = self.stamp()
        self._source.write_back_file()
        return stamp

    def close(self) -> None:
        if self._stat >= 0:
            os.close(self._stat)
            self._stat = -1


def _accounted(source: Source) -> BlockDevice | None:
    """The device whose accounting is that of the source: the one that all writes
    pass, unless it has other bytes too, which may be written all the time."""
    queue = source.queue
    if queue is None or sysblock.find(queue.dev).size != queue.size:
        return source.block
    return queue
