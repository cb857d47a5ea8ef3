# SPDX-License-Identifier: Apache-2.0
"""What CRIU (4.2) refuses in a running container, found before anything starts.

Without these checks the container would be suspended, and go on here after the dump has
failed.  Each was tried with a real container: what CRIU can dump is not refused
(docs/reference/checks.md).  Only the processes, config.json and CRIU's options are needed, so a
runtime that uses runc in another way can make the same checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.checks import Checks
from pyploop.runtimes.runc import (
    preflight_files,
    preflight_mounts,
    preflight_namespaces,
    preflight_sockets,
)
from pyploop.runtimes.runc.preflight_files import Problem

MOST = 8
"""Problems of one check that are named."""

CURES = {
    "io-uring": "configure the program without io_uring (for Node.js: UV_USE_IO_URING=0)",
    "bpf": "end the program that uses BPF, or migrate without --live",
    "userfaultfd": "end the program, or migrate without --live",
    "anonymous-file": "end the program, or migrate without --live",
    "packet-pipe": "end the program, or migrate without --live",
    "memfd-secret": "end the program, or migrate without --live",
    "posix-queues": "close the message queue, or migrate without --live",
    "outside-file": "start the container with standard input and output on /dev/null, or on a pipe",
    "outside-terminal": "start the container with standard input and output on /dev/null",
    "deleted-file-linked": "restart the program, or migrate without --live",
    "deleted-file-size": "raise ghost-limit in CRIU's options, or restart the program",
    "vsock": "end the program, or migrate without --live",
    "socket-family": "end the program, or migrate without --live",
    "socket-protocol": "end the program, or migrate without --live",
    "mptcp": "use plain TCP (for programs in Go: GODEBUG=multipathtcp=0)",
    "netlink-data": "restart the program, or let it read what waits there",
    "netlink-link-events": "stop the program before the migration, or migrate without --live",
    "outside-socket": "restart the program without the socket, or migrate without --live",
    "nested-pid-namespace": "end these processes, or migrate without --live",
    "nested-time-namespace": "end these processes, or migrate without --live",
    "nested-user-namespace": "end these processes, or migrate without --live",
    "nested-uts-namespace": "end these processes, or migrate without --live",
    "nested-ipc-namespace": "end these processes, or migrate without --live",
    "nested-network-namespace": "end these processes, or migrate without --live",
    "nested-cgroup-namespace": "end these processes, or migrate without --live",
    "user-namespace-network": "let runc make the network namespace, or give up the user namespace",
    "submount": "unmount it on the host, or bind it in config.json by an entry of its own",
}
"""Check -> what to do."""


@dataclass(frozen=True)
class CriuOptions:
    """Those of the container's dump."""

    ghost_limit: int = 1 << 20
    """Bytes of a deleted file that is open; CRIU's default."""
    ext_unix: bool = False
    """The other end of a Unix socket may be outside."""
    file: str = ""
    """Where they are set; empty: nowhere yet."""


@dataclass(frozen=True)
class View:
    """A container that runs."""

    pids: Sequence[int]
    """All its processes, the first one first."""
    config: Mapping[str, Any]
    """config.json."""
    bundle: str
    criu: str
    """The program."""
    cuts_link: bool
    """Its link goes down before the dump."""


def check(found: Checks, view: View, options: CriuOptions) -> None:
    """Takes some ten microseconds for each descriptor."""
    pids = view.pids
    files = preflight_files.descriptors(pids)
    problems = [
        *preflight_files.special(files, pids, view.criu),
        *preflight_files.outside(files, pids),
        *preflight_files.deleted(files, pids, options.ghost_limit),
        *preflight_sockets.of(files, pids, options.ext_unix, view.cuts_link),
        *preflight_namespaces.of(pids),
        *preflight_mounts.of(pids[0], view.config, view.bundle),
    ]
    by_name: dict[str, list[Problem]] = {}
    for problem in problems:
        by_name.setdefault(problem.check, []).append(problem)
    for name, every in by_name.items():
        words = [p.what for p in every]
        more = f" and {len(words) - MOST} more" if len(words) > MOST else ""
        where = f" ({options.file})" if "CRIU's options" in CURES[name] and options.file else ""
        with found.named(name):
            raise MigrateError(
                VzExitCode.DUMP_FAILED,
                f"{'; '.join(words[:MOST])}{more}: CRIU cannot dump that",
                path=every[0].path,
                hint=CURES[name] + where,
            )
