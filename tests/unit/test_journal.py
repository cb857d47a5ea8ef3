# SPDX-License-Identifier: Apache-2.0
"""The undo journal: written before, removed after, replayed in reverse, and
never while its owner lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import pyploop_env

from pyploop.errors import BusyError, CommandError, OpenError
from pyploop.undo import journal
from pyploop.undo.journal import Journal, records


@pytest.fixture
def undone() -> Iterator[list[Any]]:
    """What entries of kind `test` were undone, in order."""
    seen: list[Any] = []

    def undo(entry: journal.Entry) -> None:
        if entry.get("fails"):
            raise CommandError("no")
        seen.append(entry["n"])

    journal.register("test", undo)
    journal.register("lasting", undo, outlives_boot=True)
    try:
        yield seen
    finally:
        journal._kinds.pop("test")
        journal._kinds.pop("lasting")


def left_by_a_dead_process(where: Path, *entries: journal.Entry) -> journal.Record:
    script = (
        "import json, sys; from pathlib import Path; from pyploop.undo.journal import Journal\n"
        "j = Journal.create('a copy', Path(sys.argv[1]))\n"
        "for e in json.loads(sys.argv[2]): j.add(e)\n"
    )
    args = [sys.executable, "-c", script, str(where), json.dumps(entries)]
    subprocess.run(args, env=pyploop_env(), check=True)
    return records(where)[-1]


def test_a_journal_has_the_steps_left_to_undo_and_is_removed_with_the_last(tmp_path: Path) -> None:
    mine = Journal.create("a copy", tmp_path / "run")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert mine.path.stat().st_mode & 0o777 == 0o600
    a, b = mine.add({"kind": "test", "n": 1}), mine.add({"kind": "test", "n": 2})
    assert [e["n"] for e in records(tmp_path / "run")[0].entries] == [1, 2]
    mine.done(a)
    assert [e["n"] for e in records(tmp_path / "run")[0].entries] == [2]
    mine.close()
    assert mine.path.exists()
    mine.done(b)
    mine.close()
    assert list((tmp_path / "run").iterdir()) == []


def test_two_undertakings_of_one_process_have_a_journal_each(tmp_path: Path) -> None:
    one, two = Journal.create("one", tmp_path), Journal.create("two", tmp_path)
    assert [one.id, two.id] == [str(os.getpid()), f"{os.getpid()}-2"]
    assert sorted(r.what for r in records(tmp_path)) == ["one", "two"]


def test_what_a_dead_process_left_is_undone_in_reverse(tmp_path: Path, undone: list[Any]) -> None:
    left = left_by_a_dead_process(tmp_path, *({"kind": "test", "n": n} for n in (1, 2, 3)))
    assert (left.owner(), left.replay(), undone) == (None, [], [3, 2, 1])
    assert records(tmp_path) == []


def test_what_cannot_be_undone_stays_for_another_try(tmp_path: Path, undone: list[Any]) -> None:
    left = left_by_a_dead_process(
        tmp_path,
        {"kind": "test", "n": 1},
        {"kind": "test", "n": 2, "fails": True, "what": "resume it"},
        {"kind": "nobody knows this", "n": 3},
    )
    failed = left.replay()
    assert [f.partition(":")[0] for f in failed] == ["nobody knows this", "resume it"]
    assert undone == [1]
    assert [e["n"] for e in records(tmp_path)[0].entries] == [2, 3]


def test_the_journal_of_a_living_process_is_not_touched(tmp_path: Path, undone: list[Any]) -> None:
    mine = Journal.create("a copy", tmp_path)
    mine.add({"kind": "test", "n": 1})
    with pytest.raises(BusyError, match=f"process {os.getpid()}"):
        records(tmp_path)[0].replay()
    assert undone == []
    # Another process that has got the number since is not the owner.
    fields = json.loads(mine.path.read_text())
    fields["owners"][0]["start"] += 1
    mine.path.write_text(json.dumps(fields))
    assert records(tmp_path)[0].replay() == []
    assert undone == [1]


def test_a_reboot_undoes_what_does_not_outlive_it(tmp_path: Path, undone: list[Any]) -> None:
    left = left_by_a_dead_process(tmp_path, {"kind": "test", "n": 1}, {"kind": "lasting", "n": 2})
    left.fields["boot"] = "another"
    assert (left.replay(), undone) == ([], [2])


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(OpenError, match="not a folder of our own"):
        Journal.create("a copy", tmp_path / "open")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OpenError, match="not a folder of our own"):
        Journal.create("a copy", tmp_path / "link")


def test_what_is_no_journal_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text("{")
    (tmp_path / "2.json").write_text('{"schema": "else"}')
    (tmp_path / "3.json").write_text("")
    assert records(tmp_path) == []
    assert records(tmp_path / "none") == []


def test_two_replays_keep_out_of_each_others_way(tmp_path: Path) -> None:
    with (
        journal.replaying(tmp_path),
        pytest.raises(BusyError, match="is running"),
        journal.replaying(tmp_path),
    ):
        pass
    with journal.replaying(tmp_path), journal.replaying(tmp_path / "none"):
        pass


def test_without_a_place_for_journals_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(journal.ENVIRONMENT, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(OpenError, match="XDG_RUNTIME_DIR"):
        journal.folder()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert str(journal.folder()) == "/run/user/1000/pyploop"
