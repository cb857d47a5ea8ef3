# SPDX-License-Identifier: Apache-2.0
"""The cgroup freezer, v1 and v2, written directly: no process is started."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from pyploop import kernel
from pyploop.errors import MigrateError
from pyploop.runtimes import DUMP_FAILED

DEADLINE = 10.0
"""Seconds for all processes to stop, or to end."""


class Freezer:
    """Of one cgroup, given by its folder in the v1 freezer or the v2 tree."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._v2 = (self.folder / "cgroup.freeze").exists()

    def _write(self, frozen: bool) -> None:
        if self._v2:
            (self.folder / "cgroup.freeze").write_text("1" if frozen else "0")
        else:
            (self.folder / "freezer.state").write_text("FROZEN" if frozen else "THAWED")

    def is_frozen(self) -> bool:
        """Every process of it has stopped."""
        if self._v2:
            return "frozen 1" in (self.folder / "cgroup.events").read_text()
        return (self.folder / "freezer.state").read_text().strip() == "FROZEN"

    def freeze(self) -> None:
        """MigrateError when not all have stopped in time; thawed then."""
        deadline = time.monotonic() + DEADLINE
        try:
            self._write(True)
            while not self.is_frozen():
                if time.monotonic() > deadline:
                    self._write(False)
                    raise MigrateError(
                        DUMP_FAILED, f"the processes in {self.folder} did not freeze; thawed"
                    )
                time.sleep(0.0005)  # the kernel tells nobody; a read asks again
        except OSError as e:
            raise MigrateError(DUMP_FAILED, f"cannot freeze {self.folder}: {e.strerror}") from e

    def thaw(self) -> None:
        """Also one that is gone, or was not frozen."""
        with contextlib.suppress(FileNotFoundError, OSError):
            self._write(False)

    def pids(self) -> list[int]:
        try:
            return [int(p) for p in (self.folder / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def kill(self) -> None:
        """End every process in it, frozen or not; MigrateError if some stay.

        Their connections end without a packet: the peer's is with the copy of
        the container, and a connection that waits here to send its FIN would
        keep that copy from coming back.
        """
        deadline = time.monotonic() + DEADLINE
        silenced = [fd for pid in self.pids() for fd in _silence(pid)]
        try:
            self._end(deadline)
        finally:
            for fd in silenced:
                os.close(fd)

    def _end(self, deadline: float) -> None:
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.thaw()  # v1 delivers signals only then
            if time.monotonic() > deadline:
                raise MigrateError(DUMP_FAILED, f"processes {pids} in {self.folder} do not end")
            time.sleep(0.002)


def _silence(pid: int) -> list[int]:
    """Put the process's TCP connections into repair mode; returns duplicates
    of them, to be closed when the process has ended."""
    taken: list[int] = []
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return taken
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            if os.readlink(entry.path).startswith("socket:"):
                fd = kernel.take_descriptor(pidfd, int(entry.name))
                taken.append(fd)
                with contextlib.suppress(OSError):  # another kind of socket
                    kernel.tcp_repair(fd)
    except OSError:  # it ended meanwhile
        pass
    finally:
        os.close(pidfd)
    return taken
