# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/tutorial/first-migration.md, on the two hosts of the lab."""

from __future__ import annotations

import re
import subprocess

import tutorial
from lab.hosts import Host, Lab
from support import needs

_OWN_ETC = """
mkdir -p /run/etc/upper /run/etc/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work /etc
mount --bind "$1" /etc/ssh/ssh_config
"""
"""The page writes to /etc/pyploop, and the hosts of the lab share /etc."""


def give_own_etc(lab: Lab, host: Host) -> None:
    host.run("sh", "-ec", _OWN_ETC, "sh", lab.folder / "ssh_config")


def typed(host: Host, block: str) -> str:
    """The block's output on the host."""
    done = subprocess.run(
        host.command("bash", "-e", "-o", "pipefail", "-c", block),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_blocks_of_the_first_migration_run_in_order(two_hosts: Lab) -> None:
    needs("busybox")
    hosts = {"a": [two_hosts.a], "b": [two_hosts.b], "both": [two_hosts.a, two_hosts.b]}
    for host in hosts["both"]:
        give_own_etc(two_hosts, host)
    outputs = []
    for block in tutorial.blocks(tutorial.TUTORIAL / "first-migration.md"):
        where = re.match(r"# on (a|b|both)\n", block)
        assert where, f"it does not say on which host: {block}"
        outputs += [typed(host, block) for host in hosts[where[1]]]
    assert any("Total suspended time" in o for o in outputs)
    assert any("none is missing" in o for o in outputs)
    for host in hosts["both"]:
        assert "web" not in host.run("runc", "list")
        assert not host.outside("/srv/web").exists()
