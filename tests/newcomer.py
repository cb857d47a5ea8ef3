#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""tests/newcomer.py: what the pages for newcomers say, typed word by word on two hosts with a
fresh Debian each (lab/fresh.py): install on both, let the source in, check, migrate.  First a
container of Podman, then one of runc.  Before that, what a missing piece looks like.

Needs root, debootstrap, PyPI and a Debian mirror (PYPLOOP_DEBIAN_MIRROR); some ten minutes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tutorial
from lab.fresh import SOURCE, FreshHost, two_fresh_hosts
from support import ROOT

PODMAN = ROOT / "docs" / "how-to" / "migrate-podman.md"
RUNC = tutorial.TUTORIAL / "first-network-migration.md"
_LIMITS = '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=10000:10000"]\n'
"""See the page: the machine of the tests may lack the capability."""
CHECK = "pyploop migrate --live --check-only b podman:web"


def typed(host: FreshHost, block: str) -> str:
    """A block of a page.  What installs something has the network of this machine, and is
    typed in the checkout."""
    installs = tutorial.installs(block)
    began = time.monotonic()
    output = host.does(f"cd {SOURCE}\n{block}" if installs else block, online=installs)
    print(f"-- {host.name}, {time.monotonic() - began:.0f} s\n{block}{output}", flush=True)
    return output


def follow(page: Path, hosts: dict[str, FreshHost]) -> list[str]:
    """The outputs of all blocks of the page."""
    print(f"== {page.relative_to(ROOT)}", flush=True)
    outputs = []
    for where, block in tutorial.steps(page, installed=False):
        host = hosts[where]
        if CHECK in block:
            refused(host, hosts["b"])
        outputs.append(typed(host, block))
    assert any("Total suspended time" in o for o in outputs)
    return outputs


def refused(a: FreshHost, b: FreshHost) -> None:
    """Each missing piece is named, with what to do, and nothing is changed."""
    program, criu = "/usr/local/bin/pyploop", "/usr/local/sbin/criu"
    for what, without, again, words in (
        (
            "trust",
            f"pyploop trust --remove {a.address}",
            f"pyploop trust {a.address}",
            "pyploop trust",
        ),
        (
            "pyploop",
            f"mv {program} /root/there",
            f"mv /root/there {program}",
            "no pyploop agent on b",
        ),
        ("CRIU", f"mv {criu} /root/there", f"mv /root/there {criu}", "criu"),
    ):
        b.does(without)
        status, output = a.typed(CHECK)
        print(f"-- without {what}: {status}\n{output}", flush=True)
        assert status and words in output, output
        b.does(again)


def main() -> int:
    with two_fresh_hosts(Path("/var/tmp")) as (a, b):
        hosts = {"a": a, "b": b}
        for host in hosts.values():
            path = host.root / "etc/containers/containers.conf"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_LIMITS)
        outputs = follow(PODMAN, hosts)
        assert outputs[-1].endswith("hello from the volume\n")
        assert "web" in b.does("podman ps --format '{{.Names}}'")
        assert not a.does("podman ps --all --format '{{.Names}}'")
        b.does("podman rm --force --time 0 web; podman volume rm site")
        a.does("rm -r /srv/web")
        outputs = follow(RUNC, hosts)
        assert any("Nothing stands in the way" in o for o in outputs)
        for host in hosts.values():
            assert "web" not in host.does("runc list")
    print("== Both pages lead to a moved container")
    return 0


if __name__ == "__main__":
    sys.exit(main())
