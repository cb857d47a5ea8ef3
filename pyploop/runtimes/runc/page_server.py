# SPDX-License-Identifier: Apache-2.0
"""The page server of a post-copy migration, at the orchestrator: whether this host can be
one, and the end of the line to the keeper, which owns it and outlives the orchestrator
(page_keeper.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import page_record
from pyploop.runtimes.page_record import PageRecord
from pyploop.runtimes.runc import lazy_guard
from pyploop.system.commands import Command, detached, last_words

PIPE_BYTES = 64 << 20
"""CRIU's page server wants a pipe of this size.  It does not notice that it gets none, and
then fails with the first page (`page-pipe: splice: -1: Bad file descriptor`)."""
PIPE_LIMIT = "/proc/sys/fs/pipe-max-size"
PROBE_SECONDS = 30.0
READY_SECONDS = 60.0
STOPPING_SECONDS = 240.0


def problem(criu: str) -> str:
    """Why this host cannot serve pages; empty: it can."""
    if why := _pipe_problem():
        return why
    try:
        status, said = Command([criu, "check", "--feature", "uffd"]).wait(PROBE_SECONDS)
    except OSError as e:  # TimeoutError is one
        return f"{criu} check --feature uffd: {e.strerror or e}"
    return f"{criu} check --feature uffd: {last_words(said)}" if status else ""


def _pipe_problem() -> str:
    fds = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(fds[0], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError as e:
        return (
            f"CRIU's page server needs a pipe of {PIPE_BYTES >> 20} MiB, which root does not get "
            f"here without CAP_SYS_RESOURCE ({e.strerror}): `sysctl fs.pipe-max-size={PIPE_BYTES}` "
            "allows it"
        )
    finally:
        for fd in fds:
            os.close(fd)
    return ""


class PageServer:
    """Of one container that leaves this host."""

    def __init__(
        self,
        criu: str,
        order: Callable[[Path, Path | None], dict[str, Any]],
        suspended: Callable[[], None],
        timeout: float,
    ) -> None:
        """order: for the keeper, how the dump is made.  suspended: checks the container, while
        CRIU starts.  timeout: of the dump."""
        self._criu, self._order = criu, order
        self._suspended, self._timeout = suspended, timeout
        self._line: socket.socket | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._path = Path()
        self._ended: tuple[str, str] | None = None
        self.served = (0, 0)

    def problem(self) -> str:
        return problem(self._criu)

    def start(self, record: Path, keep: Sequence[int], **fields: Any) -> None:
        """Start the keeper, which connects to the target.  fields: of its record.  keep:
        descriptors that runc inherits.  MigrateError when it does not connect."""
        self._path = record
        PageRecord.create(record, **fields)
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        args = [sys.executable, "-I", "-m", "pyploop.runtimes.runc.page_keeper"]
        self._keeper = detached(
            [*args, str(theirs.fileno()), str(record)], [theirs.fileno(), *keep]
        )
        theirs.close()
        if why := self._answer("ready", READY_SECONDS):
            raise MigrateError(
                VzExitCode.CANNOT_CONNECT, f"no second connection for the memory: {why}"
            )

    def dump(self, images: Path, parent: Path | None) -> None:
        """The images are complete but for the pages, and the container is frozen."""
        order = self._order(images, parent)
        self._tell(op="dump", **order)
        self._suspended()
        if why := self._answer("dumped", self._timeout):
            raise MigrateError(
                VzExitCode.DUMP_FAILED, f"cannot checkpoint {order['name']} for post-copy: {why}"
            )

    def wait(self, seconds: float) -> tuple[str, str] | None:
        """(COMPLETE or LOST, why) when it has ended; None: not yet."""
        if self._ended is None and self._line is not None:
            self._take(seconds)
        return self._ended

    def bye(self) -> None:
        """The source is tidied."""
        line, self._line = self._line, None
        if line is not None:
            with line, contextlib.suppress(OSError):
                line.send(b'{"op": "bye"}')
            self._reap(10.0)
        self._path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Undo: the target has not committed."""
        line, self._line = self._line, None
        if line is None:
            return
        with line, contextlib.suppress(OSError, ValueError):
            line.send(b'{"op": "stop"}')
            while select.select([line], [], [], STOPPING_SECONDS)[0]:
                data = line.recv(lazy_guard.LONGEST)
                if not data or "stopped" in json.loads(data):
                    break
        self._reap(10.0)

    def _reap(self, seconds: float) -> None:
        if self._keeper is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(seconds)

    def _tell(self, **message: Any) -> None:
        if self._line is not None:
            with contextlib.suppress(OSError):  # its end is seen when it should answer
                self._line.send(json.dumps(message).encode())

    def _take(self, seconds: float) -> dict[str, Any] | None:
        assert self._line is not None
        with contextlib.suppress(OSError, ValueError):
            if not select.select([self._line], [], [], seconds)[0]:
                return None
            if data := self._line.recv(lazy_guard.LONGEST):
                message: dict[str, Any] = json.loads(data)
                if "ended" in message:
                    self._ended = message["ended"], message.get("why", "")
                    self.served = message.get("bytes", 0), message.get("requests", 0)
                return message
        record = PageRecord.read(self._path)
        self._ended = page_record.LOST, (record.why if record else "") or "the keeper was killed"
        return {}

    def _answer(self, key: str, seconds: float) -> str:
        message = self._take(seconds)
        if message is None:
            return f"the page server's keeper did not answer within {seconds:g} s"
        if key in message:
            return str(message[key])
        return f"the page server has ended: {self._ended[1] if self._ended else 'no answer'}"
