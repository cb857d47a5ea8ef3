# SPDX-License-Identifier: Apache-2.0
"""The cgroup of a container: freeze it, thaw it, end its processes."""

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
"""Seconds until all processes must have stopped, or ended."""

VFORKS, VFORK_PAUSE = 20, 0.003
"""How often a container is thawed again, and for how many seconds, when it was frozen
during a vfork(2).  That lasts until the child runs its program, and CRIU cannot stop the
parent meanwhile."""


class ContainerCgroup:
    """A container's cgroup and those below it."""

    def __init__(self, freezer: Freezer) -> None:
        self._freezer = freezer
        self.is_frozen, self.pids = freezer.frozen, freezer.processes
        self.order = str(freezer.knob), freezer.freeze_word
        """The file, and the word in it, that freezes it."""

    def freeze(self) -> None:
        """MigrateError(8) when not all processes stop in time; then it is thawed again."""
        folder = self._freezer.folder
        try:
            self._freezer.knob.write_text(self._freezer.freeze_word)
            if self._freezer.wait(time.monotonic() + DEADLINE):
                return
            self.thaw()
        except OSError as e:
            raise MigrateError(
                VzExitCode.DUMP_FAILED, f"cannot freeze {folder}: {e.strerror}", path=str(folder)
            ) from e
        raise MigrateError(
            VzExitCode.DUMP_FAILED,
            f"the processes in {folder} did not freeze within {DEADLINE:g} s; they were thawed",
            path=str(folder),
        )

    def thaw(self) -> None:
        """No error when the cgroup is gone, or was not frozen."""
        with contextlib.suppress(OSError):
            self._freezer.knob.write_text(self._freezer.thaw_word)

    def kill(self) -> None:
        """End every process in it, frozen or not.  MigrateError(8) when some do not end.

        Their connections end without a packet: the peer is connected to the container
        on the target now.  A connection that waits here to send its FIN would also keep
        the container from coming back to this host.
        """
        deadline = time.monotonic() + DEADLINE
        for pid in self.pids():
            _silence(pid)
        self._end(deadline)

    def hold(self) -> None:
        """Stop every process in it (SIGSTOP), frozen or not, and thaw it.  None of them runs
        before it ends.  Their connections end without a packet, as for `kill`."""
        pids = self.pids()
        for pid in pids:
            _silence(pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self.thaw()

    def _end(self, deadline: float) -> None:
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.thaw()  # v1 delivers no signal to frozen processes
            if time.monotonic() > deadline:
                raise MigrateError(
                    VzExitCode.DUMP_FAILED,
                    f"the processes {pids} in {self._freezer.folder} did not end within "
                    f"{DEADLINE:g} s of SIGKILL",
                    path=str(self._freezer.folder),
                )
            time.sleep(0.002)


def check_none_stopped(cgroup: ContainerCgroup, container: str) -> None:
    """MigrateError(8) for a stopped or traced process.  In a frozen cgroup CRIU waits for
    ever for a stopped one, and ten seconds for a traced one."""
    for pid in cgroup.pids():
        if state := members.stopped_or_traced(pid):
            raise MigrateError(
                VzExitCode.DUMP_FAILED,
                f"process {pid} of {container} is {state}: CRIU cannot checkpoint it",
            )


def freeze(cgroup: ContainerCgroup, container: str) -> None:
    """Freeze it in a state in which CRIU can stop each process.  After a MigrateError it may
    be frozen."""
    for again in range(VFORKS, -1, -1):
        cgroup.freeze()
        # A process may have been stopped since.  CRIU would wait for it, and the container
        # would stay suspended for longer than --suspend-limit.
        check_none_stopped(cgroup, container)
        waiting = [pid for pid in cgroup.pids() if members.awaits_vfork(pid)]
        if not waiting:
            return
        cgroup.thaw()
        if again:
            time.sleep(VFORK_PAUSE)
    raise MigrateError(
        VzExitCode.DUMP_FAILED,
        f"{members.named(waiting)} of {container} waits for a child that it has started (vfork), "
        "and cannot be checkpointed meanwhile; it was thawed: migrate it again",
    )


def _silence(pid: int) -> None:
    """Put the process's TCP connections into repair mode, which lasts until they are
    closed.  One at a time: it may have more sockets than we may have descriptors."""
    with contextlib.suppress(OSError):  # the process has ended
        pidfd = os.pidfd_open(pid)
        try:
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):  # closed since, or not TCP
                    if os.readlink(entry.path).startswith("socket:"):
                        fd = kernel.take_descriptor(pidfd, int(entry.name))
                        try:
                            kernel.tcp_repair(fd)
                        finally:
                            os.close(fd)
        finally:
            os.close(pidfd)
