# SPDX-License-Identifier: Apache-2.0
"""The watchdog process: it undoes the parent's steps when the parent cannot.

It is started by its path (python -I -S), in a session of its own.  So neither SIGKILL of
the sender nor a signal to the sender's process group reaches it.  It imports only the
standard library.

argv: FITHAW's number, the descriptor of a packet socket to the parent, the
parent's journal file ('' for none).  Messages of the parent, one JSON object
per packet:

    {"op": "add", "id": N, "entry": {…}}   step N is about to begin; a `thaw` comes
                                           with a descriptor
    {"op": "done", "id": N}                N is undone, or stays as it is
    {"op": "limit", "seconds": S}          undo everything S seconds from now
    {"op": "ask", "seconds": S}            answer `armed` and set a new limit, or
                                           `undone` (S null: no limit)

Entries (docs/internals/freeze.md) are undone in reverse order when the socket ends, and when the
limit passes.  In the second case `undone` is sent to the parent.
"""

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

READY, ARMED, UNDONE = b"ready", b"armed", b"undone"
LONGEST = 1 << 17
"""Bytes of one message at most."""
LATE = 0.5
"""Seconds until a step is undone that was added after the limit had passed: the parent
was asleep, and does not know of the limit yet."""
RETRY = 0.05
"""Seconds between two thaws of a file system that was still being frozen."""

Entry = dict[str, Any]


def write_value(entry: Entry) -> None:
    """Kind `write`: write `value` into the file `path`.  The file is left alone when it
    has gone, has another inode than `inode`, or has other contents than `only_if`."""
    try:
        fd = os.open(entry["path"], os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENODEV):
            return
        raise
    try:
        if entry.get("inode") not in (None, os.fstat(fd).st_ino):
            return
        expected = entry.get("only_if")
        if expected is not None and os.read(fd, 4096).decode().strip() != expected:
            return
        os.pwrite(fd, entry["value"].encode(), 0)
    except OSError as e:
        if e.errno != errno.ENODEV:  # a cgroup that is removed just now
            raise
    finally:
        os.close(fd)


def run(entry: Entry) -> None:
    """Kind `run`: run `argv`, for `timeout` seconds at most.  Its stdout goes to our
    stderr, since in a sender stdout may be the stream."""
    # In a session of its own, so that what it started ends with it.
    process = subprocess.Popen(
        entry["argv"], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
    )
    try:
        code = process.wait(entry["timeout"])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
    if code not in entry.get("codes", [0]):
        raise OSError(errno.ECHILD, f"exit code {code}")


class Steps:
    """What must be undone, oldest first."""

    def __init__(self, fithaw: int, journal: str) -> None:
        self._fithaw, self._journal = fithaw, journal
        self._steps: dict[int, tuple[Entry, int]] = {}

    def add(self, number: int, entry: Entry, fd: int) -> None:
        self._steps[number] = entry, fd

    def done(self, number: int) -> None:
        _, fd = self._steps.pop(number, ({}, -1))
        if fd >= 0:
            os.close(fd)

    def undo(self, last: bool = False) -> bool:
        """Undo in reverse order; last: the parent has gone.  True when a thaw must be tried
        again: it found nothing frozen, because the freeze is still under way."""
        again = False
        undone: list[int] = []
        failed: dict[int, str] = {}
        for number in reversed(list(self._steps)):
            entry, fd = self._steps[number]
            try:
                if entry["kind"] == "thaw":
                    fcntl.ioctl(fd, self._fithaw, 0)
                elif entry["kind"] == "write":
                    write_value(entry)
                else:
                    run(entry)
            except OSError as e:
                if entry["kind"] == "thaw" and e.errno == errno.EINVAL:
                    again = True
                    continue
                failed[number] = e.strerror or str(e)
            else:
                undone.append(number)
            self.done(number)
        with contextlib.suppress(OSError, ValueError):
            self._note(undone, failed, last)
        return again

    def _note(self, undone: list[int], failed: dict[int, str], last: bool) -> None:
        """Keep in the journal what could not be undone, with the reason."""
        if not self._journal:
            return
        with open(os.open(self._journal, os.O_RDONLY | os.O_NOFOLLOW)) as f:
            record = json.load(f)
        left = [e for e in record["entries"] if e.get("id") not in undone]
        for entry in left:
            if entry.get("id") in failed:
                entry["error"] = failed[entry["id"]]
        if last:  # the rest was prepared, and never begun
            left = [e for e in left if "error" in e]
        if not left:
            os.unlink(self._journal)
            return
        new = self._journal + ".new"
        with contextlib.suppress(FileNotFoundError):  # left by a sender that was killed
            os.unlink(new)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(new, flags, 0o600), "w") as f:
            json.dump({**record, "entries": left}, f)
        os.replace(new, self._journal)


def serve(line: socket.socket, steps: Steps) -> None:
    """Handle the parent's messages until the socket ends."""
    deadline: float | None = None
    fired = False
    while True:
        wait = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        if not select.select([line], [], [], wait)[0]:
            again = steps.undo()
            deadline = time.monotonic() + RETRY if again else None
            if not fired:
                fired = True
                with contextlib.suppress(BlockingIOError):  # it will ask later
                    line.send(UNDONE, socket.MSG_DONTWAIT)
            continue
        try:
            data, fds, _, _ = socket.recv_fds(line, LONGEST, 1)
        except ConnectionResetError:
            continue  # it ended with an answer unread; its own messages come next
        if not data:
            return
        message = json.loads(data)
        if message["op"] == "add":
            steps.add(message["id"], message["entry"], fds[0] if fds else -1)
            if fired:
                deadline = time.monotonic() + LATE
        elif message["op"] == "done":
            steps.done(message["id"])
        elif not fired:
            seconds = message["seconds"]
            deadline = None if seconds is None else time.monotonic() + seconds
        if message["op"] == "ask":
            line.send(UNDONE if fired else ARMED)


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGPIPE"):
        # Not SIG_IGN: the commands it runs would inherit that.
        signal.signal(getattr(signal, name), lambda *_: None)
    line = socket.socket(fileno=int(sys.argv[2]))
    steps = Steps(int(sys.argv[1]), sys.argv[3])
    with contextlib.suppress(OSError):
        line.send(READY)
        serve(line, steps)
    steps.undo(last=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # fast: its parent waits for it, and has a container stopped
