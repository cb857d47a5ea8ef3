# SPDX-License-Identifier: Apache-2.0
"""A block device as the target (--to-device).

Invariants: nobody else has the device: it is claimed as a mount claims it (O_EXCL) before
the first byte, and until the copy has ended.  What the source has as a hole becomes zeroes.
What lies past the end of the source stays as it was.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable

from pyploop.diskcopy.target_file import make_durable
from pyploop.disks.backing import Thing
from pyploop.errors import CreateError, ParameterError, PyploopError, SyncError, WriteError
from pyploop.report.events import Reporter
from pyploop.system import kernel, sysblock
from pyploop.system.sysblock import BlockDevice
from pyploop.units import format_size
from pyploop.usage import users
from pyploop.usage.related_devices import find_related


class DeviceSink:
    """An open target device, with what a new file (target_file.Sink) has; a context manager.

    Nothing can be undone here: after a failure the device contains a part of the copy, and
    the message says so."""

    copied_from = -1
    unsynced = False  # the page cache of a device that nobody has open is empty

    def __init__(self, path: str, report: Reporter | None = None, *, update: bool = False) -> None:
        """update: it has an older copy, and only what differs from that is sent.
        CreateError: it is in use, or cannot be written.  ParameterError: not a device."""
        self.path, self.has_prior = path, update
        self._report = report or Reporter()
        self.fd = _open(path)
        try:
            self.size = kernel.device_size(self.fd, path)
            if kernel.is_read_only(self.fd, path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
            _check_unused(path, os.fstat(self.fd))
        except BaseException as e:
            os.close(self.fd)
            if isinstance(e, OSError):
                raise _cannot_open(path, e) from e
            raise
        self.old_contents = not update
        self.old_end = self.size
        """It may hold data below this position."""
        self.touched = False
        """A byte of it may have been written."""
        self.synced_ns = 0
        """time.monotonic_ns() of the last sync's end."""

    @property
    def left(self) -> str:
        """The end of a message about a failure before the end; `__exit__` says more."""
        return ""

    def expect(self, size: int) -> None:
        """WriteError when the device is smaller than the source."""
        if size > self.size:
            raise self.too_small(f"the source, which has {size} bytes")

    def too_small(self, what: str) -> WriteError:
        return WriteError(
            f"{self.path} has {self.size} bytes, which is too small for {what}",
            path=self.path,
            hint="name a device that is at least as large as the source",
        )

    def wanted(self) -> bool:
        """As Sink.wanted; a device does not show it."""
        return False

    def older(self) -> set[Thing]:
        """Nothing but itself."""
        return set()

    def set_size(self, size: int) -> None:
        """The copy ends there; the rest of the device stays as it is."""
        self.expect(size)
        if size < self.size:
            self._report.note(
                f"{self.path} is larger than the copy: its last {format_size(self.size - size)} "
                f"(from byte {size} on) were left as they were"
            )

    def sync(self) -> None:
        """Make durable what was written so far."""
        try:
            make_durable(self.fd, self.path)
        except OSError as e:
            raise SyncError.of(f"cannot sync {self.path}", e, path=self.path) from e
        self.synced_ns = time.monotonic_ns()

    def commit(self, before_end: Callable[[], None] = lambda: None) -> None:
        """Make the contents durable.  before_end: called after that; when it raises, the copy
        has failed."""
        self.sync()
        before_end()

    def __enter__(self) -> DeviceSink:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        os.close(self.fd)
        if self.touched and isinstance(error, PyploopError):
            error.add(
                f"{self.path} may have parts of both the older and the newer state (--inplace)"
                if self.has_prior
                else f"{self.path} contains only a part of the copy, and what it had is lost"
            )


def _open(path: str) -> int:
    """Open and claim it.  Its type is checked first: the open of a FIFO would wait."""
    try:
        pin = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as e:
        raise CreateError.of(f"cannot open the target device {path}", e, path=path) from e
    try:
        st = os.fstat(pin)
        if not stat.S_ISBLK(st.st_mode):
            raise ParameterError(
                f"--to-device: {path} is not a block device",
                path=path,
                hint="without --to-device the target is a new file",
            )
        return os.open(f"/proc/self/fd/{pin}", os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise _in_use(path, _who_claims(path, st)) from e
        raise _cannot_open(path, e) from e
    finally:
        os.close(pin)


def _cannot_open(path: str, error: OSError) -> CreateError:
    hint = None
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "make it writable (blockdev --setrw), or run as a user who may write to it"
    return CreateError.of(
        f"cannot open the target device {path} for writing", error, path=path, hint=hint
    )


def _in_use(path: str, why: str) -> CreateError:
    return CreateError(
        f"{path} is in use, so it was not touched: {why}",
        path=path,
        hint="end that use first, or name another device",
    )


def _who_claims(path: str, st: os.stat_result) -> str:
    """What has claimed it, as far as /proc and /sys show."""
    related = find_related(sysblock.find(sysblock.dev_numbers(st.st_rdev)))
    found = [str(user) for user in users.find(path, related).users]
    if not found:
        for member in related.members:
            found += [
                f"{member.path} belongs to {holder.path}"
                for holder in sysblock.related(member.device, "holders")
            ]
    return "; ".join(found) or "something has claimed it for itself (another copy, a driver)"


def _check_unused(path: str, st: os.stat_result) -> None:
    """Uses that claim nothing: loop devices on it, and processes that can write to it."""
    device = sysblock.find(sysblock.dev_numbers(st.st_rdev))
    own = {d.dev for d in _parts(device)}
    for loop in sysblock.loops():
        if loop.below in own:
            raise _in_use(path, f"{loop.path} is attached to it (losetup -d {loop.path})")
    for pid in users.device_writers(own):
        raise _in_use(path, f"{users.describe(pid)} has it open for writing")


def _parts(device: BlockDevice) -> list[BlockDevice]:
    if device.is_partition:
        return [device]
    return [device, *sysblock.partitions(device)]
