# SPDX-License-Identifier: Apache-2.0
"""A migration goes over several connections, of which some do not come about, or die."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anypair
import pytest
import support
from anypair import Pair, any_pair
from support import MIB, wait_until
from test_command import with_trees

HERE = Path(__file__).parent
ROUND_TRIP = 0.06
TAKES_PART = re.compile(r"Lane \d+ to other takes part in the copy of disk 0")


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Its first disk has more data than a lane moves while another one is opened."""
    monkeypatch.setitem(anypair.SIZES, "ext4", 200 * MIB)
    with any_pair(tmp_path) as made:
        (made.a / "one" / "data").write_bytes(os.urandom(120 * MIB))
        os.sync()
        yield made


def with_ssh(pair: Pair, words: list[str]) -> None:
    config = pair.a / "migrate.toml"
    lines = config.read_text().splitlines()
    lines = [f"ssh = {json.dumps(words)}" if x.startswith("ssh =") else x for x in lines]
    config.write_text("\n".join(lines) + "\n")


def over_a_long_line(pair: Pair) -> Path:
    """Returns the folder that has a file for each connection."""
    folder = pair.a.parent / "connections"
    folder.mkdir()
    with_ssh(pair, [sys.executable, str(HERE / "slow_ssh.py"), str(folder), str(ROUND_TRIP)])
    return folder


def proven(lines: list[str]) -> int:
    """Disks whose proofs were compared."""
    return sum("Proof:" in text for text in lines)


def test_a_migration_whose_lanes_do_not_come_about_goes_over_one_connection(pair: Pair) -> None:
    once = pair.a / "ssh"
    once.write_text(
        '#!/bin/sh\ncase " $* " in *" -G "*) exit 1; esac\n'
        f'if ! mkdir {pair.a.parent}/once; then echo "only one" >&2; exit 255; fi\n'
        'while [ "$1" != -- ]; do shift; done\nexec sh -c "$3"\n'
    )
    done = pair.migrate(pair.a, "--live", "-vvvv")
    assert done.returncode == 0, done.stderr
    assert "did not come about" in done.stdout and "only one" in done.stdout
    assert "goes over lane" not in done.stdout
    assert proven(done.stdout.splitlines()) == 2
    pair.runs_only_on(pair.b)


def test_each_disk_goes_over_a_lane_and_its_proof_is_compared(pair: Pair) -> None:
    log = pair.a.parent / "events"
    done = pair.migrate(pair.a, "--live", "-vvvv", "--json", str(log), "--compress", "zstd")
    assert done.returncode == 0, done.stderr
    for disk in (0, 1):
        assert re.search(rf"Disk {disk} goes over lane \d", done.stdout)
    assert proven(done.stdout.splitlines()) == 2
    assert "came compressed" in done.stdout
    pair.runs_only_on(pair.b)


def test_lanes_that_die_on_a_long_line_are_replaced_and_nothing_is_missing(pair: Pair) -> None:
    folder = over_a_long_line(pair)
    log = pair.a.parent / "events"
    (pair.a / "pages").write_bytes(os.urandom(30 * MIB))
    words = ["migrate", "--config", str(pair.a / "migrate.toml"), "--live", "-vvvv"]
    process = subprocess.Popen(
        [*support.pyploop_cmd(), *words, "--json", str(log), "--bwlimit", "30M", "other", "box"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=support.pyploop_env(),
    )
    try:
        wait_until(lambda: _copies(log) and len(list(folder.iterdir())) > 5, "it copies", 60)
        for _ in range(3):
            time.sleep(0.3)
            _kill_last(folder)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert TAKES_PART.search(said), said
    assert "was lost" in said or "did not come about" in said, said
    assert "takes part in the copy of memory and directories" in said
    assert proven(said.splitlines()) == 2
    (pair.a / "pages").unlink()
    pair.runs_only_on(pair.b)


def test_directories_go_over_several_lanes_and_those_that_find_no_room_over_none(
    pair: Pair,
) -> None:
    """In the second connection, where six channels at once are for directories."""
    number = 10
    with_trees(pair, number)
    (pair.a / "tree" / "0" / "large").write_bytes(os.urandom(30 * MIB))
    large = hashlib.sha256((pair.a / "tree" / "0" / "large").read_bytes()).digest()
    over_a_long_line(pair)
    done = pair.migrate(pair.a, "--live", "-vvvv")
    assert done.returncode == 0, done.stderr
    assert "takes part in the copy of memory and directories" in done.stdout
    for n in range(number):
        assert (pair.b / "tree" / str(n) / "file").read_text() == str(n)
    came = (pair.b / "tree" / "0" / "large").read_bytes()
    assert hashlib.sha256(came).digest() == large
    shutil.rmtree(pair.a / "tree", ignore_errors=True)
    shutil.rmtree(pair.b / "tree")
    pair.runs_only_on(pair.b)


def _copies(log: Path) -> bool:
    text = log.read_text() if log.exists() else ""
    events = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return any(e["event"] == "phase" and e["phase"] == "first pass" for e in events)


def _kill_last(folder: Path) -> None:
    """A connection that was opened late: a lane that others can do without."""
    newest = sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    for mark in newest:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(mark.name), signal.SIGKILL)
            return
    pytest.fail("no connection is there")
