# SPDX-License-Identifier: Apache-2.0
"""Every expected failure, with the exit code that `ploop` 1.15 has for it.

The numbers are the `SYSEXIT_*` contract of libploop (docs/reference/exit-codes.md).  A
message says what failed, on which file, peer or offset, what was left behind,
and what to do; `str(error)` is one line.
"""

from __future__ import annotations

import os


def one_line(text: str) -> str:
    """Escaped: what a terminal acts on (control characters, marks that turn the
    direction of text), what breaks a line, and what is not seen or is no character
    (bytes of a file name that are not UTF-8).  Such text comes from file names,
    peers, and the output of commands."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class PyploopError(Exception):
    """An expected failure; `exit_code` is the process's status."""

    exit_code = 1

    def __str__(self) -> str:
        return one_line(super().__str__())

    @classmethod
    def of(cls, what: str, error: OSError) -> PyploopError:
        """`what: reason`, the reason being the errno's text."""
        reason = os.strerror(error.errno) if error.errno else str(error)
        return cls(f"{what}: {reason}")

    def saying(self, text: str) -> PyploopError:
        """One of the same kind."""
        return type(self)(text)

    def add(self, words: str) -> None:
        """More about the state that things are in now."""
        self.args = (f"{self.args[0]}; {words}", *self.args[1:])


class CreateError(PyploopError):
    """The target cannot be created, or exists."""

    exit_code = 1


class DeviceError(PyploopError):
    """The source device is missing or cannot be read."""

    exit_code = 2


class DeviceControlError(PyploopError):
    """A tracking, freeze or sync request failed."""

    exit_code = 3


class OpenError(PyploopError):
    """Something that belongs to the source cannot be opened or found."""

    exit_code = 4


class TooLargeError(PyploopError):
    """A size from the stream is larger than this side allows."""

    exit_code = 5


class ReadError(PyploopError):
    """Reading the source or the stream failed, or it ended early."""

    exit_code = 6


class WriteError(PyploopError):
    """Writing the target or the stream failed."""

    exit_code = 7


class SysfsError(PyploopError):
    """A sysfs attribute is missing or cannot be understood."""

    exit_code = 9


class FormatError(PyploopError):
    """The image format is not one that can be copied."""

    exit_code = 11


class CommandError(PyploopError):
    """A command given by the user failed."""

    exit_code = 12


class ProtocolError(PyploopError):
    """The peer said something that is not in the protocol."""

    exit_code = 13


class LoopError(PyploopError):
    """The source is still being written although it should be frozen."""

    exit_code = 14


class SyncError(PyploopError):
    """Data could not be made durable, here or at the peer."""

    exit_code = 16


class BusyError(PyploopError):
    """Somebody else is at the same work."""

    exit_code = 17


class CancelledError(PyploopError):
    """Another thread of this process gave the copy up."""

    exit_code = 29


class ParameterError(PyploopError):
    """The command line, or a descriptor it names, is wrong."""

    exit_code = 38


class NotSupportedError(PyploopError):
    """The peer asks for something that pyploop does not do."""

    exit_code = 38


class DescriptorError(PyploopError):
    """A DiskDescriptor.xml does not describe one chain of deltas."""

    exit_code = 39


class MigrateError(PyploopError):
    """A migration ended; the code is one of vzmigrate's (docs/reference/exit-codes.md)."""

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code

    def saying(self, text: str) -> MigrateError:
        return MigrateError(self.exit_code, text)


class Interrupted(BaseException):
    """A signal asked to stop; everything is undone before it takes effect."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum
        self.state = "everything was undone here"
