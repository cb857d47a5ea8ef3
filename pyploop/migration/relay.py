# SPDX-License-Identifier: Apache-2.0
"""What rsync starts as its remote shell: it waits for a channel of the agent's
connection, and then carries bytes between rsync and the channel.

    relay.py FD HOST COMMAND…      FD: a socket that the channel comes through

Until the channel comes rsync has got no greeting, and so has looked at
no file: it can be started before the moment from which on it must look.  Run
by its path, without the package, so that it starts quickly.
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
    os.set_blocking(1, True)  # rsync leaves its ends of the pair as it needs them itself
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
        # Not sys.exit: the other thread may be in a read that nothing ends.
        os._exit(main())
    except OSError:
        os._exit(1)
