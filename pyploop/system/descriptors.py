# SPDX-License-Identifier: Apache-2.0
"""Descriptors that carry the stream and the feedback.

Invariant: nothing waits without a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Iterator

from pyploop.errors import ParameterError, ProtocolError, ReadError, WriteError
from pyploop.system import kernel
from pyploop.units import MIB

PIPE_SIZE = MIB
ANSWER_TIMEOUT = 60.0
"""Seconds for a peer to take a few bytes."""
POLL_SLICE = 0.1
"""Seconds between looks at a cancelled flag while waiting for a peer."""


def is_stream(fd: int) -> bool:
    """A pipe or a socket."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


def check_open(fd: int, option: str) -> os.stat_result:
    """The descriptor named by an option; ParameterError when it is not open."""
    try:
        return os.fstat(fd)
    except OSError as e:
        raise ParameterError.of(f"{option} {fd}", e) from e


def check_stream(fd: int, option: str) -> None:
    """ParameterError unless it is an open pipe or socket, of bytes: one of messages
    drops what is not read of each."""
    check_open(fd, option)
    if not is_stream(fd):
        raise ParameterError(f"{option} {fd} is not a pipe or a socket")
    if is_socket(fd):
        with socket.socket(fileno=os.dup(fd)) as s:
            listens = s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if s.type != socket.SOCK_STREAM or listens:
                raise ParameterError(
                    f"{option} {fd} is a socket, but not of a stream (SOCK_STREAM)"
                )


def check_input(fd: int, option: str) -> None:
    """The same, and it can be read."""
    check_stream(fd, option)
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        raise ParameterError(f"{option} {fd} is open for writing only")


def no_delay(fd: int) -> None:
    """Send small messages on a TCP socket at once (TCP_NODELAY).  Otherwise a SYNC after a
    block, or an answer after another, waits up to 40 ms in the freeze: for an
    acknowledgement that the other end delays.  Does nothing for other descriptors."""
    if not is_socket(fd):
        return
    with socket.socket(fileno=os.dup(fd)) as s, contextlib.suppress(OSError):
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def enlarge_pipe(fd: int) -> int | None:
    """Give a pipe 1 MiB of buffer, or what the user may have; returns its size,
    None when it is not a pipe."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return None
    size = PIPE_SIZE
    while size > 65536:
        try:
            return kernel.set_pipe_size(fd, size)
        except OSError:
            size //= 2
    return None


@contextlib.contextmanager
def nonblocking(fd: int) -> Iterator[int]:
    """A descriptor for the same pipe or socket that never blocks in write.

    O_NONBLOCK belongs to the open file description, which other processes
    may share (our stdout is the shell's, too): so a pipe is opened anew
    through /proc.  Where that is forbidden the flag is set, and taken off
    again at the end.  A socket needs none: MSG_DONTWAIT is per call.
    """
    if is_socket(fd):
        yield fd
        return
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
        try:
            yield fd
        finally:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return
    try:
        yield own
    finally:
        os.close(own)


def readable(fd: int, seconds: float) -> bool:
    """Something, or the end, can be read within this time."""
    poll = select.poll()  # select(2) ends at descriptor 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def writable(fd: int, seconds: float) -> bool:
    """Something can be written, or nobody reads any more, within this time."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


def is_closed(fd: int) -> bool:
    """This pipe or socket has no reader any more."""
    poll = select.poll()
    poll.register(fd, 0)  # errors and hang-ups are always reported
    return bool(poll.poll(0))


def read_exactly(
    fd: int, size: int, deadline: Callable[[], float], what: str, stream: int = -1
) -> bytes:
    """`size` bytes from a pipe or socket before `deadline` (time.monotonic();
    asked again at each wait).

    ProtocolError when the peer closes first, ReadError after the deadline.
    stream: the descriptor that the same peer reads.  WriteError when the peer closes that:
    another process may keep the feedback pipe open.  The waits are short, so that a
    signal's exception is raised soon.
    """
    got = b""
    while len(got) < size:
        left = deadline() - time.monotonic()
        if left <= 0:
            raise ReadError(f"{what}: no answer from the peer in time (it may be dead or stuck)")
        closed = stream >= 0 and is_closed(stream)
        if not readable(fd, min(left, 0 if closed else POLL_SLICE)):
            if closed:
                raise WriteError(f"{what}: the receiver is gone (see its own message)").follows()
            continue
        try:
            part = os.read(fd, size - len(got))
        except BlockingIOError:
            continue
        except OSError as e:
            if e.errno == errno.ECONNRESET:
                part = b""
            else:
                raise ReadError.of(what, e) from e
        if not part:
            text = f"{what}: the peer closed the channel after {len(got)} bytes"
            raise ProtocolError(text).follows()
        got += part
    return got


def write_all(fd: int, data: bytes, what: str, timeout: float = ANSWER_TIMEOUT) -> None:
    """A small message into a pipe or socket; WriteError when the peer is gone,
    or has not made room for it within `timeout` seconds."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    try:
        while data:
            if not poll.poll(timeout * 1000):
                raise WriteError(f"{what}: the peer does not read what is sent to it")
            if is_socket(fd):
                with socket.socket(fileno=os.dup(fd)) as s:
                    n = s.send(data, socket.MSG_NOSIGNAL)
            else:
                n = os.write(fd, data)
            data = data[n:]
    except OSError as e:
        error = WriteError.of(what, e)
        raise (error.follows() if e.errno == errno.EPIPE else error) from e


def length(path: str) -> int:
    """Bytes of a file or a block device; 0: it is neither, or cannot be opened."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return 0  # to open anything else may do something
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
    except OSError:
        return 0
