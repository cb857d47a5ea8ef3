# SPDX-License-Identifier: Apache-2.0
"""The stop command, and freezing of file systems that always ends in a thaw.

Invariant: whatever freezes, thaws on every path.  Exceptions and signals are
the context manager's; SIGKILL of this process is the watchdog's, a process
that holds the mount points open and thaws when its parent is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pyploop import kernel, watchdog
from pyploop.errors import BusyError, CommandError, DeviceControlError, LoopError, OpenError
from pyploop.events import Reporter
from pyploop.sysblock import Mount
from pyploop.worker import wait_for

LOCK_DEADLINE = 120.0
"""Seconds to wait for another copy's freeze of the same file system."""
WATCHDOG_DEADLINE = 10.0
"""Seconds for the watchdog to start."""
KILL_GRACE = 2.0


def run_command(command: str, what: str, timeout: float | None = None) -> None:
    """Run a shell command of the user's; CommandError unless it exits 0 within
    `timeout` seconds.

    Its stdin is /dev/null and its stdout our stderr: the stream stays clean.
    On an exception (a signal's) its process group is ended.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=2 if _stderr_open() else subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = wait_for(process, timeout)
    except subprocess.TimeoutExpired:
        _end(process)
        raise CommandError(f"{what} {command!r} did not end within {timeout:g} s") from None
    except BaseException:
        _end(process)
        raise
    if code > 0:
        raise CommandError(f"{what} {command!r} exited with {code}")
    if code < 0:
        raise CommandError(f"{what} {command!r} was killed by signal {-code}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(KILL_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stderr_open() -> bool:
    try:
        os.fstat(2)
    except OSError:
        return False
    return True


class FileSystems:
    """The mounted file systems of the source, open, in freezing order."""

    def __init__(self, mounts: list[Mount], report: Reporter) -> None:
        self._report = report
        self._stack = contextlib.ExitStack()
        self._open: list[tuple[Mount, int]] = []
        for mount in mounts:
            try:
                fd = os.open(mount.point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as e:
                self._stack.close()
                raise OpenError.of(f"cannot open the mount point {mount.point}", e) from e
            self._stack.callback(os.close, fd)
            if not mount.is_at(os.fstat(fd)):
                self._stack.close()
                raise OpenError(
                    f"{mount.point} is hidden under another mount, so {mount.source} cannot be "
                    "frozen there; use --mount with a folder where it is visible"
                )
            self._open.append((mount, fd))
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._frozen: list[tuple[Mount, int]] = []
        self._frozen_by_others: list[tuple[Mount, int]] = []

    def __len__(self) -> int:
        return len(self._open)

    def holding(self, st_dev: int) -> str | None:
        """The mount point of the file system with this st_dev, or None."""
        for mount, fd in self._open:
            if os.fstat(fd).st_dev == st_dev:
                return mount.point
        return None

    def close(self) -> None:
        """Thaw what is frozen, end the watchdog, close the mount points."""
        self.thaw()
        if self._line is not None:
            self._line.close()
        if self._watchdog is not None:
            try:
                self._watchdog.wait(WATCHDOG_DEADLINE)
            except subprocess.TimeoutExpired:
                self._watchdog.kill()
                self._watchdog.wait()
        self._stack.close()

    def sync(self) -> None:
        """Write back what is dirty, while running or after the stop command."""
        for mount, fd in self._open:
            try:
                kernel.syncfs(fd, mount.point)
            except OSError as e:
                raise DeviceControlError.of(f"cannot sync {mount.point}", e) from e

    def guard(self) -> None:
        """Lock the file systems against the freeze of another copy, and start
        the watchdog; before the stop command, so that neither costs frozen time."""
        if not self._open or self._watchdog is not None:
            return
        self._lock()
        # Packets: one message each, whatever its length.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [fd for _, fd in self._open]
        args = [sys.executable, "-I", "-S", str(Path(watchdog.__file__))]
        args += [str(kernel.FITHAW), str(theirs.fileno())]
        with theirs:
            self._watchdog = subprocess.Popen(
                args,
                pass_fds=[theirs.fileno(), *fds],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        ours.settimeout(WATCHDOG_DEADLINE)
        self._line = ours
        try:
            ready = ours.recv(watchdog.LONGEST)
        except TimeoutError:
            ready = b""
        if ready != watchdog.READY:
            raise DeviceControlError("the thaw watchdog did not start; nothing was frozen")

    def _lock(self) -> None:
        """Two copies of one file system must not rely on each other's freeze."""
        deadline = time.monotonic() + LOCK_DEADLINE
        for mount, fd in self._open:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise BusyError(
                            f"another copy keeps {mount.point} frozen, or is about to"
                        ) from None
                    time.sleep(0.02)

    def check_frozen(self) -> None:
        """What somebody else froze must still be frozen: LoopError if not."""
        for mount, fd in self._frozen_by_others:
            try:
                kernel.fifreeze(fd, mount.point)
            except OSError as e:
                if e.errno == errno.EBUSY:
                    continue
                raise DeviceControlError.of(f"cannot freeze {mount.point}", e) from e
            kernel.fithaw(fd, mount.point)
            raise LoopError(
                f"{mount.point} was frozen by somebody else, and thawed during the last blocks"
            )

    def freeze(self) -> None:
        """Freeze each; one that is frozen already (by the stop command) is
        left as it is, also at the end."""
        if not self._open:
            return
        self.guard()
        for mount, fd in self._open:
            # Noted first: a signal right after the freeze must find it.
            self._frozen.append((mount, fd))
            self._tell(watchdog.FREEZE, fd)
            try:
                kernel.fifreeze(fd, mount.point)
            except OSError as e:
                self._frozen.pop()
                self._tell(watchdog.THAWED, fd)
                if e.errno == errno.EBUSY:
                    self._frozen_by_others.append((mount, fd))
                    self._report.info(f"{mount.point} is frozen already, and will be left so")
                    continue
                raise DeviceControlError.of(f"cannot freeze {mount.point}", e) from e

    def warm_up(self) -> None:
        """Freeze and thaw once, while running: what a freeze costs is waiting
        for RCU grace periods (20 to 50 ms), and for some milliseconds after
        one those are short.  The page cache is flushed by it, too."""
        with self._report.held():
            self.freeze()
            self._thaw_ours()
        self._frozen_by_others.clear()  # freeze() looks again

    def _tell(self, word: bytes, fd: int) -> None:
        assert self._line is not None
        self._line.send(b"%s %d" % (word, fd))

    def thaw(self) -> None:
        """Thaw what `freeze` froze, in reverse order, and let others freeze."""
        try:
            self._thaw_ours()
        finally:
            for _, fd in self._open:
                fcntl.flock(fd, fcntl.LOCK_UN)

    def _thaw_ours(self) -> None:
        failed: list[str] = []
        while self._frozen:
            mount, fd = self._frozen[-1]
            try:
                kernel.fithaw(fd, mount.point)
            except OSError as e:
                failed.append(
                    f"{mount.point}: {os.strerror(e.errno or 0)} (fsfreeze -u {mount.point})"
                )
            # Forgotten last: thawing twice is harmless, not at all is not.
            self._frozen.pop()
            with contextlib.suppress(OSError):
                self._tell(watchdog.THAWED, fd)
        if failed:
            raise DeviceControlError(f"cannot thaw {'; '.join(failed)}")


class Timeline:
    """Named steps and their seconds, in order."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time of the body to `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.steps[name] = self.steps.get(name, 0.0) + time.monotonic() - start
