# SPDX-License-Identifier: Apache-2.0
"""Migrations that cannot be: dumps and restores that really fail, a target disk
that is full, a container that is being migrated.  What goes wrong at each
step is in test_runc_failures.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gates import gates
from lab import container, verify
from lab.hosts import CONTAINER_IP, CONTAINER_NETNS, Host, Lab
from moving import Migration, files, judge, migrate, migration, only_side
from support import wait_until
from table import note

SIZE = 192 << 20


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
        note("runc", "dump that cannot be made", "fails", f"source, {done.code}")
        assert judge(two_hosts, client, before) is two_hosts.a
        assert migrate(two_hosts, two_hosts.a).code == 0
        assert judge(two_hosts, client, before) is two_hosts.b


_FLOOD = """
import socket, sys, threading
def knock():
    while True:
        try:
            socket.create_connection((sys.argv[1], 5000), timeout=0.02).close()
        except OSError:
            pass
for _ in range(16):
    threading.Thread(target=knock, daemon=True).start()
print("knocking", flush=True)
sys.stdin.read()
"""


def test_a_server_that_is_always_busy_with_new_connections_moves(two_hosts: Lab) -> None:
    """CRIU cannot move a connection that was not accepted yet."""
    with container.container(two_hosts), verify.client(two_hosts) as client:
        flood = subprocess.Popen(
            two_hosts.on_client(sys.executable, "-c", _FLOOD, CONTAINER_IP),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert flood.stdout is not None
            assert flood.stdout.readline() == b"knocking\n"
            here = two_hosts.a
            for _ in range(2):
                done = migrate(two_hosts, here)
                assert done.code == 0, done.errors
                here = two_hosts.other(here)
        finally:
            flood.communicate()
        assert only_side(two_hosts) is here
        client.verify_database()
        client.verify_blocks()


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
        note("runc", "restore that cannot be made", "fails", f"source, {done.code}")
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
            full = "too small" if when == "before" else "gets full"
            note("runc", f"target disk {full}", "fails", f"source, {done.code}")
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
