# SPDX-License-Identifier: Apache-2.0
"""Containers of Podman move, with their image, their root and their volumes, and Podman knows
them afterwards as if they had always been there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from lab import hosts, podman, verify
from lab.hosts import Lab
from podmen import judge, migrate

MIGRATIONS = int(os.environ.get("PYPLOOP_MIGRATIONS", "4"))
"""Back and forth."""


@pytest.fixture
def pair() -> Iterator[Lab]:
    podman.check()
    with hosts.lab() as lab:
        yield lab


def test_a_container_of_podman_goes_back_and_forth_and_podman_knows_it(pair: Lab) -> None:
    with podman.running(pair, "--label", "kind=guest", "--restart=always"):
        before = podman.inspect(pair.a)
        (image,) = podman.images(pair.a)
        here = pair.a
        with verify.client(pair) as client:
            for turn in range(MIGRATIONS):
                client.load(10 if turn % 2 else 0)
                client.mark()
                done = migrate(pair, here)
                assert done.code == 0, done.errors
                here = pair.other(here)
                assert judge(pair, client) is here
                now = podman.inspect(here)
                for key in ("Id", "Name", "Image", "ImageName", "Config", "OCIRuntime"):
                    assert now[key] == before[key], key
                assert now["HostConfig"] == before["HostConfig"]
                assert podman.images(here) == [image]
