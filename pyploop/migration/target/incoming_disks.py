# SPDX-License-Identifier: Apache-2.0
"""The incoming disks of one migration.  Each is mounted as soon as it is durable.

Invariant: before a disk is made or mounted, it is in the journal.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.receiver import receive
from pyploop.errors import ProtocolError, PyploopError
from pyploop.migration import undo_kinds
from pyploop.migration.target.incoming_files import IncomingFiles
from pyploop.report.events import Reporter
from pyploop.runtimes import Disk, Facts, Runtime
from pyploop.system import beneath
from pyploop.undo.journal import Journal


@dataclass(frozen=True)
class Stream:
    """How one disk comes."""

    rfd: int
    wfd: int | None = None
    """For the answers; None: `rfd` is a channel's socket, and they go there."""
    lanes: Lanes | None = None
    """Further streams for its data."""
    opened: Callable[[Callable[[], None]], None] = lambda _: None
    """Called with what cancels the receipt."""
    failed: Callable[[], None] = lambda: None
    """Called when the receipt has failed, so that the source sees the end of the stream."""

    def close(self) -> None:
        """The descriptors of a lane are the lane's."""
        if self.wfd is None:
            os.close(self.rfd)


class IncomingDisks:
    """The disks of one migration."""

    def __init__(
        self,
        runtime: Runtime,
        disks: list[Disk],
        files: IncomingFiles,
        log: Journal,
        facts: Facts,
        *,
        stall: float,
        mode: int,
        report: Reporter,
    ) -> None:
        """disks: the container's, in this host's configuration.  log: the journal; it gets the
        undo steps.  facts: the source facts.  stall: as of diskcopy's `receive`.  mode: of
        folders that are made."""
        self._runtime, self._disks, self._files, self._journal = runtime, disks, files, log
        self._announced = facts.get("images") or []
        self._stall, self._mode, self._report = stall, mode, report

    def check(self, index: int) -> None:
        """ProtocolError unless there is such a disk."""
        if not 0 <= index < len(self._disks):
            raise ProtocolError(
                f"agent protocol: there is no disk {index!r}: this container has "
                f"{len(self._disks)} disks here"
            )

    def receive(self, index: int, stream: Stream, reuse: bool) -> Callable[[], None]:
        """Returns the work that receives one disk, mounts it, and closes the stream.
        reuse: the source sends only what differs from the resumable file."""
        disk = self._disks[index]
        largest = self._announced[index] if index < len(self._announced) else 0
        root = self._runtime.root_of(disk.image)
        undo_kinds.make_folders(self._journal, Path(disk.image).parent, self._mode, root)
        with beneath.place(disk.image, root):
            pass  # no link leads elsewhere now, and from here on none is made
        sink = self._files.disk(f"disk {index}", disk.image, reuse)
        for entry in self._runtime.attach(disk):
            self._journal.add(entry)

        def work() -> None:
            try:
                receive(
                    disk.image,
                    stream.rfd,
                    stream.wfd,
                    self._report,
                    self._stall,
                    sink=sink,
                    owner_undoes=True,
                    largest=largest,
                    opened=stream.opened,
                    lanes=stream.lanes,
                )
            except PyploopError as e:
                # In the disk's stream the source hears only that it failed.
                self._report.note(f"disk {index}: {e}")
                stream.failed()
                raise
            finally:
                stream.close()
            self._runtime.mount(disk)

        return work
