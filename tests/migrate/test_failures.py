# SPDX-License-Identifier: Apache-2.0
"""A migration that is disturbed, at each of its steps: the container runs on
exactly one host, nothing acknowledged is lost, nothing is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gates import gates
from lab import container, verify
from lab.hosts import CONTAINER_IP, CONTAINER_NETNS, Host, Lab
from moving import Migration, files, judge, kill, migrate, migration, recover
from support import wait_until

SIZE = 192 << 20
LOG = os.environ.get("PYPLOOP_MATRIX_LOG")
"""File that gets a row of a Markdown table for each disturbance."""

PLACES = {
    "while copying": ("", ""),
    "suspended, before the dump": ("source", "checkpoint-before"),
    "dump made": ("source", "checkpoint-after"),
    "before the restore": ("target", "restore-before"),
    "restored, not yet told": ("target", "restore-after"),
    "source being removed": ("source", "delete-before"),
}
"""Where, and the gate that stops the migration there."""
DISTURBANCES = {
    "orchestrator killed": (signal.SIGKILL, "source", "pyploop.cli.main migrate"),
    "orchestrator interrupted": (signal.SIGINT, "source", "pyploop.cli.main migrate"),
    "ssh cut": (signal.SIGKILL, "source", "ssh -"),
    "agent killed": (signal.SIGKILL, "target", "pyploop.cli.main agent"),
}
ORDINARY = {
    ("while copying", "orchestrator killed"),
    ("suspended, before the dump", "orchestrator interrupted"),
    ("before the restore", "ssh cut"),
    ("dump made", "agent killed"),
    ("restored, not yet told", "orchestrator killed"),
    ("source being removed", "orchestrator interrupted"),
}
"""The rest with PYPLOOP_MATRIX=1."""
CASES = [
    (place, disturbance)
    for place in PLACES
    for disturbance in DISTURBANCES
    if os.environ.get("PYPLOOP_MATRIX") or (place, disturbance) in ORDINARY
]
STAYS = ("while copying", "suspended, before the dump", "dump made")
"""Before the target is asked: it must go on where it was."""
COMMITTED = ("restored, not yet told", "source being removed")
"""After the commit point: it must run on the target."""


def note(*cells: object) -> None:
    if LOG is not None:
        with open(LOG, "a") as f:
            f.write("| " + " | ".join(str(c) for c in cells) + " |\n")


@pytest.mark.parametrize(("place", "disturbance"), CASES)
def test_a_disturbed_migration_leaves_one_container_and_no_debris(
    two_hosts: Lab, place: str, disturbance: str
) -> None:
    how, side, pattern = DISTURBANCES[disturbance]
    where, gate = PLACES[place]
    source, target = two_hosts.a, two_hosts.b
    sides = {"source": source, "target": target}
    before = files(target)
    slow = () if gate else ("--bwlimit", "2M")
    with (
        container.container(two_hosts, size=SIZE),
        verify.client(two_hosts) as client,
        gates(source) as on_source,
        gates(target) as on_target,
    ):
        client.load(2)
        stops = on_source if where == "source" else on_target
        if gate:
            stops.close_gate(gate)
        with migration(two_hosts, source, *slow) as moving:
            if gate:
                stops.wait(gate)
            else:
                wait_until(lambda: moving.phase() == "first pass", "the copy has begun", 40)
            kill(sides[side], pattern, how)
            if gate:
                stops.open_gate(gate)
            done = moving.wait()
        said = (done.errors.strip().splitlines() or [""])[-1]
        assert "Traceback" not in done.errors
        if how is signal.SIGKILL and side == "source" and "migrate" in pattern:
            assert done.code != 0
            said = recover(source).strip().splitlines()[-1]
        here = judge(two_hosts, client, before)
        note(place, disturbance, here.name, done.code, said)
        if place in STAYS:
            assert here is source
            assert done.code != 0
        if place in COMMITTED:
            assert here is target
        if place == "source being removed" and how is signal.SIGINT:
            assert done.code == 0
        # Whatever happened, the next one succeeds.
        assert migrate(two_hosts, here).code == 0
        assert judge(two_hosts, client, before) is two_hosts.other(here)


_CONNECT = """
import socket, sys
all = [socket.create_connection((sys.argv[1], 5000)) for _ in range(9)]
print("connected", flush=True)
sys.stdin.read()
"""


def test_a_container_that_cannot_be_dumped_goes_on(two_hosts: Lab) -> None:
    before = files(two_hosts.b)
    with container.container(two_hosts), verify.client(two_hosts) as client:
        # More connections than the server takes: CRIU has no way for one that was
        # not accepted.
        waiting = subprocess.Popen(
            two_hosts.on_client(sys.executable, "-c", _CONNECT, CONTAINER_IP),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == b"connected\n"
            done = migrate(two_hosts, two_hosts.a)
        finally:
            waiting.communicate()
        assert done.code == 8, done.errors
        assert "In-flight connection" in done.errors
        note("dump", "cannot be made", "a", done.code, done.errors.strip().splitlines()[-1])
        assert judge(two_hosts, client, before) is two_hosts.a
        assert migrate(two_hosts, two_hosts.a).code == 0
        assert judge(two_hosts, client, before) is two_hosts.b


def test_a_container_with_a_stopped_process_is_refused_before_it_is_suspended(
    two_hosts: Lab,
) -> None:
    before = files(two_hosts.b)
    with container.container(two_hosts), verify.client(two_hosts) as client:
        # CRIU would wait for it for ever, and the container with it.
        pid = max(p for p, line in two_hosts.a.processes().items() if line.startswith("/guest"))
        two_hosts.a.run("kill", "-STOP", pid)
        done = migrate(two_hosts, two_hosts.a)
        two_hosts.a.run("kill", "-CONT", pid)
        assert done.code == 8, done.errors
        assert f"process {pid} of {container.NAME} is stopped" in done.errors
        assert judge(two_hosts, client, before) is two_hosts.a


def test_a_target_that_cannot_restore_gives_the_container_back(two_hosts: Lab) -> None:
    before = files(two_hosts.b)
    address = (f"{CONTAINER_IP}/24", "dev", "eth0")
    inside = ("nsenter", f"--net={CONTAINER_NETNS}", "ip", "addr")
    with container.container(two_hosts), verify.client(two_hosts) as client:
        # Without its address the connection cannot be put back.
        two_hosts.b.run(*inside, "del", *address)
        done = migrate(two_hosts, two_hosts.a)
        assert done.code == 7, done.errors
        note("restore", "fails", "a", done.code, done.errors.strip().splitlines()[-1])
        two_hosts.b.run(*inside, "add", *address)
        assert judge(two_hosts, client, before) is two_hosts.a
        assert migrate(two_hosts, two_hosts.a).code == 0
        assert judge(two_hosts, client, before) is two_hosts.b


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_target_without_room_leaves_the_container_where_it_is(two_hosts: Lab, when: str) -> None:
    with container.container(two_hosts), verify.client(two_hosts) as client:
        size = "2M" if when == "before" else "64M"
        with small_disk(two_hosts.b, size) as disk:
            before = files(two_hosts.b)
            options = () if when == "before" else ("--bwlimit", "4M")
            with migration(two_hosts, two_hosts.a, *options) as moving:
                if when == "meanwhile":
                    wait_until(lambda: moving.phase() == "first pass", "the copy has begun", 40)
                    fill(disk)
                done = moving.wait()
            assert done.code == 6, done.errors
            note("target disk", f"full {when}", "a", done.code, done.errors.splitlines()[-1])
            (disk / "filler").unlink(missing_ok=True)
            assert judge(two_hosts, client, before) is two_hosts.a


class small_disk:
    """/srv of a host as a tmpfs of this size; a context manager."""

    def __init__(self, host: Host, size: str) -> None:
        self._host, self._size = host, size

    def __enter__(self) -> Path:
        self._host.run("mount", "-t", "tmpfs", "-o", f"size={self._size}", "small", "/srv")
        container.write_pyploop_config(self._host)
        return self._host.outside("/srv")

    def __exit__(self, *exc: object) -> None:
        self._host.run("umount", "/srv")


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb") as f:
        try:
            while True:
                f.write(bytes(1 << 20))
                f.flush()
        except OSError:
            pass


def test_a_migration_that_waits_for_another_one_of_its_container_is_told_so(
    two_hosts: Lab,
) -> None:
    before = files(two_hosts.b)
    with (
        container.container(two_hosts, size=SIZE),
        verify.client(two_hosts) as client,
        gates(two_hosts.a) as stops,
    ):
        stops.close_gate("checkpoint-before")
        with migration(two_hosts, two_hosts.a) as first:
            stops.wait("checkpoint-before")
            second = Migration(two_hosts, two_hosts.a, events="second.ndjson")
            try:
                assert second.wait().code == 20
            finally:
                second.close()
            stops.open_gate("checkpoint-before")
            assert first.wait().code == 0
        assert judge(two_hosts, client, before) is two_hosts.b
