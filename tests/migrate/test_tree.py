# SPDX-License-Identifier: Apache-2.0
"""A running container whose root is a directory moves between two hosts."""

from __future__ import annotations

import os
from pathlib import Path
from signal import SIGINT as INT
from signal import SIGKILL as KILL

import pytest
import table
from gates import gates
from lab import container, verify
from lab.hosts import Lab
from moving import files, judge, kill, migrate, migration, recover
from support import wait_until

MIGRATIONS = int(os.environ.get("PYPLOOP_MIGRATIONS", "2"))
ORCHESTRATOR, AGENT = "pyploop.cli.main migrate", "pyploop.cli.main agent"
DISTURBED = {
    # where it is stopped, who gets which signal, and where the container runs then
    "the source's rsync killed, first pass": ("", "source", "rsync -aHAX", KILL, "target"),
    "the target's rsync killed, first pass": ("", "target", "rsync --server", KILL, "target"),
    "orchestrator interrupted, first pass": ("", "source", ORCHESTRATOR, INT, "source"),
    "agent killed, first pass": ("", "target", AGENT, KILL, "source"),
    "the source's rsync killed, last pass": (
        *("link-down-before", "source", "rsync -aHAX", KILL, "target"),
    ),
    "the target's rsync killed, last pass": (
        *("link-down-before", "target", "rsync --server", KILL, "target"),
    ),
    "orchestrator killed, suspended": ("checkpoint-before", "source", ORCHESTRATOR, KILL, "source"),
    "ssh cut, dump made": ("checkpoint-after", "source", "ssh -", KILL, "source"),
    "agent killed, dump made": ("checkpoint-after", "target", AGENT, KILL, "source"),
    "orchestrator killed, source being removed": (
        *("delete-before", "source", ORCHESTRATOR, KILL, "target"),
    ),
}


def test_a_container_in_a_directory_keeps_its_connection_and_every_write(
    two_hosts: Lab, tmp_path: Path
) -> None:
    before = files(two_hosts.b)
    with container.container(two_hosts, tree=True), verify.client(two_hosts) as client:
        here = two_hosts.a
        for turn in range(MIGRATIONS):
            client.load(5 if turn % 2 else 0)
            client.mark()
            done = migrate(two_hosts, here)
            assert done.code == 0, done.errors
            here = two_hosts.other(here)
            assert judge(two_hosts, client, before) is here
            frozen = [e for e in done.events if e["event"] == "tree" and e["phase"] == "frozen"]
            assert [e["path"] for e in frozen] == [str(container.ROOTFS)]
        container.remove(here)
        root = here.outside(container.ROOTFS)
        assert verify.check_database(root, client.ledger, tmp_path) > MIGRATIONS
        verify.check_append_log(root)


if table.ALL:

    @pytest.mark.parametrize("what", DISTURBED)
    def test_a_disturbed_migration_of_a_directory_leaves_one_container(
        two_hosts: Lab, what: str
    ) -> None:
        gate, whose, pattern, how, where = DISTURBED[what]
        a, b = two_hosts.a, two_hosts.b
        before = files(b)
        with (
            container.container(two_hosts, tree=True),
            verify.client(two_hosts) as client,
            gates(a) as stops,
        ):
            if gate:
                client.load(2)
                stops.close_gate(gate)
            # Compressed, since rsync sends holes as zeroes.
            slow = () if gate else ("--bwlimit", "300K", "--rsync=-z")
            with migration(two_hosts, a, *slow) as moving:
                if gate:
                    stops.wait(gate)
                else:
                    wait_until(lambda: moving.phase() == "first pass", "the copy has begun", 40)
                side = a if whose == "source" else b
                wait_until(lambda: any(pattern in p for p in side.processes().values()), pattern)
                kill(side, pattern, how)
                if gate:
                    stops.open_gate(gate)
                done = moving.wait()
            assert "Traceback" not in done.errors
            stops.mend()
            recovered = recover(a).strip()
            assert bool(recovered) == (done.code == -KILL), (done.code, recovered)
            here = judge(two_hosts, client, before)
            side_name = "source" if here is a else "target"
            table.note("directory", what, "ended", f"{side_name}, {done.code}")
            assert side_name == where, done.errors
            assert migrate(two_hosts, here).code == 0
            assert judge(two_hosts, client, before) is two_hosts.other(here)
