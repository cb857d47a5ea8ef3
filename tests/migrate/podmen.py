# SPDX-License-Identifier: Apache-2.0
"""Migrations of a container of Podman, and what must be true of both hosts afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import moving
import pytest
from lab import hosts, podman
from lab.hosts import SLOWNESS, Host, Lab
from lab.verify import Client
from moving import Outcome

from pyploop.migration.source import host_rates

WORD = f"podman:{podman.NAME}"


@dataclass(frozen=True)
class Moved:
    """What moves, and how it is known where it runs."""

    word: str
    names: tuple[str, ...]
    processes: tuple[str, ...]
    """How their command lines begin."""


CONTAINER = Moved(WORD, (podman.NAME,), ("/guest", "/usr/bin/conmon"))
POD = Moved(
    f"podman:{podman.POD}",
    (podman.NAME, podman.PEER, podman.INFRA),
    (*CONTAINER.processes, "/catatonit", "sh -c n=0", "sleep"),
)
_STAY = {
    "/dev/shm/libpod_lock",
    "/var/lib/pyploop",
    "/var/lib/pyploop/migrate",
    "/var/lib/pyploop/migrate/podman-ct.lazy",
}
_OURS = (
    *("/var/lib/pyploop", "/dev/shm", "/run/pyploop/lock/ct"),
    f"/run/pyploop/lock/{podman.POD}",
)


def migrate(lab: Lab, source: Host, *options: str, what: Moved = CONTAINER) -> Outcome:
    return moving.migrate(lab, source, *options, name=what.word)


def only_side(lab: Lab, what: Moved = CONTAINER) -> Host:
    """The host that runs all of it; the other one's Podman does not know it."""
    found = {h.name: podman.states(h) for h in (lab.a, lab.b)}
    running = [h for h in (lab.a, lab.b) if found[h.name] == dict.fromkeys(what.names, "running")]
    empty = [h for h in (lab.a, lab.b) if not found[h.name]]
    assert len(running) == len(empty) == 1, found
    return running[0]


def debris(
    host: Host, runs_here: bool, stays: frozenset[str] = frozenset(), what: Moved = CONTAINER
) -> dict[str, Any]:
    """What a migration has left on the host that should not be there."""
    left: dict[str, Any] = {}
    files = {f for f in moving.files(host) if f.startswith(_OURS)} - _STAY - stays
    files = {f for f in files if not f.endswith(host_rates.SUFFIX)}
    stage = podman.STORAGE / "pyploop-incoming"
    if host.outside(stage).exists():
        files.add(str(stage))
    processes = host.processes()
    mounts = [m for m in host.mounts() if m.startswith(f"{podman.STORAGE}/overlay/")]
    volumes = podman.volumes(host)
    if runs_here:
        processes = {p: c for p, c in processes.items() if not c.startswith(what.processes)}
        if volumes == [podman.VOLUME]:
            volumes = []
        mounts = mounts[len(what.names) :]
        for name in what.names:
            checkpoint = podman.inspect(host, name=name)["StaticDir"] + "/checkpoint"
            if host.outside(checkpoint).exists():
                files.add(checkpoint)
    tables = [t for t in host.run("nft", "list", "tables").splitlines() if "pyploop" in t]
    left |= {"files": sorted(files)} if files else {}
    left |= {"processes": processes} if processes else {}
    left |= {"mounts": mounts} if mounts else {}
    left |= {"volumes": volumes} if volumes else {}
    left |= {"tables": tables} if tables else {}
    pods = host.run("podman", "pod", "ls", "--quiet").split()
    left |= {"pods": pods} if len(pods) != int(runs_here and what is POD) else {}
    return left


def judge(
    lab: Lab, client: Client, stays: frozenset[str] = frozenset(), what: Moved = CONTAINER
) -> Host:
    """It runs on exactly one host, which is returned; the connection is the first one; nothing
    that was acknowledged is lost; nothing else is left."""
    side = only_side(lab, what)
    acknowledged = client.verify_database()
    client.verify_blocks()
    client.mark()
    assert client.verify_database() > acknowledged
    for host in (lab.other(side), side):
        deadline = time.monotonic() + 5 * SLOWNESS  # the last process may be going yet
        while (left := debris(host, host is side, stays, what)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"left on host {host.name}: {left}"
    return side


# ---- fixtures: a test module takes those that it needs (`pair = podmen.pair`)


@pytest.fixture(scope="module")
def pair() -> Iterator[Lab]:
    """Two hosts without Podman's places."""
    podman.check()
    with hosts.lab() as lab:
        yield lab


@pytest.fixture
def both(pair: Lab) -> Iterator[Lab]:
    """Two hosts, the first with the image."""
    with podman.hosts_with_podman(pair) as guest:
        podman.import_image(pair.a, guest)
        yield pair


@pytest.fixture(scope="module")
def pair_with_image() -> Iterator[Lab]:
    """Two hosts for all tests of the module, the first with the image."""
    podman.check()
    with hosts.lab() as lab, podman.hosts_with_podman(lab) as guest:
        podman.import_image(lab.a, guest)
        yield lab


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> None:
    """Not after each test: the lab has its own (`pair`)."""
