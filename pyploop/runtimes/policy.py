# SPDX-License-Identifier: Apache-2.0
"""[policy] and [trust] of migrate.toml: what a container that comes here may be, and
which sources may send the memory of a running one.

The defaults are what a plain container needs.  A source decides nothing of it.
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
"""Of the IPC and the network namespace, and of no use outside them."""
RLIMITS = (
    *("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_LOCKS"),
    *("RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_RSS"),
    *("RLIMIT_SIGPENDING", "RLIMIT_STACK"),
)
"""All but those by which a process gets before others of the host."""


@dataclass(frozen=True)
class Policy:
    """What a container may have at most, or must have at least.

    docs/reference/migrate-toml.md has each key."""

    capabilities: tuple[str, ...] = CAPABILITIES
    namespaces: tuple[str, ...] = NAMESPACES
    """That must be there."""
    devices: tuple[str, ...] = ()
    """Device files of this host, besides null, zero, full, random, urandom, tty."""
    sysctls: tuple[str, ...] = SYSCTLS
    rlimits: tuple[str, ...] = RLIMITS
    unprotected: tuple[str, ...] = ()
    """Paths of the kernel's that need not be masked or read-only."""
    apparmor: tuple[str, ...] = ()
    selinux: tuple[str, ...] = ()
    host_ids: tuple[str, ...] = ()
    """FIRST-LAST; with it a user namespace must be there, with these ids only."""
    seccomp: str = "optional"
    no_new_privileges: str = "optional"
    oom_score_adj: int = 0
    """The lowest one."""
    private: bool = True
    """No other user of this host can reach the container's files."""
    action_scripts: bool = False
    """vzctl's CTID.mount and so on, which run as root on this host."""
    vz_parameters: tuple[str, ...] = ()
    """Of CTID.conf, besides those that concern only the container."""

    def id_ranges(self) -> list[tuple[int, int]]:
        """(first, last) of `host_ids`."""
        return [(int(a), int(b)) for a, b in (r.split("-") for r in self.host_ids)]

    def allows_sysctl(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.sysctls)


PLAIN = Policy()
"""Of a host that says nothing."""

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
"""Namespaces without which a container is no container."""
_CHOICES = ("optional", "required")


def parse(table: Mapping[str, Any], base: Policy, where: str) -> Policy:
    """A [policy]: each key replaces that of `base`.  MigrateError(1)."""
    known = {f.name: getattr(base, f.name) for f in fields(base)}
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise MigrateError(VzExitCode.USAGE, f"{where} has no {key!r}")
        old = known[key]
        if isinstance(old, tuple):
            found[key] = _words(value, f"{where}.{key}", _WORD.get(key))
        elif type(value) is not type(old):
            raise MigrateError(VzExitCode.USAGE, f"{where}.{key} must be a {type(old).__name__}")
        elif isinstance(old, str) and value not in _CHOICES:
            raise MigrateError(
                VzExitCode.USAGE, f"{where}.{key} must be one of {', '.join(_CHOICES)}"
            )
        else:
            found[key] = value
    made = replace(base, **found)
    if missing := [n for n in _NEVER_LESS if n not in made.namespaces]:
        raise MigrateError(VzExitCode.USAGE, f"{where}.namespaces must have {', '.join(missing)}")
    return made


def _words(value: Any, where: str, form: re.Pattern[str] | None) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise MigrateError(VzExitCode.USAGE, f"{where} must be a list of words")
    if form is not None and (bad := [v for v in value if not form.fullmatch(v)]):
        raise MigrateError(VzExitCode.USAGE, f"{where}: {bad[0]!r} is none")
    return tuple(value)


# ---- sources


@dataclass(frozen=True)
class Source:
    """Who has sent a container, as this host knows it: nothing of it is what the
    source says of itself."""

    name: str = ""
    """`pyploop agent --source NAME`: of the key with which it came."""
    address: str = ""
    """From where ssh came."""

    def __str__(self) -> str:
        return self.name or self.address or "a local process"


def source_of(name: str | None, environment: Mapping[str, str]) -> Source:
    """name: of --source; without one, what sshd says in SSH_CONNECTION."""
    if name:
        return Source(name=name)
    return Source(address=environment.get("SSH_CONNECTION", "").split(" ")[0])


def parse_trust(table: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """[trust]: its `live`.  MigrateError(1)."""
    if other := [key for key in table if key != "live"]:
        raise MigrateError(VzExitCode.USAGE, f"{where} has no {other[0]!r}")
    live = _words(table.get("live", []), f"{where}.live", None)
    for entry in live:
        if "/" in entry and _network(entry) is None:
            raise MigrateError(VzExitCode.USAGE, f"{where}.live: {entry!r} is no network")
    return live


def trusts(live: tuple[str, ...], source: Source) -> bool:
    """live: names, addresses and networks."""
    if source.name:
        return source.name in live
    try:
        address = ipaddress.ip_address(source.address)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    networks = [n for n in map(_network, live) if n is not None]
    return any(address.version == n.version and address in n for n in networks)


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None
