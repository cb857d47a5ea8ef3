# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/how-to/migrate-podman.md, on the two hosts of the lab."""

from __future__ import annotations

from pathlib import Path

import tutorial
from lab import podman
from lab.hosts import Lab
from podmen import debris
from support import ROOT
from test_first_migration import give_own_etc, typed

PAGE = ROOT / "docs" / "how-to" / "migrate-podman.md"
_LIMITS = '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=10000:10000"]\n'
"""See the page: the machine of the tests may lack the capability."""


def test_the_blocks_of_the_page_about_podman_run_in_order(two_hosts: Lab) -> None:
    podman.check()
    hosts = {"a": two_hosts.a, "b": two_hosts.b}
    for host in hosts.values():
        give_own_etc(two_hosts, host)
        host.outside("/etc/containers/containers.conf").write_text(_LIMITS)
        host.outside(Path("/etc/containers/networks")).mkdir(exist_ok=True)
    try:
        outputs = [typed(hosts[where], block) for where, block in tutorial.steps(PAGE)]
        assert any("Total suspended time" in o for o in outputs)
        assert outputs[-1].endswith("hello from the volume\n")
        assert podman.states(two_hosts.b) == {"web": "running"}
        assert not podman.states(two_hosts.a)
        assert not debris(two_hosts.a, runs_here=False)
    finally:
        for host in hosts.values():
            podman.remove(host)
