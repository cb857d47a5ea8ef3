# SPDX-License-Identifier: Apache-2.0
"""The incoming static files of one migration: configuration, scripts, lower deltas.  The
label of each says where it belongs.

Invariant: before a file is made or moved aside, it is in the journal.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pyploop.migration import file_stream, undo_kinds
from pyploop.migration.file_stream import Place
from pyploop.migration.target.incoming_files import IncomingFiles
from pyploop.runtimes import Facts, Runtime
from pyploop.system import beneath
from pyploop.undo.journal import Journal

MOST_ITEMS = 4096
"""Static files of one migration at most: a vzctl container may have 1,000."""


class IncomingItems:
    """The static files of one migration."""

    def __init__(
        self,
        runtime: Runtime,
        files: IncomingFiles,
        log: Journal,
        facts: Facts,
        *,
        stall: float,
        mode: int,
    ) -> None:
        """log: the journal; it gets the undo steps.  facts: the source facts.  stall: as of
        file_stream.receive.  mode: of folders that are made."""
        self._runtime, self._files, self._journal = runtime, files, log
        self._facts, self._stall, self._mode = facts, stall, mode

    def receive(self, fd: int) -> Callable[[], None]:
        """Returns the work that receives all of them, and lets the runtime place them."""
        place = Place(
            self._create,
            largest=self._runtime.largest,
            most_files=MOST_ITEMS,
            durable=True,
            modes=file_stream.PLAIN,
        )

        def work() -> None:
            file_stream.receive(fd, self._stall, place)
            self._files.check_items()
            self._placed()

        return work

    def _create(self, label: str) -> int:
        path = self._runtime.destination(label)
        root = self._runtime.root_of(path)
        undo_kinds.make_folders(self._journal, Path(path).parent, self._mode, root)
        with beneath.place(path, root) as at:
            if not beneath.exists(at):
                return self._files.item(label, at, root)
            self._give_way(at, root)
            return beneath.create(at)

    def _placed(self) -> None:
        for folder in self._runtime.folders():
            undo_kinds.make_folders(self._journal, Path(folder), self._mode)
        for path in self._runtime.makes(self._facts):
            root = self._runtime.root_of(path)
            with beneath.place(path, root) as at:
                self._give_way(at, root)
        self._runtime.placed(self._facts)

    def _give_way(self, at: beneath.Place, root: str) -> None:
        """Before a file is made: move an existing one aside, so that it can be put back."""
        if beneath.exists(at):
            saved = f"{at.path}.pyploop-saved"
            self._journal.add({"kind": "put-back", "path": at.path, "saved": saved, "root": root})
            name = os.path.basename(saved)
            os.replace(at.name, name, src_dir_fd=at.dir_fd, dst_dir_fd=at.dir_fd)
        else:
            self._journal.add({"kind": "remove", "path": at.path, "root": root})
