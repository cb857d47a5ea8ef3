# SPDX-License-Identifier: Apache-2.0
"""What pyploop-thaw.service runs after a crash (systemd/report-leftovers)."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, pyploop_env

SCRIPT = ROOT / "systemd/report-leftovers"
NOBODYS = [{"pid": 2**22 + 1, "start": 1}]
"""The owner of a journal, who has died: no PID is that large."""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(journals of copies, records of migrations)"""
    run, state = tmp_path / "run", tmp_path / "state"
    for folder in (run, state):
        folder.mkdir(mode=0o700)
    return run, state


def journal(folder: Path, what: str, *entries: dict[str, Any]) -> Path:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    record = {
        "schema": "pyploop.journal/1",
        "what": what,
        "boot": boot,
        "started": 1764028800.0,
        "owners": NOBODYS,
        "entries": list(entries),
    }
    path = folder / "4711.json"
    path.write_text(json.dumps(record))
    path.chmod(0o600)
    return path


def report(folders: tuple[Path, Path]) -> subprocess.CompletedProcess[str]:
    run, state = folders
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    env = pyploop_env({"PATH": path, "PYPLOOP_RUN": str(run)})
    command = ["sh", str(SCRIPT), str(state)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_nothing_is_reported_where_nothing_was_left(folders: tuple[Path, Path]) -> None:
    done = report(folders)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_container_whose_memory_did_not_all_come_is_reported(
    folders: tuple[Path, Path],
) -> None:
    path = folders[1] / "runc-web.lazy"
    record = {"schema": "pyploop.lazy/1", "container": "web", "state": "lost", "why": "killed"}
    record["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    path.write_text(json.dumps(record))
    done = report(folders)
    assert done.returncode == 1
    assert "web: it was ended while its memory was being loaded" in done.stdout
    path.write_text(json.dumps({**record, "state": "complete"}))
    done = report(folders)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_a_killed_copy_left_is_undone_and_reported(folders: tuple[Path, Path]) -> None:
    frozen = folders[0].parent / "cgroup.freeze"
    frozen.write_text("1")
    entry = {"kind": "write", "what": "the cgroup web", "path": str(frozen), "value": "0"}
    left = journal(folders[0], "copy of /dev/loop0", entry)
    done = report(folders)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the cgroup web" in done.stdout
    assert frozen.read_text() == "0"
    assert not left.exists()


def test_what_cannot_be_undone_fails_the_service_and_stays(folders: tuple[Path, Path]) -> None:
    entry = {"kind": "run", "what": "the undo command", "argv": ["false"], "timeout": 9}
    left = journal(folders[0], "copy of /dev/loop0", entry)
    done = report(folders)
    assert done.returncode == 1
    assert "the undo command" in done.stderr
    assert left.exists()


def test_an_unfinished_migration_is_reported_and_left_for_a_person(
    folders: tuple[Path, Path],
) -> None:
    left = journal(folders[1], "migration of web to hostb", {"kind": "resume"})
    before = left.read_bytes()
    done = report(folders)
    assert done.returncode == 1
    assert "migration of web to hostb" in done.stdout
    assert "pyploop migrate --recover" in done.stdout
    assert left.read_bytes() == before
