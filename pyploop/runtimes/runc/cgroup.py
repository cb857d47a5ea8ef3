# SPDX-License-Identifier: Apache-2.0
"""The cgroup of a container: frozen, thawed, its processes ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from pyploop.errors import MigrateError, VzExitCode
from pyploop.freeze.cgroup_freezer import Freezer
from pyploop.system import kernel

DEADLINE = 10.0
"""Seconds for all processes to stop, or to end."""


class ContainerCgroup:
    """A container's cgroup, with all below it."""

    def __init__(self, freezer: Freezer) -> None:
        self._freezer = freezer
        self.is_frozen, self.pids = freezer.frozen, freezer.processes

    def freeze(self) -> None:
        """MigrateError when not all have stopped in time; thawed then."""
        folder = self._freezer.folder
        try:
            self._freezer.knob.write_text(self._freezer.freeze_word)
            if self._freezer.wait(time.monotonic() + DEADLINE):
                return
            self.thaw()
        except OSError as e:
            raise MigrateError(
                VzExitCode.DUMP_FAILED, f"cannot freeze {folder}: {e.strerror}"
            ) from e
        raise MigrateError(
            VzExitCode.DUMP_FAILED, f"the processes in {folder} did not freeze; thawed"
        )

    def thaw(self) -> None:
        """Also one that is gone, or was not frozen."""
        with contextlib.suppress(OSError):
            self._freezer.knob.write_text(self._freezer.thaw_word)

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
                raise MigrateError(
                    VzExitCode.DUMP_FAILED, f"processes {pids} in {self._freezer.folder} do not end"
                )
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
