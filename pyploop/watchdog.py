# SPDX-License-Identifier: Apache-2.0
"""The process that thaws when its parent cannot: its whole main program.

Started as a script of its own (python -I -S), in a session of its own, so that
neither SIGKILL of the sender nor a signal to its process group reaches it.
Only the standard library, and of that as little as starts quickly.

argv: FITHAW's number and the descriptor of a packet socket to the parent.  The
parent sends `freeze FD` before it freezes the mount point open at FD, which
this process has too, and `thawed FD` when that is over.  When the socket ends,
what is still frozen is thawed.
"""

import contextlib
import fcntl
import signal
import socket
import sys

READY, FREEZE, THAWED = b"ready", b"freeze", b"thawed"
LONGEST = 64


def main() -> None:
    request = int(sys.argv[1])
    line = socket.socket(fileno=int(sys.argv[2]))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    line.send(READY)
    frozen: list[int] = []
    while message := line.recv(LONGEST):
        word, _, number = message.partition(b" ")
        fd = int(number)
        if word == FREEZE:
            frozen.append(fd)
        elif fd in frozen:
            frozen.remove(fd)
    for fd in reversed(frozen):
        # EINVAL: it was not frozen yet, or is thawed already.
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, request, 0)


if __name__ == "__main__":
    main()
