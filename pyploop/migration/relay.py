# SPDX-License-Identifier: Apache-2.0
"""The program that rsync starts as its remote shell.  It waits for a channel of the agent's
connection, and then carries bytes between rsync and the channel.

    relay.py FD HOST COMMAND…      FD: a socket through which the channel comes

Until the channel comes, rsync has no greeting from its peer, and so has read no file.  It
can therefore be started before the moment from which on files may be read.  This program
is run by its path, without the package, so that it starts quickly.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

SIZE = 1 << 18


def main() -> int:
    """0 when the channel has ended; 1 when none came."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_blocking(1, True)  # rsync makes its ends of the pair non-blocking for itself
    control.sendall(b".")
    _, fds, _, _ = socket.recv_fds(control, 1, 1)
    if not fds:
        return 1
    channel = socket.socket(fileno=fds[0])
    threading.Thread(target=_outward, args=(channel,), daemon=True).start()
    while data := channel.recv(SIZE):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]
    return 0


def _outward(channel: socket.socket) -> None:
    while data := os.read(0, SIZE):
        channel.sendall(data)
    channel.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    try:
        # Not sys.exit: the other thread may be in a read that never ends.
        os._exit(main())
    except OSError:
        os._exit(1)
