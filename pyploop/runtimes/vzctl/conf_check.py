# SPDX-License-Identifier: Apache-2.0
"""The check of a CTID.conf from another host.  vzctl acts on it as root, and scripts of
vzctl and of others read it as a shell would.

So each line must assign a plain value to a parameter that concerns only the container
(ctid.conf(5)), or to one that the policy of this host names.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.policy import Policy

LARGEST = 1 << 17
"""Bytes of a CTID.conf at most; real ones have a few thousand."""
PARAMETERS = frozenset(
    (
        # Resources
        *("KMEMSIZE", "LOCKEDPAGES", "PRIVVMPAGES", "SHMPAGES", "NUMPROC", "PHYSPAGES"),
        *("VMGUARPAGES", "OOMGUARPAGES", "NUMTCPSOCK", "NUMFLOCK", "NUMPTY", "NUMSIGINFO"),
        *("TCPSNDBUF", "TCPRCVBUF", "OTHERSOCKBUF", "DGRAMRCVBUF", "NUMOTHERSOCK"),
        *("DCACHESIZE", "NUMFILE", "AVNUMPROC", "NUMIPTENT", "SWAPPAGES", "NUMNETIF"),
        *("DISKSPACE", "DISKINODES", "QUOTATIME", "QUOTAUGIDLIMIT", "DISK_QUOTA"),
        *("CPUUNITS", "CPULIMIT", "CPUS", "CPUMASK", "IOPRIO", "IOLIMIT", "IOPSLIMIT"),
        # What it is
        *("VEID", "UUID", "NAME", "HOSTNAME", "DESCRIPTION", "ONBOOT", "BOOTORDER", "DISABLED"),
        *("OSTEMPLATE", "ORIGIN_SAMPLE", "CONFIG_CUSTOMIZED", "DISTRIBUTION", "TEMPLATES"),
        *("VE_ROOT", "VE_PRIVATE", "VE_LAYOUT", "STOP_TIMEOUT", "TECHNOLOGIES", "SLMMODE"),
        # Its network
        *("IP_ADDRESS", "NAMESERVER", "SEARCHDOMAIN", "NETIF", "NETFILTER", "IPTABLES"),
    )
)
_FILE_NAMES = (
    *("OSTEMPLATE", "ORIGIN_SAMPLE", "CONFIG_CUSTOMIZED", "DISTRIBUTION", "TEMPLATES"),
    *("NAME", "UUID", "VE_LAYOUT", "NETIF"),
)
"""vzctl makes file names of these values, and runs some of the files."""
_ELSEWHERE = re.compile(r"\.\.|/")
_ELSEWHERE_NETIF = re.compile(r"\.\.|/(?![0-9])")
"""A slash may stand before the mask of an address."""
_VEID = r"\$VEID\b|\$\{VEID\}"
"""vzctl sets this variable."""
_PLAIN = rf"""(?:[^"$`\\\x00-\x1f]|{_VEID})*"""
_VALUE = rf""""{_PLAIN}"|'[^'\x00-\x1f]*'|(?:[A-Za-z0-9_.,:/@%+=-]|{_VEID})*"""
_LINE = re.compile(rf"(?:([A-Z][A-Z0-9_]*)=({_VALUE}))?(?:(?:^|[ \t]+)(?:#.*)?)?")


def address_of(text: str) -> str:
    """The address without its mask, always in the same spelling."""
    word = text.partition("/")[0]
    try:
        return str(ipaddress.ip_address(word))
    except ValueError:
        return word


def check(path: Path, container: str, policy: Policy, addresses: Collection[str]) -> None:
    """MigrateError(15) names the first line that is not accepted.

    path: of CTID.conf, which has another name until it is checked.  addresses: those of
    the container that are free on this host."""
    name, seen = f"{container}.conf", set()
    try:
        with path.open("rb") as f:
            data = f.read(LARGEST + 1)
    except OSError as e:
        raise MigrateError(
            VzExitCode.BAD_CONFIG, f"cannot read {path}: {e.strerror}", path=str(path)
        ) from e
    if len(data) > LARGEST:
        raise MigrateError(
            VzExitCode.BAD_CONFIG, f"{path} has more than {LARGEST} bytes", path=str(path)
        )
    for number, line in enumerate(data.decode(errors="surrogateescape").split("\n"), 1):
        found = _LINE.fullmatch(line.strip(" \t"))  # the pattern takes quadratic time for spaces
        where = f"{name}, line {number}"
        if found is None:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{where}: {line[:80]!r} does not assign a plain value, and is not accepted from "
                "another host",
            )
        key, value = found[1], found[2]
        if key is None:
            continue
        if key not in PARAMETERS and key not in policy.vz_parameters:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{where} sets {key}, which the policy of this host does not allow: to allow it, "
                f'add "{key}" to vz_parameters in [policy] on this host',
            )
        if key in seen:  # vzctl takes the first one, a shell the last
            raise MigrateError(
                VzExitCode.BAD_CONFIG, f"{where} sets {key} a second time: keep one of the lines"
            )
        seen.add(key)
        plain = value.strip("\"'")
        elsewhere = _ELSEWHERE_NETIF if key == "NETIF" else _ELSEWHERE
        if (key in _FILE_NAMES and elsewhere.search(value)) or (
            key == "VEID" and plain not in (container, "$VEID", "${VEID}")
        ):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{where}: {key}={value[:80]} names a path or another container, and is not "
                "accepted from another host",
            )
        if key == "IP_ADDRESS" and (others := {*plain.split()} - {*addresses}):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{where} has the address {min(others)[:80]}, which the source did not announce",
            )
