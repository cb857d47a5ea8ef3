# SPDX-License-Identifier: Apache-2.0
"""`pyploop migrate --explain`: what a container has, how each part of it would move, and what
stands in the way."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from pyploop.report.events import Reporter
from pyploop.runtimes import Runtime
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.found_config import keys_of, toml

PODMAN = {"podman": "container", "podman-pod": "pod"}
"""Runtimes of Podman -> what they move."""


@contextlib.contextmanager
def explained(host: HostConfig, runtime: Runtime, report: Reporter, target: str) -> Iterator[None]:
    """Log what was found, then do the body, which checks, and then log the lines for
    migrate.toml, whether a check has failed or not.  target: [user@]host."""
    name = runtime.container
    if runtime.name in PODMAN:
        with _of_podman(host, runtime, report, target):
            yield
        return
    where = "found in runc's state" if name in host.found else f"as {host.path or 'the defaults'}"
    report.note(f"Container {name} (runtime {runtime.name}), {where} has it:")
    for disk in runtime.disks(source=False):
        report.note(
            f"  disk {disk.image}, {disk.fstype} on {disk.mount}: copied as blocks while the "
            "container runs, and the last ones while it is suspended"
        )
    for tree in runtime.trees():
        report.note(f"  tree {tree.path}: copied by rsync, in passes; the last one while suspended")
    known = host.containers.get(name)
    for path in known.external if known is not None else ():
        report.note(f"  {path}: not copied; it must be on the target already")
    if known is not None and known.netns:
        report.note(f"  network namespace {known.netns}: not copied; the target has its own")
    _memory(runtime, report)
    try:
        yield
        report.note("Nothing stands in the way")
    finally:
        if known is not None and runtime.name == "runc":
            report.note("For /etc/pyploop/migrate.toml on both hosts, with their own paths:")
            for line in toml(name, keys_of(known)):
                report.note(line)


def _memory(runtime: Runtime, report: Reporter) -> None:
    memory = runtime.memory_now()
    if memory:
        report.note(f"  memory, {memory >> 20} MiB: dumped by CRIU while suspended, with --live")


@contextlib.contextmanager
def _of_podman(host: HostConfig, runtime: Runtime, report: Reporter, target: str) -> Iterator[None]:
    from pyploop.runtimes.podman import explained as of_podman

    parts, needed = of_podman.lines(host, runtime.container)
    if parts:
        kind = PODMAN[runtime.name]
        report.note(f"Podman's {kind} {runtime.container} has on this host:")
    for line in parts:
        report.note(f"  {line}")
    if parts:
        _memory(runtime, report)
    try:
        yield
        report.note("Nothing stands in the way")
    finally:
        for line in [*of_podman.trust(_our_address(target)), *needed] if parts else ():
            report.note(line)


def _our_address(target: str) -> str:
    """The one by which this host reaches the target.  ssh may know the target by a name that
    nobody else knows."""
    host = target.rpartition("@")[2].strip("[]")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 22, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(address)  # sends nothing
            return str(sock.getsockname()[0])
    except OSError:
        return "ADDRESS-OF-THIS-HOST"
