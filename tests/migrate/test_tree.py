# SPDX-License-Identifier: Apache-2.0
"""A running container whose root is a directory moves between two hosts."""

from __future__ import annotations

import os
from pathlib import Path

from lab import container, verify
from lab.hosts import Lab
from moving import files, judge, migrate

MIGRATIONS = int(os.environ.get("PYPLOOP_MIGRATIONS", "2"))


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
