# SPDX-License-Identifier: Apache-2.0
"""A running container moves between two hosts, again and again."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from anypair import make_disk
from lab import container, verify
from lab.hosts import Lab
from moving import files, judge, migrate
from support import run

from pyploop.system import cpu
from pyploop.transport.ssh_cipher import PREFERRED

MIGRATIONS = int(os.environ.get("PYPLOOP_MIGRATIONS", "2"))
"""Back and forth."""
LOAD = 20
"""MB of random writes a second in every second pair of migrations."""

TABLE = re.compile(
    r" {8}Suspend \+ Dump: [ \d]{3}\.\d\d\n"
    r" {3}Pcopy after suspend: [ \d]{3}\.\d\d\n"
    r" {8}Copy dump file: [ \d]{3}\.\d\d\n"
    r" {7}Undump \+ Resume: [ \d]{3}\.\d\d\n"
    r" {24}-+\n"
    r" {2}Total suspended time: [ \d]{3}\.\d\d\n"
)


def test_a_container_that_goes_back_and_forth_keeps_its_connection_and_every_write(
    two_hosts: Lab, tmp_path: Path
) -> None:
    before = files(two_hosts.b)
    with container.container(two_hosts), verify.client(two_hosts) as client:
        here = two_hosts.a
        for turn in range(MIGRATIONS):
            client.load(LOAD if turn % 4 in (1, 2) else 0)
            client.mark()
            done = migrate(two_hosts, here)
            assert done.code == 0, done.errors
            assert TABLE.search(done.out), done.out
            (connection,) = (e for e in done.events if e["event"] == "connection")
            if "aes" in cpu.flags():
                assert connection["cipher"] == connection["asked"] == PREFERRED
            here = two_hosts.other(here)
            assert judge(two_hosts, client, before) is here
            verify.check_append_log(here.outside(container.ROOTFS))
        container.remove(here)
        root = here.outside(container.ROOTFS)
        assert verify.check_database(root, client.ledger, tmp_path) > MIGRATIONS
        verify.check_append_log(root)
        container.detach(here)
        run("e2fsck", "-fn", here.outside(container.IMAGE))


@pytest.mark.parametrize(
    "bad", ["no such container", "already there", "check only", "another disk"]
)
def test_what_is_refused_or_only_checked_changes_nothing(two_hosts: Lab, bad: str) -> None:
    before = files(two_hosts.b)
    with container.container(two_hosts), verify.client(two_hosts) as client:
        if bad == "check only":
            done = migrate(two_hosts, two_hosts.a, "--check-only")
            assert done.code == 0, done.errors
        elif bad == "already there":
            container.write_bundle(two_hosts.b)
            done = migrate(two_hosts, two_hosts.a)
            assert done.code == 9, done.errors
            container.clear_bundle(two_hosts.b)
        elif bad == "another disk":
            other = "/srv/other.img"
            make_disk(two_hosts.a.outside(other))
            two_hosts.a.run("mount", "-o", "loop", other, container.ROOTFS)
            done = migrate(two_hosts, two_hosts.a)
            two_hosts.a.run("umount", container.ROOTFS)
            two_hosts.a.outside(other).unlink()
            assert done.code == 15, done.errors
            assert "other.img" in done.errors and str(container.IMAGE) in done.errors
        else:
            done = migrate(two_hosts, two_hosts.b)
            assert done.code == 10, done.errors
        assert judge(two_hosts, client, before) is two_hosts.a
