# SPDX-License-Identifier: Apache-2.0
"""What a runc that was started ahead (early.py) runs in CRIU's place.  It waits until pyploop
lets it go on, and then becomes CRIU.

    criu_gate.py FOLDER dump|restore CRIU swrk FD

FOLDER has pyploop's socket, `line`.  Started by its path (python -I -S); it imports only the
standard library.

    here:    the kind of runc's request, one byte      it is known, and waits
    pyploop: "go"                                      anything else, or the end: it fails

For a dump each request waits that may touch the container.  For a restore the first one waits,
which asks for CRIU's version: runc mounts the root after the answer.  The answer is there
before it waits.  The restore itself waits, too, unless pyploop lets all that follows go on.
"""

import os
import socket
import sys

LINE = "line"
GO = b"go"
FEATURES, VERSION = 9, 10  # of CRIU's rpc.proto, enum criu_req_type
_LONGEST = 1 << 18


def kind_of(request: bytes) -> int:
    """Field 1 of criu_req, which comes first; 0 when it is not known."""
    return request[1] if request[:1] == b"\x08" and len(request) > 1 else 0


def wait(folder: str, kind: int) -> bool:
    """Whether pyploop lets it go on."""
    at = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.connect(f"/proc/self/fd/{at}/{LINE}")  # its own path may be too long
        os.close(at)
        line.send(bytes([kind]))
        return line.recv(16) == GO


def answer_of(criu: str, request: bytes) -> bytes:
    """CRIU's answer to runc's request."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            theirs.set_inheritable(True)
            # Not subprocess: its import takes as long as all the rest here.
            pid = os.posix_spawnp(criu, [criu, "swrk", str(theirs.fileno())], os.environ)
        ours.send(request)
        answer = ours.recv(_LONGEST)
    os.waitpid(pid, 0)
    return answer


def main() -> None:
    folder, what, *argv = sys.argv[1:]
    runc = socket.socket(fileno=int(argv[-1]))
    request = runc.recv(_LONGEST, socket.MSG_PEEK)  # CRIU itself will read it
    kind = kind_of(request)
    if what == "dump" and kind in (FEATURES, VERSION):
        os.execvp(argv[0], argv)
    answer = answer_of(argv[0], request) if what == "restore" and kind == VERSION else b""
    if not wait(folder, kind):
        os._exit(1)
    if not answer:
        os.execvp(argv[0], argv)
    runc.recv(_LONGEST)  # a socket that is closed with data unread resets its peer
    runc.send(answer)
    os._exit(0)  # at once: the container is suspended


if __name__ == "__main__":
    main()
