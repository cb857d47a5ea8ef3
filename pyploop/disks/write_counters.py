# SPDX-License-Identifier: Apache-2.0
"""Whether a source was written between two moments, by counters of the kernel.

No tracker is needed: a block device has its accounting, a plain file its times.  Reading
them takes some microseconds.  Dirty pages of a device's page cache count only after they
are written back (`Source.write_back`).
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
    """The counters of one source; `close` it after use."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._file = -1 if source.is_device else source.fd
        self._stat = -1
        self._iostats: Path | None = None
        if (device := _accounted(source)) is not None:
            self._iostats = Path("/sys/block") / device.disk / "queue/iostats"
            # A partition has an accounting of its own.
            with contextlib.suppress(OSError):
                self._stat = os.open(sysblock.node(device.dev) / "stat", os.O_RDONLY)

    @property
    def knows(self) -> bool:
        """True when the counters are there and are kept."""
        if self._file >= 0:
            return True
        if self._stat < 0 or self._iostats is None:
            return False
        try:
            return self._iostats.read_text().strip() == "1"
        except OSError:
            return False

    def stamp(self) -> tuple[int, ...]:
        """A value that changes with each write to the source."""
        if self._file >= 0:
            st = os.fstat(self._file)
            # The modification time can be put back (touch -r, rsync -t).
            return st.st_mtime_ns, st.st_ctime_ns, st.st_size
        if self._stat < 0:
            return ()
        fields = os.pread(self._stat, 4096, 0).split()
        return tuple(int(fields[n]) for n in (_WRITTEN, _DISCARDED) if n < len(fields))

    def begin(self) -> tuple[int, ...]:
        """The stamp, before a pass reads the source.  A store through a mapping changes a
        file's times only when the page is clean.  So the file is written back, after the
        stamp, so that no store in between is missed."""
        stamp = self.stamp()
        self._source.write_back_file()
        return stamp

    def close(self) -> None:
        if self._stat >= 0:
            os.close(self._stat)
            self._stat = -1


def _accounted(source: Source) -> BlockDevice | None:
    """The device whose accounting is read.  It is the one that all writes pass, unless that
    has other bytes, which may be written all the time."""
    queue = source.queue
    if queue is None or sysblock.find(queue.dev).size != queue.size:
        return source.block
    return queue
