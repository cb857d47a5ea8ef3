# SPDX-License-Identifier: Apache-2.0
"""Whose words a recovery obeys: those of the configuration that the migration
began with, and of nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import support

from pyploop.errors import MigrateError
from pyploop.runtimes import config
from pyploop.system import private_folder
from pyploop.undo.journal import records

NOBODY = 65534
_BEGUN_AND_KILLED = """\
import os, sys
from pyploop.migration import commit_record, undo_kinds
from pyploop.migration.source import recover
from pyploop.runtimes import config
from pyploop.undo.journal import Journal
from pyploop.runtimes.registry import make_runtime
from pathlib import Path

host = config.load(sys.argv[1])
name, stage = [*sys.argv[2:], "box", recover.COPYING][:2]
runtime = make_runtime(host, None, name)
folder = commit_record.make_folder(Path(host.state_dir))
names = undo_kinds.naming(host, runtime)
log = Journal.create(f"migration of {name} to other", folder, migration=commit_record.new_id(),
    side="source", host="other", ssh_options=[], remove_area=True, stage=stage, **names)
log.add({"kind": "resume", **names})
os._exit(9)
"""


def config_in(folder: Path, state: Path, resume: str = "resumed") -> Path:
    """A configuration whose `resume` makes a file of that name in the folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "migrate.toml"
    path.write_text(
        f'state_dir = "{state}/state"\nlock_dir = "{state}/lock"\n[remote]\nssh = ["false"]\n'
        f'[container.box]\nruntime = "command"\ntree = {{path = "{state}/tree"}}\n'
        "[container.box.commands]\n"
        f'status = ["echo", "suspended"]\nresume = ["touch", "{folder}/{resume}"]\n'
    )
    return path


def begin(folder: Path, config: str, *which: str) -> None:
    """A migration whose orchestrator is killed while the container is suspended.
    which: container and stage, others than box that is being copied."""
    words = [sys.executable, "-c", _BEGUN_AND_KILLED, config, *which]
    done = subprocess.run(words, cwd=folder, env=support.pyploop_env(), check=False, timeout=60)
    assert done.returncode == 9


def recovered(folder: Path, config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*support.pyploop_cmd(), "migrate", "--config", str(config), "--recover"],
        cwd=folder,
        env=support.pyploop_env(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_relative_config_runs_nothing_of_the_folder_where_recover_is_called(
    tmp_path: Path,
) -> None:
    ours = config_in(tmp_path / "ours", tmp_path)
    config_in(tmp_path / "theirs", tmp_path, "pwned")
    begin(tmp_path / "ours", "migrate.toml")
    done = recovered(tmp_path / "theirs", ours)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "theirs") == ["migrate.toml"]
    assert (tmp_path / "ours/resumed").exists()
    assert records(tmp_path / "state") == []


def test_a_config_that_changed_since_undoes_nothing_until_it_is_named(tmp_path: Path) -> None:
    begun = config_in(tmp_path / "ours", tmp_path)
    other = config_in(tmp_path / "other", tmp_path, "unused")
    begin(tmp_path, "ours/migrate.toml")
    config_in(tmp_path / "ours", tmp_path, "changed")
    done = recovered(tmp_path, other)
    assert done.returncode == 8
    assert f"{begun} is not what it was when the migration of box began" in done.stderr
    assert f"--recover --config {begun}" in done.stderr
    assert len(records(tmp_path / "state")) == 1
    assert os.listdir(tmp_path / "ours") == ["migrate.toml"]
    assert recovered(tmp_path, begun).returncode == 0
    assert sorted(os.listdir(tmp_path / "ours")) == ["changed", "migrate.toml"]
    assert records(tmp_path / "state") == []


def test_an_unchanged_config_undoes_under_another_runs_config(tmp_path: Path) -> None:
    config_in(tmp_path / "ours", tmp_path)
    other = config_in(tmp_path / "other", tmp_path, "unused")
    begin(tmp_path, "ours/migrate.toml")
    done = recovered(tmp_path, other)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ours/resumed").exists()
    assert os.listdir(tmp_path / "other") == ["migrate.toml"]


def test_a_journal_that_names_its_config_relatively_is_refused(tmp_path: Path) -> None:
    """As an older pyploop wrote it."""
    ours = config_in(tmp_path / "ours", tmp_path)
    theirs = config_in(tmp_path / "theirs", tmp_path, "pwned")
    begin(tmp_path, "ours/migrate.toml")
    (record,) = records(tmp_path / "state")
    with private_folder.opened(record.path.parent) as where:
        text = record.path.read_text().replace(str(ours), "migrate.toml")
        private_folder.replace(where, record.path.name, text.encode())
    for given in (ours, theirs):
        done = recovered(tmp_path / "theirs", given)
        assert done.returncode == 8
        assert "a journal names its configuration 'migrate.toml'" in done.stderr
    assert os.listdir(tmp_path / "theirs") == ["migrate.toml"]
    assert len(records(tmp_path / "state")) == 1


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("another user's", "it belongs to user 65534"),
        ("writable for the group", r"others can write to it \(0664"),
        ("in a writable folder", r"others can write to .*/ours above it \(0777\)"),
        ("in another user's folder", "/ours above it belongs to user 65534"),
        ("another user's link", "user 65534 owns the link"),
        ("another user's link above", "user 65534 owns the link"),
        ("a fifo", "is not a regular file"),
    ],
)
def test_a_config_that_others_can_change_is_not_read(tmp_path: Path, how: str, why: str) -> None:
    support.needs("root")
    path = config_in(tmp_path / "ours", tmp_path)
    if how == "another user's":
        os.chown(path, NOBODY, NOBODY)
    elif how == "writable for the group":
        path.chmod(0o664)
    elif how == "in a writable folder":
        path.parent.chmod(0o777)
    elif how == "in another user's folder":
        os.chown(path.parent, NOBODY, NOBODY)
    elif how == "a fifo":
        path.unlink()
        os.mkfifo(path)
    else:
        link = tmp_path / "link"
        link.symlink_to(path if how == "another user's link" else path.parent)
        os.lchown(link, NOBODY, NOBODY)
        path = link if how == "another user's link" else link / "migrate.toml"
    with pytest.raises(MigrateError, match=why) as refusal:
        config.load(str(path))
    assert refusal.value.exit_code == 1


def test_links_of_our_own_lead_to_a_config(tmp_path: Path) -> None:
    path = config_in(tmp_path / "ours", tmp_path)
    (tmp_path / "link.toml").symlink_to("ours/migrate.toml")
    host = config.load(str(tmp_path / "link.toml"))
    assert (host.path, len(host.digest)) == (str(path), 64)


@pytest.mark.parametrize("stages", [("asked", "copying"), ("asked", "asked")])
def test_a_target_that_tells_nothing_keeps_no_other_container_suspended(
    tmp_path: Path, stages: tuple[str, str]
) -> None:
    """It may have been another one's target."""
    ours = config_in(tmp_path / "ours", tmp_path)
    text = ours.read_text()
    container = text[text.index("[container.box]") :]
    other = container.replace("box", "one").replace(f"{tmp_path}/tree", f"{tmp_path}/other")
    ours.write_text(text + other.replace("resumed", "one-resumed"))
    for name, stage in zip(("one", "box"), stages, strict=True):
        begin(tmp_path, str(ours), name, stage)
    done = recovered(tmp_path, ours)
    assert done.returncode == 4, done.stderr
    assert not (tmp_path / "ours/one-resumed").exists()
    assert (tmp_path / "ours/resumed").exists() == ("copying" in stages)
    for name, stage in zip(("one", "box"), stages, strict=True):
        asked = f"migration of {name} to other; other cannot be asked whether the container"
        assert (asked in done.stderr) == (stage == "asked"), done.stderr
