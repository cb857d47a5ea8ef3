# SPDX-License-Identifier: Apache-2.0
"""[policy] and [trust] of migrate.toml: what a container that comes to this host may have,
and which sources may send the memory of a running one.

The defaults are what a plain container needs.  The source has no say in it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from pyploop.errors import MigrateError, VzExitCode

CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD"),
    *("CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP"),
    *("CAP_SETUID", "CAP_SYS_CHROOT", "CAP_AUDIT_WRITE"),
)
"""What Docker gives a container by default, and `runc spec` and Podman a part of."""
NAMESPACES = ("pid", "mount", "ipc", "uts", "network")
SYSCTLS = (
    *("kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall"),
    *("kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced", "fs.mqueue.*"),
    *("net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range"),
)
"""They belong to the IPC or the network namespace, and change nothing outside it."""
RLIMITS = (
    *("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_LOCKS"),
    *("RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_RSS"),
    *("RLIMIT_SIGPENDING", "RLIMIT_STACK"),
)
"""All but those that let a process run before others of the host (nice, real time)."""


@dataclass(frozen=True)
class Policy:
    """What a container may have at most, and what it must have at least
    (docs/reference/migrate-toml.md describes each key)."""

    capabilities: tuple[str, ...] = CAPABILITIES
    namespaces: tuple[str, ...] = NAMESPACES
    """The container must have each of them."""
    devices: tuple[str, ...] = ()
    """Device files of this host that it may have besides null, zero, full, random,
    urandom and tty."""
    sysctls: tuple[str, ...] = SYSCTLS
    rlimits: tuple[str, ...] = RLIMITS
    unprotected: tuple[str, ...] = ()
    """Paths of the kernel's file systems that need not be masked or read-only."""
    apparmor: tuple[str, ...] = ()
    selinux: tuple[str, ...] = ()
    host_ids: tuple[str, ...] = ()
    """Ranges FIRST-LAST.  With any, the container must have a user namespace, whose ids on
    this host lie within them."""
    seccomp: str = "optional"
    no_new_privileges: str = "optional"
    oom_score_adj: int = 0
    """The lowest that is allowed."""
    private: bool = True
    """No other user of this host must be able to reach the container's files."""
    action_scripts: bool = False
    """Whether vzctl's CTID.mount and so on may come.  They run as root on this host."""
    vz_parameters: tuple[str, ...] = ()
    """Parameters of CTID.conf that may come besides those that concern only the container."""

    def id_ranges(self) -> list[tuple[int, int]]:
        """(first, last) of `host_ids`."""
        return [(int(a), int(b)) for a, b in (r.split("-") for r in self.host_ids)]

    def allows_sysctl(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.sysctls)


PLAIN = Policy()
"""The policy of a host that configures none."""

_WORD = {
    "capabilities": re.compile(r"CAP_[A-Z_]+"),
    "namespaces": re.compile(r"pid|mount|ipc|uts|network|user|cgroup"),
    "devices": re.compile(r"/dev/[^\x00-\x1f]+"),
    "rlimits": re.compile(r"RLIMIT_[A-Z]+"),
    "unprotected": re.compile(r"/[^\x00-\x1f]+"),
    "host_ids": re.compile(r"[0-9]{1,10}-[0-9]{1,10}"),
    "vz_parameters": re.compile(r"[A-Z][A-Z0-9_]*"),
}
_NEVER_LESS = ("pid", "mount", "ipc", "uts")
"""Namespaces that no policy can do without."""
_CHOICES = ("optional", "required")
_KINDS = {str: "a string", int: "a whole number", bool: "true or false"}


def parse(table: Mapping[str, Any], base: Policy, where: str) -> Policy:
    """A [policy] table.  Each key that it has replaces that of `base`.  where: for the
    messages.  MigrateError(1)."""
    known = {f.name: getattr(base, f.name) for f in fields(base)}
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise MigrateError(VzExitCode.USAGE, f"{where}: unknown key {key!r}")
        old = known[key]
        if isinstance(old, tuple):
            found[key] = _words(value, f"{where}.{key}", _WORD.get(key))
        elif type(value) is not type(old):
            raise MigrateError(VzExitCode.USAGE, f"{where}.{key} must be {_KINDS[type(old)]}")
        elif isinstance(old, str) and value not in _CHOICES:
            raise MigrateError(
                VzExitCode.USAGE, f"{where}.{key} must be one of {', '.join(_CHOICES)}"
            )
        else:
            found[key] = value
    made = replace(base, **found)
    if missing := [n for n in _NEVER_LESS if n not in made.namespaces]:
        raise MigrateError(
            VzExitCode.USAGE,
            f"{where}.namespaces must have {', '.join(missing)}: without them a container is not "
            "separated from the host",
        )
    return made


def _words(value: Any, where: str, form: re.Pattern[str] | None) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise MigrateError(VzExitCode.USAGE, f"{where} must be a list of non-empty strings")
    if form is not None and (bad := [v for v in value if not form.fullmatch(v)]):
        raise MigrateError(
            VzExitCode.USAGE,
            f"{where} cannot have {bad[0]!r}: an entry has the form {form.pattern}",
        )
    return tuple(value)


# ---- trust


@dataclass(frozen=True)
class Source:
    """The host that sends a container, as this host knows it.  Nothing of it is what the
    source says about itself."""

    name: str = ""
    """NAME of `pyploop agent --source NAME`, which belongs to the ssh key that was used."""
    address: str = ""
    """Of the other end of the ssh connection."""

    def __str__(self) -> str:
        return self.name or self.address or "a local process"


def source_of(name: str | None, environment: Mapping[str, str]) -> Source:
    """name: that of --source; without it, sshd's SSH_CONNECTION tells the address."""
    if name:
        return Source(name=name)
    return Source(address=environment.get("SSH_CONNECTION", "").split(" ")[0])


def parse_trust(table: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The entries of `live` in [trust].  MigrateError(1)."""
    if other := [key for key in table if key != "live"]:
        raise MigrateError(VzExitCode.USAGE, f"{where}: unknown key {other[0]!r}")
    live = _words(table.get("live", []), f"{where}.live", None)
    for entry in live:
        if "/" in entry and network(entry) is None:
            raise MigrateError(
                VzExitCode.USAGE, f"{where}.live: {entry!r} is not a network (ADDRESS/BITS)"
            )
    return live


def trusts(live: tuple[str, ...], source: Source) -> bool:
    """Whether the source is one of `live`: names, addresses and networks."""
    if source.name:
        return source.name in live
    try:
        address = ipaddress.ip_address(source.address)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    networks = [n for n in map(network, live) if n is not None]
    return any(address.version == n.version and address in n for n in networks)


def network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """An entry of `live` that is an address or a network; None: it is a name."""
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None
