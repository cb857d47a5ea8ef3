# SPDX-License-Identifier: Apache-2.0
"""Pages of a lazy restore that are on this host, but where CRIU's daemon does not look: in the
images of memory rounds (lazy_chain.py).  As a process it is a page server for the daemon.

argv: the descriptor of CRIU's socket; CRIU's working folder, which has the index.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import syslog
from array import array
from bisect import bisect_right
from pathlib import Path

from pyploop.runtimes.lazy_images import PAGE
from pyploop.runtimes.runc.page_stream import enlarge, hurry
from pyploop.wire.page_server import ANSWER, GET, NARROW, WIDE, Layout, Message

INDEX = "local-pages"
PROGRESS = "progress"
"""Files in the working folder: where the pages are; how many bytes CRIU has got."""
PART = 1 << 20
"""Bytes of one answer at most: a page that a process waits for comes behind it."""


class LocalPages:
    """By process: ranges, and where they are."""

    def __init__(self, index: Path) -> None:
        """OSError and ValueError when there is none."""
        with index.open() as f:
            read = json.load(f)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._files = [os.open(file, flags) for file in read["files"]]
        self._pages: dict[int, tuple[array[int], array[int], array[int], array[int]]] = {}
        for pid, pieces in read["pages"].items():
            columns = zip(*pieces, strict=True)
            if pieces:
                starts, ends, files, offsets = (array("Q", column) for column in columns)
                self._pages[int(pid)] = starts, ends, files, offsets

    def close(self) -> None:
        for fd in self._files:
            os.close(fd)

    def find(self, process: int, address: int, most: int) -> tuple[int, int, int]:
        """(descriptor, offset, bytes) of at most so many bytes; no bytes: they are not here."""
        if process in self._pages:
            starts, ends, files, offsets = self._pages[process]
            at = bisect_right(starts, address) - 1
            if at >= 0 and address < ends[at]:
                into = address - starts[at]
                size = min(most, ends[at] - address)
                return self._files[files[at]], offsets[at] + into, size
        return -1, 0, 0

    def has(self, process: int, address: int) -> bool:
        return bool(self.find(process, address, PAGE)[2])

    def read(self, process: int, address: int, most: int) -> bytes:
        """Empty: they are not here.  OSError, also when the file is too short."""
        fd, offset, size = self.find(process, address, most)
        data = os.pread(fd, size, offset) if size else b""
        if len(data) != size:
            raise OSError(0, f"the images end before the page at {address:#x}")
        return data


class LocalServer:
    """Of one daemon."""

    def __init__(self, sock: socket.socket, work: Path) -> None:
        enlarge(sock)
        self._sock, self._work = sock, work
        self._progress = os.open(work / PROGRESS, os.O_WRONLY | os.O_CREAT, 0o600)

    def serve(self) -> None:
        """Until the daemon closes its socket.  OSError: it does not get what it wants."""
        try:
            if data := self._sock.recv(1 << 16):
                # The index is there: it is written before the daemon is started.
                with contextlib.closing(LocalPages(self._work / INDEX)) as pages:
                    self._answers(data, pages)
        finally:
            os.close(self._progress)

    def _answers(self, data: bytes, pages: LocalPages) -> None:
        said, sent, layout = b"", 0, None
        while data:
            said += data
            layout = layout or _layout_of(said, pages)
            while layout is not None and len(said) >= layout.size:
                request, said = layout.read(said[: layout.size]), said[layout.size :]
                if request.command != GET:
                    self._sock.sendall(b"\0\0\0\0")  # the end is well
                    continue
                sent += self._answer(layout, request, pages)
                os.pwrite(self._progress, b"%020d" % sent, 0)
            data = self._sock.recv(1 << 16)

    def _answer(self, layout: Layout, request: Message, pages: LocalPages) -> int:
        most = min(request.pages * PAGE, PART)
        fd, offset, size = pages.find(request.process, request.address, most)
        if not size:
            raise OSError(0, f"no page at {request.address:#x} of process {request.process}")
        answer = request._replace(command=ANSWER, pages=size // PAGE)
        self._sock.sendall(layout.write(answer), socket.MSG_MORE)
        left = size
        while left:
            n = os.sendfile(self._sock.fileno(), fd, offset + size - left, left)
            if not n:
                raise OSError(0, f"the images end before the page at {request.address:#x}")
            left -= n
        return size


def _layout_of(said: bytes, pages: LocalPages) -> Layout | None:
    """From the first request.  None: not yet.  OSError: none fits."""
    for layout in (WIDE, NARROW):
        if len(said) >= layout.size:
            first = layout.read(said[: layout.size])
            if first.command == GET and pages.find(first.process, first.address, PAGE)[2]:
                return layout
    if len(said) >= WIDE.size:
        raise OSError(0, "CRIU's requests are of an unknown kind")
    return None


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGPIPE"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    syslog.openlog("pyploop-pages", syslog.LOG_PID, syslog.LOG_DAEMON)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("-1000")
    hurry(os.getpid())
    work = Path(sys.argv[2])
    try:
        LocalServer(socket.socket(fileno=int(sys.argv[1])), work).serve()
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or str(e)
        with contextlib.suppress(OSError):
            (work / "why").write_text(why)
        syslog.syslog(syslog.LOG_ERR, why)


if __name__ == "__main__":
    main()
