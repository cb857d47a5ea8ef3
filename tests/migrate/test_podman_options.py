# SPDX-License-Identifier: Apache-2.0
"""What a user of Podman expects to go along with a container, and what does not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from lab import container, hosts, podman
from lab.hosts import Host, Lab
from podmen import WORD, debris, only_side

ISOLATED = ("--network", "none")
FOREVER = "while sleep 1; do :; done"


@pytest.fixture(scope="module")
def pair() -> Iterator[Lab]:
    podman.check()
    with hosts.lab() as lab, podman.hosts_with_podman(lab) as guest:
        podman.import_image(lab.a, guest)
        yield lab


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> None:
    """Not after each test: the lab has its own (`pair`)."""


@pytest.fixture
def both(pair: Lab) -> Iterator[Lab]:
    """Two hosts without containers, the first with the image."""
    yield pair
    for host in (pair.a, pair.b):
        podman.remove(host)
    pair.b.run("podman", "rmi", "--all", "--force")


def sent_by(host: Host) -> int:
    """Bytes that it has sent to other hosts."""
    (link,) = json.loads(host.run("ip", "-s", "-j", "link", "show", "up0"))
    return int(link["stats64"]["tx"]["bytes"])


def commit(host: Host, below: str, name: str, script: str) -> None:
    """An image of one more layer."""
    words = ("podman", "run", "--name", "layer", *ISOLATED, *podman.ULIMITS, below)
    host.run(*words, "sh", "-c", script)
    host.run("podman", "commit", "--quiet", "layer", name)
    host.run("podman", "rm", "layer")


BASE = 24 << 20


def test_only_the_layers_of_an_image_that_the_target_lacks_go(both: Lab) -> None:
    a, b = both.a, both.b
    commit(a, podman.IMAGE, "base:1", f"dd if=/dev/urandom of=/big bs=1M count={BASE >> 20}")
    commit(a, "base:1", podman.IMAGE, "echo top >/top")
    a.run("podman", "tag", podman.IMAGE, "other:1", "taken:1")
    image = podman.inspect(a, "image", podman.IMAGE)
    # The target knows the lower layers from another image, and has another one of that name.
    a.run("podman", "save", "--quiet", "--output", a.folder / "base.tar", "base:1")
    try:
        b.run("podman", "load", "--quiet", "--input", a.folder / "base.tar")
        b.run("podman", "tag", "base:1", "taken:1")
        taken = podman.inspect(b, "image", "taken:1")["Id"]
        podman.start(a, *ISOLATED, "--stop-timeout=0", script=FOREVER)
        names = podman.inspect(b, "image", "taken:1")["RepoTags"]
        already = sent_by(a)
        # Not live: the wire is not probed then.
        a.run("pyploop", "migrate", "--config", container.PYPLOOP_CONFIG, "b", WORD)
        assert sent_by(a) - already < BASE / 50
        assert only_side(both) is b
        came = podman.inspect(b, "image", podman.IMAGE)
        for key in ("Id", "RootFS", "Config", "History"):
            assert came[key] == image[key], key
        assert podman.inspect(b)["ImageName"] == f"localhost/{podman.IMAGE}"
        assert sorted(came["RepoTags"]) == ["localhost/guest:1", "localhost/other:1"]
        assert podman.inspect(b, "image", "taken:1")["Id"] == taken
        assert podman.inspect(b, "image", "taken:1")["RepoTags"] == names
        assert b.run("podman", "exec", podman.NAME, "cat", "/top") == "top\n"
        assert not debris(a, runs_here=False)
    finally:
        os.unlink(a.folder / "base.tar")
        a.run("podman", "untag", "taken:1", "taken:1", check=False)
