# SPDX-License-Identifier: Apache-2.0
"""`runtime = "command"`: each step a command of the user's; here with two disks,
which must be frozen at the same moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from anypair import HERE, SSH, Pair, any_pair
from schema_check import check_lines

from pyploop.migration.source import host_rates


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with any_pair(tmp_path) as made:
        yield made


def test_a_container_with_two_disks_moves_live_and_back(pair: Pair) -> None:
    done = pair.migrate(pair.a, "--live", "--trace", str(pair.a.parent / "trace.json"))
    assert done.returncode == 0, done.stderr
    pair.runs_only_on(pair.b)
    options = os.fsdecode(Path("/proc/self/mounts").read_bytes())
    assert "noatime" in next(x for x in options.splitlines() if f"{pair.b}/one" in x)
    trace = json.loads((pair.a.parent / "trace.json").read_text())
    spans = {(e["pid"], e["name"]) for e in trace["traceEvents"] if e["ph"] == "X"}
    assert {(1, "suspend"), (1, "dump"), (1, "restore"), (2, "committed"), (2, "running")} <= spans
    done = pair.migrate(pair.b, "--live", "-t", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert {"moved", "target", "summary"} <= check_lines(done.stdout)
    assert "Total" in done.stderr
    pair.runs_only_on(pair.a)


def test_it_moves_stopped(pair: Pair) -> None:
    done = pair.migrate(pair.a)
    assert done.returncode == 0, done.stderr
    pair.runs_only_on(pair.b)


@pytest.mark.parametrize(
    ("host", "step", "code"),
    [
        ("a", "suspend", 8),
        ("a", "dump", 8),
        ("b", "undump", 7),
        ("b", "resume_restored", 7),
        ("b", "status", 10),
    ],
)
def test_a_step_that_fails_leaves_it_where_it_was(
    pair: Pair, host: str, step: str, code: int
) -> None:
    fails = pair.a.parent / host / f"{step}-fails"
    fails.touch()
    done = pair.migrate(pair.a, "--live")
    fails.unlink()
    assert done.returncode == code, done.stderr
    assert f"{step} was made to fail" in done.stderr
    pair.runs_only_on(pair.a)


def reached(host: Path, step: str) -> None:
    support.wait_until((host / f"{step}-reached").exists, f"{step} is reached")
    (host / f"{step}-reached").unlink()


def test_signals_that_come_too_late_change_nothing_of_what_is_told(pair: Pair) -> None:
    """One while the source is ended, one when only the connection is left."""
    lingers = pair.a / "lingers"
    lingers.touch()
    asked = 'case " $* " in *" -G "*) exit 255 ;; esac\n'  # which ciphers it would use
    script = f"{SSH.replace('exec ', '')}while [ -e {lingers} ]; do sleep 0.01; done\n"
    (pair.a / "ssh").write_text(script.replace("\n", f"\n{asked}", 1))
    gate = pair.a / "kill-waits"
    gate.touch()
    with pair.moving(pair.a) as moving:
        reached(pair.a, "kill")
        moving.send_signal(signal.SIGINT)
        gate.unlink()
        lock = pair.b / "lock/box.lck"
        support.wait_until(lambda: not lock.exists(), "the agent ends")
        moving.send_signal(signal.SIGTERM)
        lingers.unlink()
        said = moving.communicate(timeout=20)[0]
    assert moving.returncode == 0, said
    assert "Ignoring SIGTERM: the container has already moved" in said and "undone" not in said
    pair.runs_only_on(pair.b)


def killed(pair: Pair, step: str) -> None:
    """A migration from a whose orchestrator is killed there."""
    gate = pair.a / f"{step}-waits"
    gate.touch()
    with pair.moving(pair.a) as moving:
        reached(pair.a, step)
        moving.kill()
        gate.unlink()
        moving.wait(20)
    lock = pair.b / "lock/box.lck"
    support.wait_until(lambda: not lock.exists(), "the agent ends")


@pytest.mark.parametrize(("step", "runs"), [("dump", "a"), ("kill", "b")])
def test_recover_needs_no_target_when_it_is_known_where_the_container_runs(
    pair: Pair, step: str, runs: str
) -> None:
    killed(pair, step)
    (pair.a / "ssh").write_text("#!/bin/sh\nexit 255\n")
    done = pair.migrate(pair.a, "--recover")
    assert done.returncode == 0, done.stderr
    assert "may be left on other" in done.stdout
    pair.runs_only_on(pair.a if runs == "a" else pair.b)
    assert not [p for p in (pair.a / "state").iterdir() if p.suffix != host_rates.SUFFIX]


def test_recover_leaves_nothing_when_a_signal_comes_as_the_target_is_asked(pair: Pair) -> None:
    killed(pair, "dump")
    asked = pair.a / "asked"
    (pair.a / "ssh").write_text(f"#!/bin/sh\ntouch {asked}\nexec sleep 60\n")
    with pair.moving(pair.a, "--recover") as recovering:
        support.wait_until(asked.exists, "the target is asked")
        recovering.send_signal(signal.SIGTERM)
        said = recovering.communicate(timeout=5)[0]
    assert recovering.returncode == -signal.SIGTERM, said
    assert not [p for p in (pair.a / "state").iterdir() if p.suffix != host_rates.SUFFIX]
    asked.unlink()
    pair.runs_only_on(pair.a)


def test_a_missing_command_is_named_before_anything_starts(pair: Pair) -> None:
    config = pair.b / "migrate.toml"
    lines = [x for x in config.read_text().splitlines() if not x.startswith("undump")]
    config.write_text("\n".join(lines))
    done = pair.migrate(pair.a, "--live")
    assert (done.returncode, "lacks undump" in done.stderr) == (1, True), done.stderr
    pair.runs_only_on(pair.a)


@pytest.fixture
def elsewhere(pair: Pair) -> Iterator[Path]:
    """On b the second disk's image has a file system of its own, and a tree, which
    a has, too, comes into folders that are not there yet."""
    support.needs("rsync")
    point = pair.b / "other"
    for host, image, tree in ((pair.a, "two.img", "tree"), (pair.b, "other/two.img", "a/b/tree")):
        text = (host / "migrate.toml").read_text().replace(f"{host}/two.img", f"{host}/{image}")
        text += f'[[container.box.tree]]\npath = "{host}/{tree}"\n'
        (host / "migrate.toml").write_text(text)
    for folder in (pair.a / "one", pair.a / "two", pair.a / "tree"):
        folder.mkdir(exist_ok=True)
        (folder / "data").write_bytes(os.urandom(2 << 20))
    with support.tmpfs(point, 64 << 20):
        try:
            yield point
        finally:
            pair.step(pair.b, "kill")
            subprocess.run(["umount", pair.b / "two"], capture_output=True, check=False)


def test_what_is_kept_lies_on_the_file_system_where_it_belongs(pair: Pair, elsewhere: Path) -> None:
    fails = pair.b / "undump-fails"
    fails.touch()
    done = pair.migrate(pair.a, "--live", "--keep-dst")
    assert done.returncode == 7, done.stderr
    assert "disk 0" in done.stdout and "disk 1" in done.stdout and "tree 0" in done.stdout
    fails.unlink()
    # In folders that were there before.
    assert not (pair.b / "a").exists()
    (two,) = elsewhere.iterdir()
    (one,) = (p for p in pair.b.glob(".*.pyploop-kept") if p.is_file())
    (tree,) = (p for p in pair.b.glob(".*.pyploop-kept") if p.is_dir())
    inodes = [p.stat().st_ino for p in (one, two, tree / "data")]
    data = [(pair.a / d / "data").read_bytes() for d in ("one", "two", "tree")]
    done = pair.migrate(pair.a, "--live")
    assert done.returncode == 0, done.stderr
    images = [pair.b / "one.img", elsewhere / "two.img", pair.b / "a/b/tree/data"]
    assert [p.stat().st_ino for p in images] == inodes
    assert [(pair.b / d / "data").read_bytes() for d in ("one", "two", "a/b/tree")] == data
    assert not [p for p in (*pair.b.iterdir(), *elsewhere.iterdir()) if "kept" in p.name]
    assert not any((pair.a / "tree").iterdir())
    (pair.a / "tree").rmdir()
    pair.runs_only_on(pair.b)


OLDER = """
import sys
from pyploop.migration.target import agent
from pyploop.cli.main import main

check, dump = agent.Agent._check, agent.Agent._dump
agent.Agent._check = lambda self, **args: {"disks": check(self, **args)["disks"]}
agent.Agent._dump = lambda self, channel: dump(self, channel)
sys.exit(main())
"""
"""An agent from before there were rounds of memory, and trees."""


def older_agent(pair: Pair) -> None:
    for host, peer in ((pair.a, pair.b), (pair.b, pair.a)):
        agent = [sys.executable, "-c", OLDER, "agent", "--config", str(peer / "migrate.toml")]
        agent += ["--source", host.name]
        lines = (host / "migrate.toml").read_text().splitlines()
        lines = [f"agent = {json.dumps(agent)}" if x.startswith("agent =") else x for x in lines]
        (host / "migrate.toml").write_text("\n".join(lines) + "\n")


def test_an_older_agent_of_the_same_major_version_takes_a_container(pair: Pair) -> None:
    older_agent(pair)
    config = pair.a / "migrate.toml"
    step = [sys.executable, str(HERE / "anyhost.py"), str(pair.a), "pre_dump"]
    commands = "[container.box.commands]\n"
    config.write_text(
        config.read_text().replace(commands, f"{commands}pre_dump = {json.dumps(step)}\n")
    )
    done = pair.migrate(pair.a, "--live")
    assert done.returncode == 0, done.stderr
    assert "the target's pyploop is too old" in done.stdout
    pair.runs_only_on(pair.b)


def test_an_older_agent_is_named_before_anything_starts_when_there_is_a_tree(
    pair: Pair, elsewhere: Path
) -> None:
    older_agent(pair)
    done = pair.migrate(pair.a, "--live")
    assert done.returncode == 4, done.stderr
    assert "too old to receive directories" in done.stderr
    assert not any(elsewhere.iterdir())
    assert not (pair.b / "one.img").exists()
    assert pair.step(pair.a, "status") == "running"


def with_trees(pair: Pair, number: int) -> None:
    support.needs("rsync")
    for host in (pair.a, pair.b):
        with (host / "migrate.toml").open("a") as f:
            f.writelines(
                f'[[container.box.tree]]\npath = "{host}/tree/{n}"\n' for n in range(number)
            )
    for n in range(number):
        (pair.a / "tree" / str(n)).mkdir(parents=True)
        (pair.a / "tree" / str(n) / "file").write_text(str(n))


def test_trees_that_need_more_channels_than_an_older_agent_has_move(pair: Pair) -> None:
    """Three channels each at least; an older agent has 63 in all."""
    with_trees(pair, 22)
    done = pair.migrate(pair.a, "--live")
    assert done.returncode == 0, done.stderr
    for n in range(22):
        assert (pair.b / "tree" / str(n) / "file").read_text() == str(n)
    shutil.rmtree(pair.a / "tree", ignore_errors=True)
    shutil.rmtree(pair.b / "tree")
    pair.runs_only_on(pair.b)


def test_more_trees_than_a_connection_has_channels_for_are_refused_at_once(pair: Pair) -> None:
    with_trees(pair, 127)
    done = pair.migrate(pair.a, "--live")
    assert done.returncode == 6, done.stderr
    assert "2 disks and 127 trees are too many" in done.stderr
    shutil.rmtree(pair.a / "tree")
    pair.runs_only_on(pair.a)


def test_output_that_nobody_can_have_changes_nothing_of_what_is_told(pair: Pair) -> None:
    words = ["migrate", "--config", str(pair.a / "migrate.toml"), "--live", "-t"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*support.pyploop_cmd(), *words, "--json", "/dev/full", "other", "box"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            env=support.pyploop_env(),
        )
    assert done.returncode == 0, done.stderr
    assert (
        "-t: cannot print the table: No space left on device; the container has moved"
        in done.stderr
    )
    assert "--json /dev/full: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and "undone" not in done.stderr
    pair.runs_only_on(pair.b)
