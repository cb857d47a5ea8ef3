# SPDX-License-Identifier: Apache-2.0
"""The network links of a container, as this host has them: the other ends of the veth pairs in
its network namespace.  While such an end is down, no packet comes or goes, and the
namespace keeps its addresses and routes."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from collections.abc import Sequence

from pyploop.errors import MigrateError, VzExitCode
from pyploop.system import network

_GETLINK, _NAME, _OTHER = 18, 3, 5  # RTM_GETLINK, IFLA_IFNAME, IFLA_LINK
_INFO, _KIND = 18, 1  # IFLA_LINKINFO, IFLA_INFO_KIND
_LOOPBACK = 0x8  # IFF_LOOPBACK


def host_ends(namespace: str) -> list[str]:
    """Names of the links of this process's namespace.  OSError.  MigrateError(15) when a link
    of the container has no such end."""
    found = []
    with network.netlink(namespace, network.ROUTE) as sock:
        request = network.LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        for body in network.dump(sock, _GETLINK, request):
            flags = network.LINK.unpack_from(body)[3]
            if flags & _LOOPBACK:
                continue
            values = dict(network.attributes(body[network.LINK.size :]))
            name = values.get(_NAME, b"?").rstrip(b"\0").decode(errors="replace")
            more = dict(network.attributes(values.get(_INFO, b"")))
            other = struct.unpack("=I", values[_OTHER])[0] if _OTHER in values else 0
            found.append(_named(name, more.get(_KIND, b"").rstrip(b"\0"), other))
    return found


def _named(name: str, kind: bytes, other: int) -> str:
    if kind == b"veth":
        with contextlib.suppress(OSError):
            return socket.if_indextoname(other)
    raise MigrateError(
        VzExitCode.BAD_CONFIG,
        f"the container's link {name} is not one end of a veth pair, and cannot be cut while the "
        "container is suspended",
        hint="use a network of the driver bridge",
    )


def set_all(names: Sequence[str], up: bool) -> tuple[str, ...]:
    """The command that sets them; empty without links."""
    word = "up" if up else "down"
    if len(names) < 2:
        return tuple(w for n in names for w in ("ip", "link", "set", n, word))
    text = "; ".join(f"ip link set {n} {word} || s=1" for n in names)
    return ("sh", "-c", f"s=0; {text}; exit $s")


# ---- before the links are there

_RULES = """table bridge {table} {{
 chain ports {{
  type filter hook prerouting priority -300; policy accept;
  {rules}
 }}
}}
"""


def table_of(container_id: str) -> str:
    return f"pyploop_{container_id[:32]}"


def block(container_id: str, addresses: Sequence[str]) -> None:
    """Let no bridge of this host take a frame from a veth with one of these hardware
    addresses.  The container still answers on the source, and neither neighbours nor switches
    may hear of the one here.  MigrateError(15)."""
    rules = "\n  ".join(f'iifname "veth*" ether saddr {a} drop' for a in addresses)
    text = _RULES.format(table=table_of(container_id), rules=rules)
    unblock(container_id)
    try:
        done = subprocess.run(
            ["nft", "-f", "-"],
            input=text.encode(),
            capture_output=True,
            timeout=network.ANSWER * 10,
            check=False,
        )
        why = done.stderr.decode(errors="replace").strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as e:
        why = str(e)
    if why:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"cannot keep the container's new link silent until it runs here: nft: {why[:200]} "
            "(package nftables)",
        )


def unblock(container_id: str) -> None:
    """No error when nothing is blocked."""
    words = ["nft", "delete", "table", "bridge", table_of(container_id)]
    try:
        subprocess.run(words, capture_output=True, timeout=network.ANSWER * 10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return  # nothing can have been blocked without it
