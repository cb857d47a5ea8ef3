# SPDX-License-Identifier: Apache-2.0
"""What runc runs in CRIU's place while Podman exports the description of a container
(exported.py).  A dump is answered at once: nothing is stopped, and nothing is written but an
empty `inventory.img`, for which Podman looks.  All else is CRIU's.

    criu_stub.py CRIU swrk FD

Started by its path (python -I -S); it imports only the standard library.
"""

import os
import socket
import sys

DUMP = 1  # of CRIU's rpc.proto, enum criu_req_type
ANSWER = bytes((0x08, DUMP, 0x10, 1, 0x1A, 2, 0x08, 1))
"""criu_resp: type, success, and that the process runs on (criu_dump_resp.restored)."""


def number(message: bytes, at: int) -> tuple[int, int]:
    """(varint, position after it)."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def folder_of(request: bytes) -> int:
    """criu_opts.images_dir_fd, which is required and the first field: runc's number of it."""
    key, at = number(request, 2)
    _, at = number(request, at)
    inner, at = number(request, at)
    if (key, inner) != (0x12, 0x08):
        raise SystemExit("criu_stub: not the request that runc sends")
    return number(request, at)[0]


def main() -> None:
    argv = sys.argv[1:]
    runc = socket.socket(fileno=int(argv[-1])) if argv[1:2] == ["swrk"] else None
    request = runc.recv(1 << 18, socket.MSG_PEEK) if runc else b""
    if runc is None or request[:2] != bytes((0x08, DUMP)):
        if runc is not None:
            runc.detach()
        os.execvp(argv[0], argv)
    fd = folder_of(request)
    with open(f"/proc/{os.getppid()}/fd/{fd}/inventory.img", "wb"):
        pass
    runc.recv(1 << 18)
    runc.send(ANSWER)


if __name__ == "__main__":
    main()
