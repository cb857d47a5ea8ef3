# SPDX-License-Identifier: Apache-2.0
"""Who may run the container, asked after the agent has died."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyploop.errors import BusyError
from pyploop.migration import commit_record, deadlines, undo_kinds
from pyploop.migration.target import settle
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.unprepared import Unprepared
from pyploop.undo.journal import Journal


def dead_agent(folder: Path, word: str) -> tuple[HostConfig, str, Path]:
    """What an agent leaves that was killed after it wrote `word`: its host, the
    migration, and a file that it would undo."""
    host = HostConfig(state_dir=str(folder))
    migration = commit_record.new_id()
    record = commit_record.CommitRecord.create(folder, migration)
    record.write(word)
    record.close()
    log = Journal.create("a migration", folder, migration=migration, side="target")
    made = folder / "made"
    made.touch()
    log.add({"kind": "remove", "path": str(made)})
    return host, migration, made


def runs(answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(log: Any) -> bool:
        return answer

    def runtime(fields: Any) -> Unprepared:
        return Unprepared()

    monkeypatch.setattr(settle, "_runs", state)
    monkeypatch.setattr(undo_kinds, "runtime_of", runtime)


@pytest.mark.parametrize(
    "word", [commit_record.PENDING, commit_record.COMMITTED, commit_record.ABORTED]
)
@pytest.mark.invariant(number=4)
def test_a_container_that_never_ran_here_is_given_back(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(False, monkeypatch)
    host, migration, made = dead_agent(tmp_path, word)
    assert settle.settle(host, migration) == {"verdict": "aborted", "failed": []}
    assert not made.exists()
    assert settle.settle(host, migration)["verdict"] == "aborted"
    assert list(tmp_path.iterdir()) == []


def test_a_committed_container_that_runs_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(True, monkeypatch)
    host, migration, made = dead_agent(tmp_path, commit_record.COMMITTED)
    assert settle.settle(host, migration) == {"verdict": "committed", "failed": []}
    assert made.exists()


@pytest.mark.invariant(number=4)
def test_a_container_that_ran_here_and_died_is_never_run_again_from_its_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(False, monkeypatch)
    host, migration, made = dead_agent(tmp_path, commit_record.RAN)
    for _ in range(2):  # the answer may have been lost, and be asked for again
        assert settle.settle(host, migration)["verdict"] == "committed"
    assert made.exists()


@pytest.mark.invariant(number=4)
def test_who_asks_waits_for_the_one_who_may_still_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "SETTLE_WAIT", 0.0)
    host = HostConfig(state_dir=str(tmp_path))
    migration = commit_record.new_id()
    record = commit_record.CommitRecord.create(tmp_path, migration)
    try:
        with pytest.raises(BusyError):
            settle.settle(host, migration)
    finally:
        record.close()
