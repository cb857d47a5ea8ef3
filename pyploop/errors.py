# SPDX-License-Identifier: Apache-2.0
"""Every expected failure, and every exit code.

A message says what failed, on which file, peer or offset, what was left behind,
and what to do; `str(error)` is one line.
"""

from __future__ import annotations

import os
from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """Exit codes of `pyploop copy`: the `SYSEXIT_*` contract of libploop 1.15
    (docs/reference/exit-codes.md has the meaning of each)."""

    OK = 0
    CREATE = 1
    DEVICE = 2
    DEVICE_CONTROL = 3
    OPEN = 4
    TOO_LARGE = 5
    READ = 6
    WRITE = 7
    SYSFS = 9
    FORMAT = 11
    COMMAND = 12
    PROTOCOL = 13
    LOOP = 14
    SYNC = 16
    BUSY = 17
    CANCELLED = 29
    PARAMETER = 38
    DESCRIPTOR = 39
    CONNECT = 69
    """Ours: no code of libploop is that large.  As EX_UNAVAILABLE of sysexits.h."""


class VzExitCode(IntEnum):
    """Exit codes of `pyploop migrate`: those of vzmigrate (docs/internals/migrate.md has the
    meaning of each)."""

    OK = 0
    USAGE = 1
    STOPPED = 2
    CANNOT_CONNECT = 4
    COPY_FAILED = 6
    RESTORE_FAILED = 7
    DUMP_FAILED = 8
    EXISTS = 9
    NO_CONTAINER = 10
    IP_IN_USE = 12
    QUOTA = 13
    NO_KERNEL = 14
    BAD_CONFIG = 15
    NO_PLOOP = 16
    CHECKPOINT_VERSION = 17
    CPU = 18
    NO_VZ_CONF = 19
    LOCKED = 20


def one_line(text: str) -> str:
    """Escaped: what a terminal acts on (control characters, marks that turn the
    direction of text), what breaks a line, and what is not seen or is no character
    (bytes of a file name that are not UTF-8).  Such text comes from file names,
    peers, and the output of commands."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


HINT = ". Hint: "
"""Stands between a message and its hint, here and in an agent's answer."""


def joined(text: str, hint: str | None) -> str:
    """A message and its hint as one line of text."""
    return f"{text}{HINT}{one_line(hint)}" if hint else text


class PyploopError(Exception):
    """An expected failure.  `str(error)` is the whole message, in one line."""

    exit_code: int = ExitCode.CREATE
    """What our command line ends with: an ExitCode, of MigrateError a VzExitCode."""
    path: str | None = None
    """The file or device that it is about; None: there is none, or several."""
    hint: str | None = None
    """What to do about it, when the message does not say so already."""
    peer_failed = False
    """It only follows from a failure of the peer, whose own message says why."""

    def __init__(self, *args: object, path: str | None = None, hint: str | None = None) -> None:
        super().__init__(*args)
        if path is not None:
            self.path = path
        if hint is not None:
            self.hint = hint

    def __str__(self) -> str:
        return one_line(super().__str__())

    @classmethod
    def of(
        cls, what: str, error: OSError, *, path: str | None = None, hint: str | None = None
    ) -> Self:
        """`what: reason`, the reason being the errno's text.  path: that of the OSError,
        unless it is given."""
        reason = os.strerror(error.errno) if error.errno else str(error)
        if path is None and isinstance(error.filename, str):
            path = error.filename
        return cls(f"{what}: {reason}", path=path, hint=hint)

    def with_hint(self) -> str:
        """The message and what to do, in one line: what a person is shown."""
        return joined(str(self), self.hint)

    def saying(self, text: str) -> PyploopError:
        """One of the same kind."""
        return type(self)(text, path=self.path, hint=self.hint)

    def follows(self) -> Self:
        """The same, marked as `peer_failed`."""
        self.peer_failed = True
        return self

    def add(self, words: str) -> None:
        """More about the state that things are in now."""
        self.args = (f"{self.args[0]}; {words}", *self.args[1:])


class CreateError(PyploopError):
    """The target cannot be created, or exists."""

    exit_code = ExitCode.CREATE


class DeviceError(PyploopError):
    """The source device is missing or cannot be read."""

    exit_code = ExitCode.DEVICE


class DeviceControlError(PyploopError):
    """A tracking, freeze or sync request failed."""

    exit_code = ExitCode.DEVICE_CONTROL


class OpenError(PyploopError):
    """Something that belongs to the source cannot be opened or found."""

    exit_code = ExitCode.OPEN


class TooLargeError(PyploopError):
    """A size from the stream is larger than this side allows."""

    exit_code = ExitCode.TOO_LARGE


class ReadError(PyploopError):
    """Reading the source or the stream failed, or it ended early."""

    exit_code = ExitCode.READ


class WriteError(PyploopError):
    """Writing the target or the stream failed."""

    exit_code = ExitCode.WRITE


class SysfsError(PyploopError):
    """A sysfs attribute is missing or cannot be understood."""

    exit_code = ExitCode.SYSFS


class FormatError(PyploopError):
    """The image format is not one that can be copied."""

    exit_code = ExitCode.FORMAT


class CommandError(PyploopError):
    """A command given by the user failed."""

    exit_code = ExitCode.COMMAND


class ProtocolError(PyploopError):
    """The peer said something that is not in the protocol."""

    exit_code = ExitCode.PROTOCOL


class LoopError(PyploopError):
    """The source is still being written although it should be frozen."""

    exit_code = ExitCode.LOOP


class SyncError(PyploopError):
    """Data could not be made durable, here or at the peer."""

    exit_code = ExitCode.SYNC


class BusyError(PyploopError):
    """Another process does the same work: it holds the lock."""

    exit_code = ExitCode.BUSY


class CancelledError(PyploopError):
    """Another thread of this process cancelled the copy."""

    exit_code = ExitCode.CANCELLED


class ParameterError(PyploopError):
    """The command line, or a descriptor it names, is wrong."""

    exit_code = ExitCode.PARAMETER


class NotSupportedError(PyploopError):
    """The peer asks for something that pyploop does not do."""

    exit_code = ExitCode.PARAMETER


class DescriptorError(PyploopError):
    """A DiskDescriptor.xml does not describe one chain of deltas."""

    exit_code = ExitCode.DESCRIPTOR


class ConnectError(PyploopError):
    """There is no connection to pyploop on the other host, or it was lost."""

    exit_code = ExitCode.CONNECT


class MigrateError(PyploopError):
    """A migration failed; `exit_code` is a VzExitCode (docs/reference/exit-codes.md)."""

    def __init__(
        self, exit_code: int, text: str, *, path: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(text, path=path, hint=hint)
        self.exit_code = exit_code

    def saying(self, text: str) -> MigrateError:
        return MigrateError(self.exit_code, text, path=self.path, hint=self.hint)


class Interrupted(BaseException):
    """A signal asked to stop; everything is undone before it takes effect."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum
        self.state = "everything was undone here"
