# SPDX-License-Identifier: Apache-2.0
"""The lab itself: a container really moves in it, and its judges see a loss."""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from lab import container, verify
from lab.hosts import Lab
from support import wait_until

TESTS = Path(__file__).resolve().parents[1]


def test_a_container_moved_by_hand_keeps_its_connection_and_every_acknowledged_write(
    two_hosts: Lab, tmp_path: Path
) -> None:
    a, b = two_hosts.a, two_hosts.b
    with container.container(two_hosts, size=192 << 20), verify.client(two_hosts) as client:
        client.load(5)
        container.write_bundle(b)
        script = TESTS / "lab" / "naive.py"
        steps = json.loads(a.run("env", f"PYTHONPATH={TESTS}", sys.executable, script, b.name))
        assert (container.state(a), container.state(b)) == ("absent", "running")
        client.mark()
        assert client.verify_blocks() > 0
        root = b.outside(container.ROOTFS)
        enough = 2 * verify.RECORD + (root / "data/append.log").stat().st_size
        wait_until(lambda: (root / "data/append.log").stat().st_size > enough, "appended")
        container.remove(b)
        assert verify.check_database(root, client.ledger, tmp_path) > 0
        # The application's own clock saw the freeze that the script measured.
        log = verify.check_append_log(root)
        assert log.gap() > steps["total"] / 2


def test_the_judges_see_a_lost_write_and_a_lost_record(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with closing(sqlite3.connect(data / "ledger.db")) as db, db:
        db.execute("CREATE TABLE ledger (seq INTEGER PRIMARY KEY, at INTEGER)")
        db.executemany("INSERT INTO ledger VALUES (?, 0)", [(0,), (2,)])
    ledger = tmp_path / "ledger"
    ledger.write_text("0 1 2\n2 3 4\n")
    assert verify.check_database(tmp_path, ledger, tmp_path) == 2
    ledger.write_text("0 1 2\n1 2 3\n2 3 4\n")
    with pytest.raises(AssertionError, match="1 acknowledged writes are lost"):
        verify.check_database(tmp_path, ledger, tmp_path)

    records = [f"{n:020} {n * 10:020}".ljust(verify.RECORD - 1) + "\n" for n in range(3)]
    (data / "append.log").write_text("".join(records))
    assert verify.check_append_log(tmp_path).gap() == pytest.approx(1e-8)
    (data / "append.log").write_text("".join([records[0], records[2]]))
    with pytest.raises(AssertionError, match="record 1 is"):
        verify.check_append_log(tmp_path)


def test_a_lab_leaves_no_loop_device_cgroup_or_folder(two_hosts: Lab) -> None:
    with container.container(two_hosts):
        assert container.loops(two_hosts.a)
        assert container.state(two_hosts.a) == "running"
    for host in (two_hosts.a, two_hosts.b):
        assert container.loops(host) == []
        assert container.state(host) == "absent"
        assert host.processes() == {}
