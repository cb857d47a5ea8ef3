# SPDX-License-Identifier: Apache-2.0
"""The incoming files of one migration that may outlive its failure.  Resumable files of an
earlier migration are used again.  With --keep-dst the files that come now lie where they
can be kept (resumable_files.py).

Invariant: before a file is made or moved, it is in the journal, with the name that it has
until it is finished.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyploop.diskcopy import digests
from pyploop.diskcopy.target_file import Sink
from pyploop.errors import ProtocolError, WriteError
from pyploop.migration.target import resumable_files
from pyploop.migration.target.resumable_files import ResumableFile
from pyploop.migration.target.resumable_target import ResumableSink, check_untouched, lease
from pyploop.report.events import Reporter
from pyploop.runtimes import LARGEST_FILE, Disk, Runtime
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.volumes import existing_parent
from pyploop.system import beneath
from pyploop.system.beneath import Place
from pyploop.undo.journal import Journal


class IncomingFiles:
    """The owner calls `close`, on every path."""

    def __init__(
        self,
        host: HostConfig,
        runtime: Runtime,
        log: Journal,
        disks: Sequence[Disk],
        report: Reporter,
    ) -> None:
        """log: the journal, with the fields `migration`, `source` and `keep`; it gets the
        undo steps."""
        self._log, self._container = log, runtime.container
        # Looked up before anything is made: folders that stay, on each disk's file system.
        self._homes = {f"disk {n}": existing_parent(disk.image) for n, disk in enumerate(disks)}
        self._items_home = next(iter(self._homes.values()), Path(host.state_dir))
        homes = {*self._homes.values(), self._items_home}
        self._files = resumable_files.adopt(host, runtime, log, homes, report)
        self._asked: dict[str, int] = {}
        self._placed: list[tuple[int, str]] = []
        self._number = 0

    @property
    def names(self) -> list[str]:
        """Names of the resumable files."""
        return list(self._files)

    def send_digests(self, wanted: Any, out: socket.socket) -> Callable[[], None]:
        """Returns the work that sends the digests.  wanted: a list of [name, size]; the sizes
        are those of the files at the source."""
        sizes = []
        for name, size in wanted:
            file = self._files.get(name)
            if file is None or name in self._asked:
                raise ProtocolError(
                    f"agent protocol: {str(name)[:80]!r} is not among the resumable files here"
                )
            if not isinstance(size, int) or not 0 <= size <= LARGEST_FILE:
                raise ProtocolError(f"agent protocol: {size!r} is not the size of a file")
            sizes.append((file, size))
        for file, size in sizes:
            try:
                os.ftruncate(file.fd, size)
            except OSError as e:
                raise WriteError.of(
                    f"cannot set the size of {file.path} to {size} bytes", e, path=file.path
                ) from e
            self._asked[file.name] = size

        def work() -> None:
            with out:
                for file, size in sizes:
                    digests.send(file.fd, size, out)

        return work

    # ---- what is received

    def disk(self, name: str, path: str, reuse: bool) -> Sink | None:
        """Where a disk is received.  None: a new file that has no name until it is finished.
        reuse: the source has asked for its digests, and sends what differs."""
        file = self._used(name, reuse)
        if file is not None:
            self._copied(name, path, file.path)
            return ResumableSink(path, file.path, file.fd, self._asked[name], leased=True)
        if not self._log.get("keep"):
            self._log.add({"kind": "remove", "path": path})
            return None
        unfinished = self._new_path(self._homes[name])
        self._copied(name, path, unfinished)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(unfinished, flags, 0o600)
        leased = False
        with contextlib.suppress(OSError):  # not all file systems have leases
            lease(fd)
            leased = True
        return ResumableSink(path, unfinished, fd, 0, leased)

    def item(self, label: str, at: Place, root: str) -> int:
        """The open file for a static file, at its place; the caller closes it.  root: see
        Runtime.root_of."""
        file = self._used(label, label in self._asked)
        if file is not None:
            self._placed.append((file.fd, at.path))
            self._copied(label, at.path, file.path, root)
            os.rename(file.path, at.name, dst_dir_fd=at.dir_fd)
            return os.dup(file.fd)
        if self._log.get("keep"):
            self._copied(label, at.path, self._new_path(self._items_home), root)
        else:
            self._log.add({"kind": "remove", "path": at.path, "root": root})
        return beneath.create(at)

    def check_items(self) -> None:
        """All static files are there.  WriteError when another process has opened one of
        them for writing."""
        for fd, path in self._placed:
            check_untouched(fd, path)
        self._let_go()

    def _used(self, name: str, reuse: bool) -> ResumableFile | None:
        file = self._files.get(name)
        if reuse and (file is None or name not in self._asked):
            raise ProtocolError(
                f"agent protocol: {name[:80]!r} cannot be reused: its digests were not requested"
            )
        self._files.pop(name, None)  # the user's from now on
        if file is not None and not reuse:
            os.close(file.fd)
            Path(file.path).unlink(missing_ok=True)
            return None
        return file

    def _copied(self, name: str, path: str, unfinished: str, root: str = "") -> None:
        entry = {"kind": "copied", "what": name, "path": path, "kept": unfinished}
        self._log.add({**entry, "root": root})

    def _new_path(self, home: Path) -> str:
        self._number += 1
        return resumable_files.new_path(
            home, self._container, self._log.get("migration"), self._number
        )

    # ---- the end

    def _let_go(self) -> None:
        for fd, _ in self._placed:
            os.close(fd)
        self._placed.clear()

    def close(self) -> None:
        """Nothing is received any more."""
        self._let_go()
        for file in self._files.values():
            os.close(file.fd)
        self._files.clear()
