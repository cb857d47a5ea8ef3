# SPDX-License-Identifier: Apache-2.0
"""A container that runc knows, and migrate.toml does not: `--explain`, and the migration."""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Iterator

import moving
import pytest
import support
from lab import container, verify
from lab.hosts import NET, Host, Lab
from moving import files, judge, migrate, only_side

from pyploop.runtimes import config
from pyploop.runtimes.config import ContainerConfig

PLACES = f"""
[trust]
live = ["{NET}.0/24"]
places = ["/srv"]

[remote]
agent = ["pyploop", "agent", "--config", "{container.PYPLOOP_CONFIG}"]
"""


def forget(*where: Host, text: str = PLACES) -> None:
    """migrate.toml without the container."""
    for host in where:
        host.outside(container.PYPLOOP_CONFIG).write_text(text)


@pytest.fixture(params=["tree", "disk"])
def unknown(request: pytest.FixtureRequest, two_hosts: Lab) -> Iterator[str]:
    """A running container on a, which is in no configuration: its root is this."""
    support.needs("rsync")
    kind = str(request.param)
    with container.container(two_hosts, size=128 << 20, tree=kind == "tree"):
        for host in (two_hosts.a, two_hosts.b):
            host.outside("/srv").chmod(0o700)
        forget(two_hosts.a, two_hosts.b, text=f"{PLACES}# its root: [[{kind}]]\n")
        yield kind


def explained(lab: Lab) -> tuple[str, ContainerConfig]:
    """What --explain says, and the container that its lines for migrate.toml make."""
    words = ["pyploop", "migrate", "--live", "--explain", "--config", container.PYPLOOP_CONFIG]
    done = subprocess.run(
        lab.a.command(*words, "b", container.NAME),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = done.stdout
    text = said[said.index("[container.") :]
    parsed = config.parse(tomllib.loads(text), "said").containers[container.NAME]
    return f"{done.returncode}\n{said}{done.stderr}", parsed


def test_what_was_found_is_explained_and_the_toml_says_the_same(
    two_hosts: Lab, unknown: str
) -> None:
    a, b = two_hosts.a, two_hosts.b
    said, first = explained(two_hosts)
    assert said.startswith("0\nContainer ct (runtime runc), found in runc's state has it:"), said
    assert f"  {unknown} /srv/ct/root" in said
    assert "Nothing stands in the way" in said
    assert (first.bundle, first.netns) == ("/srv/ct", "/run/netns/ct")
    assert first.link_up == ("ip", "link", "set", "ct0", "up")
    assert first.trees == (("/srv/ct/rootfs",) if unknown == "tree" else ())
    assert [d.image for d in first.disks] == (["/srv/ct/root.img"] if unknown == "disk" else [])
    # In a file, it makes the same plan.
    for host in (a, b):
        text = said[said.index("[container.") :]
        forget(host, text=PLACES + text)
    again, second = explained(two_hosts)
    assert second == first
    assert f"as {container.PYPLOOP_CONFIG} has it" in again
    plan = [line for line in said.splitlines() if line.startswith("  ")]
    assert plan == [line for line in again.splitlines() if line.startswith("  ")]
    forget(b, text="\n".join(x for x in PLACES.splitlines() if not x.startswith("places")))
    forget(a)
    said, _ = explained(two_hosts)
    assert said.startswith("10\n"), said
    assert "ct is not configured on this host" in said and "pyploop trust SOURCE --places" in said


@pytest.mark.parametrize("unknown", ["disk"], indirect=True)
def test_it_moves_without_a_configuration_and_back(two_hosts: Lab, unknown: str) -> None:
    a, b = two_hosts.a, two_hosts.b
    before = files(b)
    with verify.client(two_hosts) as client:
        for source in (a, b):
            done = migrate(two_hosts, source)
            assert done.code == 0, done.errors
            assert judge(two_hosts, client, before) is two_hosts.other(source)
    # Without --live, too: it is stopped, and started there.
    words = ["pyploop", "migrate", "--config", container.PYPLOOP_CONFIG, "b", container.NAME]
    a.run(*words, timeout=moving.SECONDS)
    assert only_side(two_hosts) is b


@pytest.mark.parametrize("unknown", ["tree"], indirect=True)
def test_a_place_that_the_target_does_not_give_is_refused(two_hosts: Lab, unknown: str) -> None:
    forget(two_hosts.b, text=PLACES.replace('places = ["/srv"]', 'places = ["/var/ct"]'))
    done = migrate(two_hosts, two_hosts.a)
    assert done.code == 15
    assert "lies in no folder of [trust] places" in done.errors
    forget(two_hosts.b, text=PLACES.replace('live = ["10.', 'live = ["11.'))
    done = migrate(two_hosts, two_hosts.a)
    assert (done.code, "takes no memory from" in done.errors) == (15, True), done.errors
    words = ["pyploop", "migrate", "--config", container.PYPLOOP_CONFIG, "b", container.NAME]
    with pytest.raises(RuntimeError, match="ct is not configured on this host"):
        two_hosts.a.run(*words)
    assert only_side(two_hosts) is two_hosts.a
