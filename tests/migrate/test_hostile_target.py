# SPDX-License-Identifier: Apache-2.0
"""A target that is none: what it may do to its source, beside what is asked of it in
test_suspend_limit.py, unit/test_remote.py and fuzz/test_conversations.py."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import support
from anypair import SSH, Pair
from test_command import killed, pair  # noqa: F401 - a fixture
from test_suspend_limit import with_target

from pyploop.errors import MigrateError
from pyploop.migration.source import recover
from pyploop.report.events import Reporter
from pyploop.runtimes.config import HostConfig
from pyploop.undo.journal import Journal


@pytest.fixture
def trees(pair: Pair) -> Pair:  # noqa: F811
    """Both disks are folders."""
    support.needs("rsync")
    for host in (pair.a, pair.b):
        config = host / "migrate.toml"
        text, _, _ = config.read_text().partition("[[container.box.disk]]")
        text += "".join(f'[[container.box.tree]]\npath = "{host}/{n}"\n' for n in ("one", "two"))
        config.write_text(text)
    return pair


def goes_on(host: Pair) -> None:
    assert host.step(host.a, "status") == "running"
    assert host.step(host.b, "status") == "absent"
    assert not any((host.b / "images").iterdir()) and not any((host.a / "images").iterdir())
    assert not any((host.a / "state").glob("*.json"))


def test_the_limit_passes_while_a_request_is_not_answered(trees: Pair) -> None:
    """It ended with a traceback."""
    with_target(trees, "mute")
    done = trees.migrate(trees.a, "--live", "--suspend-limit", "2")
    assert done.returncode == 6, done.stderr
    assert "for more than 2 s (--suspend-limit)" in done.stderr
    assert "Traceback" not in done.stderr
    goes_on(trees)


def test_who_reads_no_messages_keeps_no_container_suspended(trees: Pair) -> None:
    """What the target told while it was suspended filled the pipe, and more."""
    with_target(trees, "chatter")
    words = ["migrate", "--config", str(trees.a / "migrate.toml"), "--live"]
    process = subprocess.Popen(
        [*support.pyploop_cmd(), *words, "--suspend-limit", "2", "other", "box"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=support.pyploop_env(),
    )
    try:
        told = trees.b / "migrate.toml.chattered"
        support.wait_until(told.exists, "it tells", 40)
        support.wait_until(lambda: trees.step(trees.a, "status") == "running", "it goes on")
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 6, errors
    assert said.count("x" * 4000) == 100
    goes_on(trees)


def test_a_signal_does_not_wait_for_an_answer_of_the_target(trees: Pair) -> None:
    """It waited for the end of a tree's pass to be told, --timeout and 30 s."""
    with_target(trees, "chatter")
    words = ["migrate", "--config", str(trees.a / "migrate.toml"), "--live"]
    process = subprocess.Popen(
        [*support.pyploop_cmd(), *words, "--suspend-limit", "0", "other", "box"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=support.pyploop_env(),
    )
    try:
        told = trees.b / "migrate.toml.chattered"
        support.wait_until(told.exists, "the end of a pass is waited for", 40)
        assert trees.step(trees.a, "status") == "suspended"
        process.terminate()
        support.wait_until(lambda: trees.step(trees.a, "status") == "running", "it goes on")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("kind", "how"), [("resume", "suspended"), ("start", "stopped")])
def test_a_doubt_says_how_the_container_stands_still(tmp_path: Path, kind: str, how: str) -> None:
    host = HostConfig(None, state_dir=str(tmp_path), ssh=("false",))
    log = Journal.create("migration", tmp_path, host="nowhere", migration="0" * 16)
    try:
        log.add({"kind": kind})
        with pytest.raises(MigrateError, match=f"it stays {how} here") as failed:
            recover.settled(host, log, "lost", Reporter(), patience=0)
        assert failed.value.exit_code == 4
    finally:
        log.close()


def test_a_target_that_cannot_be_asked_keeps_no_other_from_being_asked(
    pair: Pair,  # noqa: F811
) -> None:
    """`--recover` of all ended at the first migration whose target did not answer."""
    config = pair.a / "migrate.toml"
    with config.open("a") as f:
        f.write('[container.old]\nruntime = "command"\n')
        f.write('[container.old.commands]\nstatus = ["echo", "suspended"]\n')
        f.write(f'[[container.old.tree]]\npath = "{pair.a}/old"\n')
    deaf = SSH.replace("exec", '[ "$2" != deaf ] || exit 255\nexec')
    (pair.a / "ssh").write_text(deaf)
    killed(pair, "dump")
    (record,) = (pair.a / "state").glob("*.json")
    fields = json.loads(record.read_text())
    fields |= {"host": "deaf", "container": "old", "migration": "0" * 16, "stage": "asked"}
    fields |= {"entries": [], "started": 0}
    older = pair.a / "state/1.json"
    older.write_text(json.dumps(fields))
    older.chmod(0o600)
    done = subprocess.run(
        [*support.pyploop_cmd(), "migrate", "--config", config, "--recover"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=support.pyploop_env(),
    )
    assert done.returncode == 4, done.stderr
    assert "deaf cannot be asked whether the container runs there" in done.stderr
    assert "Rolled back: migration of box to other" in done.stdout
    assert list((pair.a / "state").glob("*.json")) == [older]
    older.unlink()
    pair.runs_only_on(pair.a)
