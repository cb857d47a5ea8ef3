# SPDX-License-Identifier: Apache-2.0
"""Which cipher ssh is asked for.

OpenSSH prefers chacha20-poly1305 also where both CPUs have instructions for AES, with
which aes128-gcm is about 1.7 times as fast.  So it is asked for that one first, where the
user has no wish of his own; all others follow, so that a server without it still connects.

Whether the target's CPU has AES is not known before the connection.  But a live migration
goes only to a CPU with all features of the source's (`--nodeps=cpu` apart), so the source's
CPU speaks for both.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

PREFERRED = "aes128-gcm@openssh.com"
SECONDS = 5.0
"""For ssh to say what it would do: it connects to nothing, but `Match exec` may run commands."""
KEX = "kex.c:kex_choose_conf()"
VERBOSE = f"-oLogVerbose={KEX}:*"
"""Lets ssh (OpenSSH 8.5 or newer) print what both ends have agreed on, and nothing else."""
_CIPHERS = re.compile(r"^ciphers (\S+)$", re.MULTILINE | re.IGNORECASE)
_CHOSEN = re.compile(r"kex: client->server cipher: (\S+)")


@dataclass(frozen=True)
class Choice:
    """What to add to ssh's options."""

    options: tuple[str, ...]
    preferred: bool
    """It asks for PREFERRED first."""
    why: str


def choose(ssh: Sequence[str], options: Sequence[str], host: str, aes: bool) -> Choice:
    """ssh, options: as of client.Client.  aes: both CPUs have it."""
    said = _ask([*ssh, *options, VERBOSE, "-G", "--", host])
    more: tuple[str, ...] = (VERBOSE,) if said else ()
    said = said or _ask([*ssh, *options, "-G", "--", host])
    default = _ask([ssh[0], "-F", "none", "-G", "--", host])

    def no(why: str) -> Choice:
        return Choice(more, False, why)

    if not said or not default:
        return no(f"{ssh[0]} does not say which ciphers it would use")
    if said != default:
        return no("the ciphers are those of ssh's configuration or options")
    ciphers = default.split(",")
    if PREFERRED not in ciphers:
        return no(f"this ssh does not know {PREFERRED}")
    if not aes:
        return no("it is not known that both CPUs have AES instructions")
    order = ",".join([PREFERRED, *(c for c in ciphers if c != PREFERRED)])
    return Choice((*more, f"-oCiphers={order}"), True, "both CPUs have AES instructions")


def _ask(command: Sequence[str]) -> str:
    """The ciphers that this command of ssh names; empty: it names none."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = _CIPHERS.search(done.stdout) if done.returncode == 0 else None
    return found[1] if found else ""


def chosen(printed: str) -> str:
    """The cipher of the connection, by what ssh printed with VERBOSE; empty: it did not say
    (an older ssh, or a connection that another ssh shares)."""
    found = _CHOSEN.findall(printed)
    return found[-1] if found else ""


def without_kex(printed: str) -> str:
    """What ssh printed, without the lines that VERBOSE makes."""
    return "\n".join(line for line in printed.split("\n") if KEX not in line)
