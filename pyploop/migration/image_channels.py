# SPDX-License-Identifier: Apache-2.0
"""The file stream of memory images (file_stream.py has its bytes), moved by the native core:
the sender writes frames straight into the connection, and the connection's reader puts
them into a ring, from which the receiver writes files.

Which file a piece may go to is decided here, by the same rules as for all file streams.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from pyploop._core import Fault, FilesIn, FilesOut, Piece
from pyploop.errors import ProtocolError, PyploopError, ReadError, WriteError
from pyploop.migration.file_stream import (
    LARGEST,
    LONGEST_NAME,
    Files,
    Place,
    Received,
    cannot_read,
    cannot_write,
    check_piece,
    decode_name,
    ended_early,
)
from pyploop.runtimes import LARGEST_FILE
from pyploop.system.jobs import Job
from pyploop.transport.line import Line, milliseconds
from pyploop.transport.mux import Mux
from pyploop.wire import mux as wire


def open_writer(mux: Mux, number: int, window: int, stall: float, rate: int = 0) -> ImageWriter:
    """A channel of the connection for sending memory images; else as `Mux.open`."""
    return mux.open_line(number, window, lambda line: ImageWriter(line, stall, rate))


def open_reader(mux: Mux, number: int, window: int, stall: float) -> ImageReader:
    """The same for receiving them."""
    return mux.open_line(number, window, lambda line: ImageReader(line, stall))


class _Channel:
    """One direction carries the stream, the other one only credit."""

    def __init__(self, line: Line) -> None:
        self._line, self._connection, self._number = line, line.connection, line.number
        self._cancelled = self._closed = False

    def _close(self, kind: int) -> None:
        """Tell the peer, unless the connection is dead.  Nothing the second time.  Nobody
        waits for that: the peer may take nothing, and a container may be suspended."""
        if self._closed:
            return
        self._closed = True
        self._connection.forget(self._number)
        Job(lambda: self._tell(kind)).start()

    def _tell(self, kind: int) -> None:
        with contextlib.suppress(PyploopError):  # the connection's end is reported elsewhere
            self._connection.write([wire.frame(kind, self._number, 0)])

    def _broken(self, e: OSError) -> PyploopError:
        """A frame was not written: the connection is dead."""
        if e.errno == errno.ETIME and self._cancelled:
            cause = WriteError("the peer did not take the rest of a frame that was cancelled")
        elif e.errno == errno.ETIME:
            cause = WriteError(f"the peer took no data for {self._line.silence:g} s")
        else:
            cause = WriteError.of("the connection to the peer broke", e)
        self._connection.end(cause)  # nothing if it has ended already
        return WriteError(f"the connection to the peer has ended: {self._connection.failure}")

    def _unexpected(self, what: str) -> ProtocolError:
        return ProtocolError(f"agent protocol: the peer sent {what} in channel {self._number}")


class ImageWriter(_Channel):
    """The source's end; a context manager that ends the channel."""

    def __init__(self, line: Line, stall: float, rate: int) -> None:
        """stall: seconds within which the peer must give credit for a frame; 0: no limit.
        rate: bytes per second at most; 0: no limit."""
        super().__init__(line)
        self._core = FilesOut(
            line.gate,
            line.number,
            window=line.window,
            rate=rate,
            stall_ms=milliseconds(stall),
            silence_ms=milliseconds(line.silence),
        )

    @property
    def sent(self) -> int:
        """Bytes of data so far."""
        return self._core.sent

    @property
    def zeroes(self) -> int:
        """Bytes that were not sent, because they are zero."""
        return self._core.zeroes

    def grown(self, name: str, path: Path, pos: int) -> int:
        """Send what the file has from `pos` on.  Returns where it ends now."""
        try:
            with open(path, "rb", buffering=0) as f:
                return self._core.grow(os.fsencode(name), 0o600, f.fileno(), pos)
        except OSError as e:
            if getattr(e, "stage", "read") in ("read", "none"):
                raise ReadError.of(f"cannot read {path}", e, path=str(path)) from e
            raise self._unsent(e) from e

    def complete(self, name: str, mode: int, size: int) -> None:
        """The file has all its data, and is `size` bytes long."""
        try:
            self._core.complete(os.fsencode(name), mode, size)
        except OSError as e:
            raise self._unsent(e) from e

    def file(self, name: str, path: str) -> None:
        """Send a whole file, without its zeroes."""
        size = self.grown(name, Path(path), 0)
        self.complete(name, 0o600, size)

    def end(self) -> None:
        """The stream is whole."""
        self.complete("", 0, 0)

    def _unsent(self, e: OSError) -> PyploopError:
        if getattr(e, "stage", "") == "write":
            return self._broken(e)
        return WriteError.of("cannot send files to the target", e)

    def cancel(self) -> None:
        """From any thread: from now on sending fails here.  A frame that was begun is still
        ended.  If the peer does not take it within a second, the connection has ended."""
        self._cancelled = True
        self._core.stop(errno.ECANCELED)

    def close(self) -> None:
        self.cancel()
        self._close(wire.END)

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- for the connection

    def deliver(self, data: bytearray) -> None:
        raise self._unexpected("data, which nobody reads,")

    def credit(self, n: int) -> None:
        try:
            self._core.credit(n)
        except OSError as e:
            raise self._unexpected("more credit than it took bytes") from e

    def finish(self) -> None:
        """It sends nothing in any case."""

    def reset(self) -> None:
        """The peer does not read it any more, or the connection has ended."""
        self._core.stop(errno.EPIPE)


class ImageReader(_Channel):
    """The target's end."""

    def __init__(self, line: Line, stall: float) -> None:
        """stall: seconds of waiting for 64 KiB of the stream; 0: no limit."""
        super().__init__(line)
        self._core = FilesIn(
            line.gate,
            line.number,
            window=line.window,
            stall_ms=milliseconds(stall),
            silence_ms=milliseconds(line.silence),
        )
        try:
            line.intake.add(self._core)
        except OSError as e:
            raise ProtocolError(
                "agent protocol: too many channels of memory images are open at once"
            ) from e

    def receive(self, place: Place) -> Received:
        """Receive pieces until the stream ends.  Closes the channel."""
        files = Files(place)
        try:
            self._receive(files, place)
            done = files.end()
            self._end(wire.END)
            return done
        finally:
            files.close()
            self.close()

    def _receive(self, files: Files, place: Place) -> None:
        piece = self._stream("", self._core.next)
        while piece.name:
            check_piece(len(piece.name), piece.length, piece.pos)
            name = decode_name(piece.name)
            fd = files.admit(name, piece.pos, piece.length)
            if piece.length:
                piece = self._data(files, place, name, fd, piece.length)
            else:
                files.complete(name, piece.mode, piece.pos)
                piece = self._stream("", self._core.next)

    def _data(self, files: Files, place: Place, name: str, fd: int, first: int) -> Piece:
        """The data of a piece that was admitted, and those of the pieces that go on with
        the same file.  Returns the one after them."""
        budget = place.budget
        most = first + (budget.lease() if budget is not None else LARGEST_FILE)
        largest = min(place.largest(name), LARGEST_FILE)

        def count(taken: int) -> None:
            files.count(taken - first)
            if budget is not None:
                budget.give_back(most - taken)

        return self._stream(name, lambda: self._core.take(fd, LARGEST, largest, most, count))

    def _stream(self, name: str, what: Callable[[], Piece]) -> Piece:
        try:
            return what()
        except Fault as e:
            if e.stage == "write":
                raise cannot_write(name, e) from e
            if e.stage == "reply":
                raise self._broken(e) from e
            if e.errno == errno.EMSGSIZE:
                raise ProtocolError(
                    f"the source sent a file whose name is longer than {LONGEST_NAME} bytes"
                ) from e
            raise (ended_early() if e.errno == errno.ENODATA else cannot_read(e)) from e

    def close(self) -> None:
        """Nothing more is received."""
        self._end(wire.RESET)

    def _end(self, kind: int) -> None:
        self._core.stop(errno.ENODATA)
        self._line.intake.remove(self._core)
        self._close(kind)

    # ---- for the connection

    def deliver(self, data: bytearray) -> None:
        """A frame that was read as the channel was opened or closed."""

    def credit(self, n: int) -> None:
        raise self._unexpected("credit, though nothing is sent to it,")

    def finish(self) -> None:
        self._core.finish()

    def reset(self) -> None:
        """The peer sends no more, or the connection has ended."""
        self._core.stop(errno.ENODATA)
