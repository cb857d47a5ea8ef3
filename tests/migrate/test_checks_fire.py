# SPDX-License-Identifier: Apache-2.0
"""Checks that find what is wrong with two hosts and a runc container, each by its name, before
anything starts.  Many things are wrong at once, so that a few migrations make all of them fire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from lab import container, hosts, requirements
from lab.hosts import Host
from moving import migrate, only_side
from test_runc_contents import BUNDLE, SOURCE, Scene, bind


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A container that each test leaves as it was."""
    requirements.check()
    support.needs("gcc", "rsync", "setarch")
    tool = tmp_path_factory.mktemp("tool") / "tool"
    support.run("gcc", "-O1", "-Wall", "-Werror", "-static", "-o", tool, SOURCE)
    with hosts.lab() as lab:
        one = Scene(lab, tool)
        one.start()
        yield one
        one.remove()


def failed(scene: Scene) -> set[tuple[str, str]]:
    """(check, host) of what fails now; nothing is started."""
    done = migrate(scene.lab, scene.lab.a)
    assert "the migration has changed nothing on either host" in done.errors, done.errors
    assert only_side(scene.lab) is scene.lab.a
    return {(e["check"], e["host"]) for e in done.events if e["event"] == "check-failed"}


class Changed:
    """A file of a host with another text, until the end."""

    def __init__(self, host: Host, path: str | Path, old: str, new: str) -> None:
        self.path = host.outside(path)
        self.text = self.path.read_text()
        assert old in self.text, (old, self.text)
        self.path.write_text(self.text.replace(old, new, 1))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.path.write_text(self.text)


def config_json(host: Host, **changes: Any) -> Changed:
    path = BUNDLE / "config.json"
    text = host.outside(path).read_text()
    return Changed(host, path, text, json.dumps({**json.loads(text), **changes}))


def test_what_is_wrong_on_the_source_is_named(scene: Scene) -> None:
    a = scene.lab.a
    config = json.loads(a.outside(BUNDLE / "config.json").read_text())
    process = {**config["process"], "terminal": True}
    linux = config["linux"]
    others = [n for n in linux["namespaces"] if n["type"] != "network"]
    mounts = [*config["mounts"], bind("/srv/elsewhere", "/elsewhere")]
    a.outside("/srv/elsewhere").mkdir()
    a.run("mkdir", "/srv/small")
    a.run("mount", "-t", "tmpfs", "-o", "size=16k", "none", "/srv/small")
    programs = 'images_dir = "/srv/small"\n[rsync]\ncommand = "/no/rsync"\n'
    try:
        toml = Changed(a, container.PYPLOOP_CONFIG, "", programs)
        with (
            toml,
            config_json(a, process=process, mounts=mounts, linux={**linux, "namespaces": others}),
        ):
            assert failed(scene) == {
                *(("config-host", ""), ("network-namespace", ""), ("mounts", "")),
                *(("images-room", ""), ("tree", "")),
            }
    finally:
        a.run("umount", "/srv/small")
        a.run("rmdir", "/srv/small", "/srv/elsewhere")
    with Changed(a, BUNDLE / "config.json", "{", "no JSON {"):
        assert failed(scene) == {("config-json", "")}
    other = a.outside(container.ROOTFS / "data/other")
    other.mkdir()
    with config_json(a, root={"path": str(container.ROOTFS / "data/other")}):
        assert ("root", "") in failed(scene)
    other.rmdir()


def test_what_is_wrong_on_the_target_is_named(scene: Scene) -> None:
    a, b = scene.lab.a, scene.lab.b
    b.outside("/srv/cpuinfo").write_text("flags : fpu\n")
    b.run("mount", "--bind", "/srv/cpuinfo", "/proc/cpuinfo")
    agent = Changed(a, container.PYPLOOP_CONFIG, 'agent = ["', 'agent = ["setarch", "i686", "')
    policy = Changed(b, container.PYPLOOP_CONFIG, "", "policy = { capabilities = [] }\n")
    try:
        with agent, policy:
            found = failed(scene)
    finally:
        b.run("umount", "/proc/cpuinfo")
        b.outside("/srv/cpuinfo").unlink()
    assert found == {("machine", "b"), ("cpu", "b"), ("policy", "b")}


def test_other_places_and_no_way_to_the_target_are_named(scene: Scene) -> None:
    a, b = scene.lab.a, scene.lab.b
    with Changed(a, container.PYPLOOP_CONFIG, 'agent = ["pyploop', 'agent = ["/no/pyploop'):
        assert failed(scene) == {("connection", "")}
    more = f'[[container.{container.NAME}.tree]]\npath = "/srv/more"\n'
    text = b.outside(container.PYPLOOP_CONFIG).read_text()
    b.outside(container.PYPLOOP_CONFIG).write_text(text + more)
    try:
        assert ("same-places", "b") in failed(scene)
    finally:
        b.outside(container.PYPLOOP_CONFIG).write_text(text)


def test_what_is_in_the_way_on_the_target_is_named(scene: Scene) -> None:
    b = scene.lab.b
    root = b.outside(container.ROOTFS)
    root.mkdir(parents=True)
    (root / "file").write_text("of another container")
    root.parent.chmod(0o777)
    try:
        assert failed(scene) == {("private", "b"), ("tree-room", "b")}
    finally:
        b.run("rm", "-rf", BUNDLE)
