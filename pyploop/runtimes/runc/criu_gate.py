# SPDX-License-Identifier: Apache-2.0
"""What a runc that was started ahead (early.py) runs in CRIU's place.  It starts CRIU, which
waits for its first request, and stands between the two.  It waits until pyploop lets it go on,
and asks pyploop before the container may run.

    criu_gate.py FOLDER dump|restore CRIU swrk FD

FOLDER has pyploop's socket, `line`.  Started by its path (python -I -S); it imports only the
standard library.

    here:    the kind of runc's request, one byte      it is known, and waits
    pyploop: "go"                                      anything else, or the end: it fails
    here:    "network-unlock", "pre-resume"            CRIU has come so far with a restore
    pyploop: "go"                                      else the container is ended, and CRIU

For a dump each request waits that may touch the container.  For a restore two wait: the one for
CRIU's version, because runc mounts the root after the answer, and the restore itself.

The containers of a pod run together or not at all.  So there may be a link `agreed` in FOLDER.
When pyploop has ended after all of them were restored, the file to which it leads is there, and
the container runs.

CRIU reports each step to runc, and to its action script if it has one.  At these two steps it
goes on whatever they answer, so the container is killed when it must not run.  For the same
reason CRIU is killed when this process is (PDEATHSIG), and has a copy of this end of its
socket: it does not see the socket's end before that.
"""

import contextlib
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import NoReturn

LINE, AGREED = "line", "agreed"
GO, NO = b"go", b"no"
FEATURES, VERSION = 9, 10  # of CRIU's rpc.proto, enum criu_req_type
ASKS = ("network-unlock", "pre-resume")
_RESUMED = "post-resume"
_LONGEST = 1 << 18
_ABOVE = 128
"""Descriptors of our own are not below: the numbers there stand in runc's request."""


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message that is a number or has a length.
    IndexError when it is no message."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
        elif key & 7 == 2:
            size = number()
            yield key >> 3, message[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[key & 7]


def part(message: bytes, field: int) -> int | bytes:
    """The last field of that number; 0 when there is none, or no message."""
    found: int | bytes = 0
    with contextlib.suppress(IndexError, KeyError):
        for number, value in fields(message):
            if number == field:
                found = value
    return found


def kind_of(request: bytes) -> int:
    """0 when it is not known."""
    kind = part(request, 1)
    return kind if isinstance(kind, int) and 0 < kind < 256 else 0


def step_of(answer: bytes) -> tuple[str, int]:
    """What CRIU reports to runc: (step, pid of the container's first process or 0).  No step:
    it is the last answer."""
    notify = part(answer, 5)
    if not isinstance(notify, bytes):
        return "", 0
    step, pid = part(notify, 1), part(notify, 2)
    return (
        step.decode(errors="replace") if isinstance(step, bytes) else "",
        pid if isinstance(pid, int) else 0,
    )


def above(sock: socket.socket) -> socket.socket:
    with sock:
        return socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, _ABOVE))


def connect(folder: str) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    at = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    line.connect(f"/proc/self/fd/{at}/{LINE}")  # its own path may be too long
    os.close(at)
    return above(line)


def waited(folder: str, kind: int) -> socket.socket | None:
    """The line to pyploop, which lets it go on; None: it does not."""
    try:
        line = connect(folder)
        line.send(bytes([kind]))
        return line if line.recv(16) == GO else None
    except OSError:
        return None


def started(argv: list[str], *, dies_with_us: bool) -> tuple[socket.socket, int]:
    """(our end of its socket, pid) of a CRIU."""
    ours, theirs = map(above, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    if dies_with_us:
        argv = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
        ours.set_inheritable(True)
    # Not subprocess: its import takes as long as all the rest here.
    actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), int(argv[-1]))]
    default = [signal.SIGPIPE]  # which Python ignores
    pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions, setsigdef=default)
    theirs.close()
    ours.set_inheritable(False)
    return ours, pid


def lend_folders(request: bytes) -> None:
    """CRIU opens the folders in /proc of the process at its socket's other end, which is this
    one, by runc's numbers."""
    options = part(request, 2)
    for field in (1, 17):  # images_dir_fd, work_dir_fd
        fd = part(options, field) if isinstance(options, bytes) else 0
        if isinstance(fd, int) and 0 < fd < _ABOVE:
            found = os.open(f"/proc/{os.getppid()}/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY)
            if found != fd:
                os.dup2(found, fd, inheritable=False)
                os.close(found)


def asked(line: socket.socket, step: str, agreed: str) -> bool:
    """Whether pyploop lets the restore go on."""
    answer = b""
    with contextlib.suppress(OSError):
        line.send(step.encode())
        answer = line.recv(16)
    # Without an answer pyploop was killed.  Others of the pod may run then.
    return answer == GO if answer else step == ASKS[-1] and os.path.exists(agreed)


class Relay:
    """Between runc and CRIU."""

    def __init__(self, runc: socket.socket, criu: socket.socket, pid: int, agreed: str) -> None:
        self._runc, self._criu, self._pid = runc, criu, pid
        self._agreed = agreed
        self._init = 0

    def end(self) -> NoReturn:
        """CRIU does not go on, and the container does not run."""
        for pid in (self._init, self._pid):
            if pid > 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        os._exit(1)

    def run(self, request: bytes, line: socket.socket, restore: bool) -> NoReturn:
        self._criu.send(request)
        while True:
            message, fds, _, _ = socket.recv_fds(self._criu, _LONGEST, 8)
            step, pid = step_of(message)
            self._init = pid or self._init
            if message:
                with contextlib.suppress(OSError):  # it has ended: no answer comes
                    socket.send_fds(self._runc, [message], fds)
            for fd in fds:
                os.close(fd)
            if not step:
                break
            answer = self._answer()
            if restore and step != _RESUMED:
                if not answer or (step in ASKS and not asked(line, step, self._agreed)):
                    self.end()
            elif not answer:
                if restore:  # all is done; CRIU would wait for ever
                    os.kill(self._pid, signal.SIGKILL)
                break
            self._criu.send(answer)
        self._criu.close()
        _, status = os.waitpid(self._pid, 0)
        os._exit(0 if os.waitstatus_to_exitcode(status) == 0 else 1)

    def _answer(self) -> bytes:
        """runc's; empty when it has ended."""
        try:
            return self._runc.recv(_LONGEST)
        except OSError:
            return b""


def main() -> None:
    folder, what, *argv = sys.argv[1:]
    runc = socket.socket(fileno=int(argv[-1]))
    request = runc.recv(_LONGEST, socket.MSG_PEEK)  # CRIU itself may read it
    kind = kind_of(request)
    if what == "dump" and kind in (FEATURES, VERSION):
        os.execvp(argv[0], argv)
    runc.recv(_LONGEST)
    runc = above(runc)
    version = what == "restore" and kind == VERSION
    criu, pid = started(argv, dies_with_us=what == "restore")
    answer = b""
    if version:  # its answer is there before it waits
        criu.send(request)
        answer = criu.recv(_LONGEST)
    line = waited(folder, kind)
    if line is None:
        # It has got nothing to do yet.  Perhaps it is not so far that it dies with us.
        os.kill(pid, signal.SIGKILL)
        os._exit(1)
    if version:
        runc.send(answer)
        os._exit(0)  # at once
    lend_folders(request)
    Relay(runc, criu, pid, f"{folder}/{AGREED}").run(request, line, what == "restore")


if __name__ == "__main__":
    main()
