# SPDX-License-Identifier: Apache-2.0
"""The cgroup of a container: frozen, thawed, its processes ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from pyploop.errors import MigrateError, VzExitCode
from pyploop.freeze.cgroup_freezer import Freezer
from pyploop.runtimes.runc import members
from pyploop.system import kernel

DEADLINE = 10.0
"""Seconds for all processes to stop, or to end."""

VFORKS, VFORK_PAUSE = 20, 0.003
"""How often it is let go on, and for how many seconds, when it is frozen amid a vfork(2),
which lasts until the child runs its program: CRIU cannot take hold of the parent."""


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
        for pid in self.pids():
            _silence(pid)
        self._end(deadline)

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


def check_none_stopped(cgroup: ContainerCgroup, container: str) -> None:
    """CRIU waits for ever for a stopped process in a frozen cgroup, and for ten
    seconds for one that is traced."""
    for pid in cgroup.pids():
        if why := members.held(pid):
            raise MigrateError(VzExitCode.DUMP_FAILED, f"process {pid} of {container} is {why}")


def freeze(cgroup: ContainerCgroup, container: str) -> None:
    """So that CRIU can take hold of each process.  MigrateError; frozen, perhaps."""
    for again in range(VFORKS, -1, -1):
        cgroup.freeze()
        # One may have been stopped since, and would hold CRIU up, and the container
        # suspended, whatever --suspend-limit says.
        check_none_stopped(cgroup, container)
        waiting = [pid for pid in cgroup.pids() if members.awaits_vfork(pid)]
        if not waiting:
            return
        cgroup.thaw()
        if again:
            time.sleep(VFORK_PAUSE)
    raise MigrateError(
        VzExitCode.DUMP_FAILED,
        f"{members.named(waiting)} of {container} waits for what it has started (vfork), and "
        "cannot be checkpointed meanwhile: try again",
    )


def _silence(pid: int) -> None:
    """Put the process's TCP connections into repair mode, which stays until they are
    closed.  One at a time: it may have more than we may have descriptors."""
    with contextlib.suppress(OSError):  # it ended meanwhile
        pidfd = os.pidfd_open(pid)
        try:
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):  # closed since, or no TCP
                    if os.readlink(entry.path).startswith("socket:"):
                        fd = kernel.take_descriptor(pidfd, int(entry.name))
                        try:
                            kernel.tcp_repair(fd)
                        finally:
                            os.close(fd)
        finally:
            os.close(pidfd)
