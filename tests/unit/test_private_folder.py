# SPDX-License-Identifier: Apache-2.0
"""What a local user may put in the way of root's locks, journals and records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import needs

from pyploop.errors import BusyError, CreateError, OpenError
from pyploop.migration import commit_record, locks, undo_kinds
from pyploop.system import private_folder
from pyploop.undo import journal

NOBODY = 65534


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Like /run/lock and /dev/shm: everybody may make things there."""
    needs("root")
    made = tmp_path / "shared"
    made.mkdir()
    made.chmod(0o1777)
    return made


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """A file of root's, which stays as it is."""
    made = tmp_path / "precious"
    made.write_text("root's own")
    yield made
    assert made.read_text() == "root's own"


def use_container_lock(folder: Path) -> None:
    with locks.container_lock(folder, "ct"):
        pass


def use_host_slot(folder: Path) -> None:
    with locks.host_slot(folder, 2, 0):
        pass


def use_commit_record(folder: Path) -> None:
    made = commit_record.make_folder(folder)
    commit_record.CommitRecord.create(made, commit_record.new_id()).close(remove=True)
    return done.returncode, done.stdout, done.stderr


def test_journals_in_a_folder_of_another_user_are_not_replayed(
    shared: Path, precious: Path
) -> None:
    folder = shared / "run"
    folder.mkdir(mode=0o755)
    planted(folder, precious)
    os.chown(folder, NOBODY, NOBODY)
    for words in (["--all"], ["--list"], []):
        code, out, errors = thaw(folder, *words)
        assert (code, out) == (OpenError.exit_code, "")
        assert f"{folder} is not a folder of our own: it belongs to user 65534" in errors


def test_a_journal_of_another_user_is_ignored_and_named(tmp_path: Path, precious: Path) -> None:
    needs("root")
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    os.chown(planted(folder, precious), NOBODY, NOBODY)
    for words in (["--all"], ["--list"]):
        said = f"pyploop thaw: {folder}: 1.json belongs to user 65534: not used\n"
        assert thaw(folder, *words) == (0, "", said)
    assert (folder / "1.json").exists()
    # The same file of root's would have been replayed.
    os.chown(folder / "1.json", 0, 0)
    precious.write_text("old")
    assert thaw(folder, "--all")[0] == 0
    assert precious.read_text() == "overwritten"
    precious.write_text("root's own")


def test_saving_a_journal_does_not_write_through_a_link(tmp_path: Path, precious: Path) -> None:
    folder = tmp_path / "run"
    log = journal.Journal.create("a copy", folder)
    (folder / f"{log.path.name}.new").symlink_to(precious)
    log.add({"kind": "test"})
    assert [e["kind"] for e in journal.records(folder)[0].entries] == ["test"]
    log.clear()


# ---- folders for dumps


def test_a_dump_goes_into_a_new_folder_and_never_into_one_that_was_there(shared: Path) -> None:
    taken = shared / "pyploop-1"
    taken.mkdir()
    os.chown(taken, NOBODY, NOBODY)
    (taken / "theirs").touch()
    with pytest.raises(FileExistsError):
        private_folder.make_new(taken)
    undo_kinds._remove_tree({"path": str(taken)})  # what the journal of a failed begin has
    assert (taken / "theirs").exists()
    (shared / "pyploop-2").symlink_to("/etc")
    with pytest.raises(FileExistsError):
        private_folder.make_new(shared / "pyploop-2")
    private_folder.make_new(shared / "pyploop-3")
    assert (shared / "pyploop-3").stat().st_mode & 0o777 == 0o700
    undo_kinds._remove_tree({"path": str(shared / "pyploop-3")})
    assert not (shared / "pyploop-3").exists()


def test_scratch_folders_are_refused_where_others_could_replace_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with private_folder.scratch() as made:
        assert made.stat().st_mode & 0o777 == 0o700
    (tmp_path / "tmp").chmod(0o777)
    with pytest.raises(OpenError, match="others can write"), private_folder.scratch():
        pass
    (tmp_path / "tmp").chmod(0o1777)
    with private_folder.scratch():
        pass


def test_our_own_links_on_the_way_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "loop").symlink_to("loop")
    use_host_slot(tmp_path / "link/locks")
    assert (tmp_path / "real/locks/migration.0").exists()
    with pytest.raises(OpenError, match="too many symbolic links"):
        use_host_slot(tmp_path / "loop/locks")
    with pytest.raises((OpenError, CreateError)):
        use_host_slot(tmp_path / "real/locks/migration.0")


def test_two_dots_behind_a_link_are_followed_as_the_kernel_does(tmp_path: Path) -> None:
    (tmp_path / "open/below").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to("open/below")
    with pytest.raises(OpenError, match=r"others can write to .*/open above it"):
        use_host_slot(tmp_path / "link/../locks")
    assert os.listdir(tmp_path / "open") == ["below"]


def test_one_lock_still_keeps_others_out(tmp_path: Path) -> None:
    with locks.container_lock(tmp_path, "ct"), pytest.raises(BusyError, match="is locked"):
        locks.container_lock(tmp_path, "ct").__enter__()
    assert os.listdir(tmp_path) == []
