# SPDX-License-Identifier: Apache-2.0
"""What becomes of the root and the binds of a container that no configuration has."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import config
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.found_config import accepted, keys_of, toml, with_container
from pyploop.runtimes.runc import discovered


def bind(source: Path | str, *options: str) -> dict[str, Any]:
    return {"destination": "/x", "type": "bind", "source": str(source), "options": [*options]}


@pytest.fixture
def runc_root(tmp_path: Path) -> Path:
    """A state folder of runc, with a container `ct` that has binds of each kind."""
    for name in ("bundle/rootfs/in", "data/below", "given", "state"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    mounts = [
        bind(tmp_path / "data/below", "rbind"),
        bind(tmp_path / "data", "rbind", "rw"),
        bind(tmp_path / "given", "rbind", "ro"),
        bind(tmp_path / "file", "bind"),
        bind("rootfs/in", "bind"),
        bind("/etc/ssl", "rbind"),
        bind("/tmp", "rbind"),
        {"destination": "/proc", "type": "proc", "source": "proc"},
    ]
    spec = {"root": {"path": "rootfs"}, "mounts": mounts, "linux": {"cgroupsPath": "/web"}}
    (tmp_path / "bundle/config.json").write_text(json.dumps(spec))
    state(tmp_path / "state", "ct", [f"bundle={tmp_path}/bundle"])
    return tmp_path / "state"


def state(root: Path, name: str, labels: list[str], **more: Any) -> None:
    (root / name).mkdir()
    (root / name / "state.json").write_text(json.dumps({"config": {"labels": labels, **more}}))


def test_folders_become_trees_and_what_the_container_cannot_own_is_external(
    runc_root: Path,
) -> None:
    top = runc_root.parent
    assert discovered.table(str(runc_root), "ct") == {
        "bundle": f"{top}/bundle",
        "cgroup": "/web",
        "external": [f"{top}/given", f"{top}/file", "/etc/ssl", "/tmp"],
        "tree": [{"path": f"{top}/bundle/rootfs"}, {"path": f"{top}/data"}],
    }


@pytest.mark.parametrize("shared", ["data", "data/below", "."])
def test_a_folder_that_another_container_uses_too_is_not_taken(
    runc_root: Path, shared: str
) -> None:
    """It would be removed here afterwards."""
    source = str(runc_root.parent / shared)
    state(runc_root, "other", [], rootfs="/elsewhere", mounts=[{"source": source}])
    with pytest.raises(MigrateError, match="is used by the container other, too") as e:
        discovered.table(str(runc_root), "ct")
    assert e.value.exit_code == VzExitCode.BAD_CONFIG


def test_a_state_that_names_no_bundle_is_said(runc_root: Path) -> None:
    state(runc_root, "odd", ["x=y"])
    with pytest.raises(MigrateError, match="does not say where the bundle of odd is"):
        discovered.table(str(runc_root), "odd")
    assert not discovered.knows(str(runc_root), "none")


def test_the_lines_for_the_file_make_the_same_container(runc_root: Path) -> None:
    host = with_container(HostConfig(), "ct", discovered.table(str(runc_root), "ct"))
    found = host.containers["ct"]
    for name in ("ct", "a.b-c_d"):
        text = "\n".join(toml(name, keys_of(found)))
        again = config.parse(tomllib.loads(text), "said").containers[name]
        assert keys_of(again) == keys_of(found)


@pytest.mark.parametrize(
    ("told", "code", "words"),
    [
        ({"bundle": "/etc/x", "tree": [{"path": "/srv/x"}]}, 15, "the bundle /etc/x of ct"),
        ({"bundle": "/srv/x", "tree": [{"path": "/etc"}]}, 15, "the tree /etc of ct"),
        ({"bundle": "/srv/../etc", "tree": [{"path": "/srv/x"}]}, 15, "lies in no folder"),
        ({"bundle": "/srv/x", "netns": "/proc/1/ns/net"}, 15, "not in /run/netns"),
        ({"bundle": "/srv/x", "netns": "/run/netns/../x"}, 15, "not in /run/netns"),
        ({"bundle": 3}, 1, "must be a string"),
        ({"disk": [3]}, 1, "must be a table"),
        ({"disk": [{"image": "/srv/i", "mount": "/root"}]}, 15, "mounted on /root"),
        ({"tree": "x"}, 1, "must be a table"),
    ],
)
def test_a_source_cannot_place_a_container_elsewhere(told: Any, code: int, words: str) -> None:
    host = HostConfig(trusted_places=("/srv",))
    with pytest.raises(MigrateError, match=words) as e:
        accepted(host, "ct", told, lambda _: {})
    assert e.value.exit_code == code


def test_commands_and_policy_of_a_source_are_not_taken() -> None:
    host = HostConfig(trusted_places=("/srv",))
    told = {"bundle": "/srv/x", "tree": [{"path": "/srv/y"}], "netns": "/run/netns/x"}
    evil = {"link_up": ["/bin/evil"], "policy": {"private": False}, "commands": {"stop": ["x"]}}
    made = accepted(host, "ct", told | evil, lambda _: {"link_up": ["ip", "x"]}).containers["ct"]
    assert (made.link_up, made.commands, made.policy) == (("ip", "x"), {}, host.policy)
