# SPDX-License-Identifier: Apache-2.0
"""The container's link, up and down.  A plain `ip link set DEVICE up|down` is done here, by
the same request to the kernel (RTM_NEWLINK): while the container is suspended, the start of a
process would be a tenth of the time.  Any other command is run as it is."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Sequence

from pyploop.system import network

_NEWLINK, _NAME, _UP = 16, 3, 1  # RTM_NEWLINK, IFLA_IFNAME, IFF_UP
_LONGEST = 15  # IFNAMSIZ, without the NUL
_SYSTEM = ("/sbin", "/bin", "/usr/sbin", "/usr/bin")


def plain(argv: Sequence[str]) -> tuple[str, bool] | None:
    """(device, up) of a plain `ip link set`; None for any other command.  An `ip` that is not
    the system's, or is a script, does something of its own."""
    words = [w for w in argv[1:] if w != "dev"]
    if len(words) != 4 or words[:2] != ["link", "set"] or words[3] not in ("up", "down"):
        return None
    if len(words[2].encode()) > _LONGEST or words[2].startswith("-"):
        return None
    program = shutil.which(argv[0]) if os.path.basename(argv[0]) == "ip" else None
    if program is None or os.path.dirname(program) not in _SYSTEM:
        return None
    try:
        with open(program, "rb") as f:
            binary = f.read(4) == b"\x7fELF"
    except OSError:
        return None
    return (words[2], words[3] == "up") if binary else None


def set_up(device: str, up: bool) -> None:
    """Of this process's network namespace.  OSError."""
    body = network.LINK.pack(0, 0, 0, _UP if up else 0, _UP)
    body += network.attribute(_NAME, device.encode() + b"\0")
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, network.ROUTE) as sock:
        sock.settimeout(network.ANSWER)
        network.ask(sock, _NEWLINK, body)
