# SPDX-License-Identifier: Apache-2.0
"""Checks of the hosts' Podman itself, each by its name, before anything starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import podmen
import pytest
from lab import container, podman
from lab.hosts import Lab
from podmen import WORD, migrate

FOREVER = "while sleep 1; do :; done"
OTHER = """#!/bin/sh
case "$*" in
info*) {podman} "$@" | sed '
    s/"rootless": false/"rootless": true/
    s/"Version": "[0-9.]*"/"Version": "3.0.1"/
    s/"graphDriverName": "overlay"/"graphDriverName": "vfs"/
    s/"graphRoot": "/&\\/elsewhere/
    s/"cgroupManager": "/&other-/'
    exit ;;
esac
exec {podman} "$@"
"""
"""A Podman that says of itself that it is old, rootless and set up otherwise."""


pair, no_descriptor_is_left = podmen.pair_with_image, podmen.no_descriptor_is_left


@pytest.fixture(autouse=True)
def empty(pair: Lab) -> Iterator[None]:
    yield
    podman.remove_containers(pair.a)


def failed(pair: Lab) -> set[tuple[str, str]]:
    """(check, host) of what fails now; nothing is started."""
    done = migrate(pair, pair.a)
    assert "the migration has changed nothing on either host" in done.errors, done.errors
    assert not podman.states(pair.b)
    return {(e["check"], e["host"]) for e in done.events if e["event"] == "check-failed"}


def test_a_podman_of_another_kind_is_named(pair: Lab) -> None:
    a, b = pair.a, pair.b
    podman.start(a, *podman.LINK, script=FOREVER)
    script, nft = b.folder / "bin/podman", shutil.which("nft")
    script.write_text(OTHER.format(podman=shutil.which("podman")))
    script.chmod(0o755)
    b.outside("/srv/nothing").write_text("")
    b.run("mount", "--bind", "/srv/nothing", str(nft))
    try:
        names = {name for name, host in failed(pair) if host == "b"}
        assert names == {
            *("podman-rootless", "podman-version", "podman-storage", "podman-cgroups"),
            "podman-nft",
        }
    finally:
        b.run("umount", str(nft))
        b.outside("/srv/nothing").unlink()
        script.unlink()
    config = b.outside(container.PYPLOOP_CONFIG)
    text = config.read_text()
    config.write_text(f'{text}\n[podman]\ncommand = "/no/podman"\n')
    try:
        assert failed(pair) == {("podman", "b")}
    finally:
        config.write_text(text)
    a.run("podman", "stop", "--time=0", podman.NAME)
    words = ["pyploop", "migrate", "--check-only", "--config", container.PYPLOOP_CONFIG]
    with pytest.raises(RuntimeError, match=r"is exited: .*\(check podman-running\)"):
        a.run(*words, "b", WORD)
