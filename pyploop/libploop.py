# SPDX-License-Identifier: Apache-2.0
"""The module that p.haul imports as `libploop`: copying a disk by its
DiskDescriptor.xml over a socket, in D2 or D3 (docs/reference/libploop.md).

Names, arguments and results are those of the original binding.  Every failure is a
RuntimeError with the text of the error.  Sockets are given as descriptors and stay the
caller's.  They are never closed, but they are shut down when a copy fails, so that the
other end does not go on waiting.  Any thread may call; one object serves one thread at a
time.

    python -m pyploop.libploop --alias DIR     puts a libploop.py into DIR
"""

if __name__ == "__main__":
    from pyploop.system import own_path

    own_path.leave_current_folder()

import argparse
import contextlib
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pyploop.api.copying import Copy, CopyOptions
from pyploop.api.devices import device_of
from pyploop.api.receiving import receive
from pyploop.errors import ParameterError, PyploopError

__all__ = ["ploopcopy", "ploopcopy_receiver", "ploopcopy_thr_receiver"]

STALL = 600.0
"""Seconds after which a receiver that takes next to nothing, or does not answer, has failed."""
IDLE = 3600.0
"""The same of a sender.  It is long, since its caller sends memory between two rounds."""


class ploopcopy:
    """The sending end: copy_start, copy_next_iteration as often as wanted,
    copy_stop.  After a failure nothing is tracked or frozen, and the object is of no use."""

    def __init__(self, ddxml: str, fd: int, async_: int = 0) -> None:
        """ddxml: the disk's DiskDescriptor.xml; fd: socket to the receiver, or
        a regular file that becomes the copy; async_: the receiver takes DATA_ASYNC
        packets, although it may have no handshake."""
        self._state: Literal["new", "running", "over"] = "over"
        self._fd = fd
        with _runtime_errors():
            mode = _mode(fd)
            self._packets = stat.S_ISSOCK(mode)
            if not (self._packets or stat.S_ISREG(mode)):
                raise ParameterError(f"descriptor {fd} is neither a socket nor a file")
            self._copy = Copy(device_of(ddxml), fd, options=self._options(bool(async_)))
            self._copy.__enter__()
        self._state = "new"

    def _options(self, knows_async: bool) -> CopyOptions:
        if not self._packets:
            return CopyOptions(timeout=STALL)
        return CopyOptions(timeout=STALL, protocol="packets-async" if knows_async else "packets")

    def copy_start(self) -> int:
        """The first pass; returns the bytes sent."""

        def work() -> int:
            self._copy.first_pass()
            self._copy.sync_target()
            return self._copy.sent

        self._expect("new")
        self._state = "running"
        return self._step(work)

    def copy_next_iteration(self) -> int:
        """Sends what was written since; returns the bytes sent.

        All of it is durable at the target then.  So a failure there shows here, and the
        last sync, with the disk frozen, has little to do."""

        def work() -> int:
            sent = self._copy.round().sent
            self._copy.sync_target()
            return sent

        self._expect("running")
        return self._step(work)

    def copy_stop(self) -> int:
        """Freezes the file systems, sends the rest, and thaws when the copy is durable at
        the other end; returns the bytes sent."""

        def work() -> int:
            before = self._copy.sent
            self._copy.freeze_and_finish()
            return self._copy.sent - before

        self._expect("running")
        sent = self._step(work)
        self._state = "over"
        self._copy.close()
        return sent

    def _expect(self, state: str) -> None:
        if self._state != state:
            raise RuntimeError(
                "copy_start, then copy_next_iteration, then copy_stop once: this copy is "
                + self._state
            )

    def _step(self, work: Callable[[], int]) -> int:
        try:
            with _runtime_errors():
                return work()
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        running, self._state = self._state == "running", "over"
        self._copy.close()
        if running and self._packets:
            _hang_up(self._fd)

    def __del__(self) -> None:
        if self._state != "over":
            self._give_up()


class ploopcopy_receiver:
    """The receiving end: returns when the image is durable under its name."""

    def __init__(self, fname: str, fd: int) -> None:
        """fname: a new file; fd: the socket."""
        _receive(fname, fd)


class ploopcopy_thr_receiver(threading.Thread):
    """The receiving end in a thread of its own: start(), join().  After join
    `error` is the RuntimeError that ended it, or None."""

    def __init__(self, fname: str, fd: int) -> None:
        super().__init__()
        self._fname, self._fd = fname, fd
        self.error: RuntimeError | None = None

    def run(self) -> None:
        try:
            _receive(self._fname, self._fd)
        except RuntimeError as e:
            self.error = e
            raise


def _receive(fname: str, fd: int) -> None:
    with _runtime_errors():
        if not stat.S_ISSOCK(_mode(fd)):
            raise ParameterError(f"descriptor {fd} is not a socket")
        try:
            receive(fname, fd, timeout=IDLE, protocol="packets")
        except BaseException:
            _hang_up(fd)
            raise


def _mode(fd: int) -> int:
    try:
        return os.fstat(fd).st_mode
    except OSError as e:
        raise ParameterError.of(f"descriptor {fd}", e) from e


def _hang_up(fd: int) -> None:
    """End the conversation on a socket that is its caller's to close."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as s:
        s.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _runtime_errors() -> Iterator[None]:
    """Expected failures become RuntimeErrors, as in the original binding."""
    try:
        yield
    except PyploopError as e:
        raise RuntimeError(e.with_hint()) from e
    except OSError as e:
        raise RuntimeError(f"{e.filename or 'copying'}: {e.strerror}") from e


ALIAS = """\
# Made by `python -m pyploop.libploop --alias`: p.haul's libploop is pyploop's.
from pyploop.libploop import *  # noqa: F403
"""


def _write_alias(folder: str) -> Path:
    """Put a module `libploop` into the folder, unless there is another one."""
    path = Path(folder) / "libploop.py"
    try:
        with path.open("x") as f:
            f.write(ALIAS)
    except FileExistsError:
        # Another user's may be a FIFO, and he can still change what is in it.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with open(os.open(path, flags), "rb") as old:
            st = os.fstat(old.fileno())
            ours = stat.S_ISREG(st.st_mode) and st.st_uid in (0, os.geteuid())
            if not ours or old.read(2 * len(ALIAS)) != ALIAS.encode():
                raise
    return path


def main(argv: list[str] | None = None) -> int:
    """`python -m pyploop.libploop --alias DIR`"""
    p = argparse.ArgumentParser(prog="python -m pyploop.libploop")
    p.add_argument("--alias", metavar="DIR", required=True, help="put a libploop.py there")
    try:
        print(_write_alias(p.parse_args(argv).alias))
    except (OSError, ValueError) as e:
        print(f"cannot write the alias: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
