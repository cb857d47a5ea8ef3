# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/tutorial/first-migration.md and first-network-migration.md, on the two
hosts of the lab."""

from __future__ import annotations

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
    hosts = {"a": two_hosts.a, "b": two_hosts.b}
    for host in hosts.values():
        give_own_etc(two_hosts, host)
    page = tutorial.TUTORIAL / "first-migration.md"
    outputs = [typed(hosts[where], block) for where, block in tutorial.steps(page)]
    assert any("Total suspended time" in o for o in outputs)
    assert any("none is missing" in o for o in outputs)
    for host in hosts.values():
        assert "web" not in host.run("runc", "list")
        assert not host.outside("/srv/web").exists()


def test_the_blocks_of_a_migration_with_a_network_run_in_order_and_a_client_stays_connected(
    two_hosts: Lab,
) -> None:
    needs("busybox", "rsync")
    hosts = {"a": two_hosts.a, "b": two_hosts.b}
    for host in hosts.values():
        give_own_etc(two_hosts, host)
    outputs: list[str] = []
    client: subprocess.Popen[str] | None = None
    try:
        for where, block in tutorial.steps(tutorial.TUTORIAL / "first-network-migration.md"):
            if "--check-only" in block:
                client = subprocess.Popen(
                    two_hosts.on_client("busybox", "nc", "10.77.0.200", "8080"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                assert [answer(client) for _ in range(3)] == ["1", "2", "3"]
            if "runc delete" in block:
                assert client is not None and answer(client) == "4"
            outputs.append(typed(hosts[where], block))
    finally:
        if client is not None:
            client.kill()
            client.communicate()
    (explained,) = (o for o in outputs if "tree /srv/web/rootfs" in o)
    assert "found in runc's state" in explained and "Nothing stands in the way" in explained
    assert "[container.web]" in explained and "web0" in explained
    assert any("Total suspended time" in o for o in outputs)
    for host in hosts.values():
        assert "web" not in host.run("runc", "list")
        assert not host.outside("/srv/web").exists()


def answer(client: subprocess.Popen[str]) -> str:
    """To one more line over the same connection."""
    assert client.stdin and client.stdout
    client.stdin.write("next\n")
    client.stdin.flush()
    return client.stdout.readline().strip()
