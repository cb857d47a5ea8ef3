# SPDX-License-Identifier: Apache-2.0
"""The process that thaws when its parent cannot: its whole main program.

Started as a script of its own (python -I -S), in a session of its own, so that
neither SIGKILL of the sender nor a signal to its process group reaches it.
Only the standard library, and of that as little as starts quickly.

argv: FITHAW's number, the descriptor of the parent's pipe, then the
descriptors of mount points.  The parent writes `f` before it freezes and `d`
when it has thawed; end of file without `d` means it died.
"""

import contextlib
import fcntl
import os
import signal
import sys


def main() -> None:
    request, pipe = int(sys.argv[1]), int(sys.argv[2])
    mounts = [int(a) for a in sys.argv[3:]]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.write(pipe, b"r")
    frozen = False
    while word := os.read(pipe, 1):
        frozen = word == b"f"
    if frozen:
        for fd in reversed(mounts):
            # EINVAL: it was not frozen yet, or is thawed already.
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, request, 0)


if __name__ == "__main__":
    main()
