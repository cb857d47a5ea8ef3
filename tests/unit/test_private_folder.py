# SPDX-License-Identifier: Apache-2.0
"""What a local user may put in the way of root's locks, journals and records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import needs, pyploop_env

from pyploop.errors import BusyError, CreateError, OpenError, PyploopError
from pyploop.migration import commit_record, locks, undo_kinds
from pyploop.migration.target import resumable_trees
from pyploop.system import kernel, private_folder
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


def use_journal(folder: Path) -> None:
    journal.Journal.create("a copy", folder).close()


USES = [use_container_lock, use_host_slot, use_commit_record, use_journal]


@pytest.mark.parametrize("use", USES)
def test_a_folder_that_another_user_made_first_is_not_used(
    shared: Path, precious: Path, use: Callable[[Path], None]
) -> None:
    folder = shared / "pyploop"
    folder.mkdir(0o755)
    names = [f".ct.lck.{os.getpid()}", "ct.lck", "migration.0", "migration.1"]
    names += [f"{os.getpid()}.json", f"{os.getpid()}.json.new"]
    for name in names:
        (folder / name).symlink_to(precious)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(OpenError, match="is not a folder of our own: it belongs to user 65534"):
        use(folder)
    assert sorted(os.listdir(folder)) == sorted(names)


@pytest.mark.parametrize("use", USES)
def test_a_link_of_another_user_is_not_followed_to_a_folder_of_root(
    shared: Path, tmp_path: Path, use: Callable[[Path], None]
) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    (shared / "pyploop").symlink_to(tmp_path / "other")
    os.lchown(shared / "pyploop", NOBODY, NOBODY)
    with pytest.raises(OpenError):
        use(shared / "pyploop")
    with pytest.raises(OpenError, match="user 65534 owns the link"):
        use(shared / "pyploop/below")
    assert os.listdir(tmp_path / "other") == []


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("where", ["itself", "above"])
def test_a_folder_that_others_can_write_to_is_not_used(
    tmp_path: Path, use: Callable[[Path], None], where: str
) -> None:
    folder = tmp_path / "open" / "pyploop"
    folder.mkdir(parents=True, mode=0o700)
    (folder if where == "itself" else folder.parent).chmod(0o777)
    with pytest.raises(OpenError, match=r"others can write to (it|.*open above it) \(.*0777\)"):
        use(folder)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("use", USES)
def test_missing_folders_are_made_for_their_owner_alone_whatever_the_umask(
    tmp_path: Path, use: Callable[[Path], None]
) -> None:
    old = os.umask(0)
    try:
        use(tmp_path / "a/b")
    finally:
        os.umask(old)
    assert [(tmp_path / p).stat().st_mode & 0o777 for p in ("a", "a/b")] == [0o700, 0o700]


def test_links_left_in_a_folder_of_our_own_are_not_followed(tmp_path: Path, precious: Path) -> None:
    """Of the time before it was checked: the folder is root's now, its contents are not."""
    (tmp_path / "locks").mkdir(mode=0o700)
    for name in ("ct.lck", "migration.0"):
        (tmp_path / "locks" / name).symlink_to(precious)
    (tmp_path / f"locks/.ct.lck.{os.getpid()}").symlink_to(precious)
    with pytest.raises(OpenError, match=r"ct\.lck is not a regular file"):
        use_container_lock(tmp_path / "locks")
    with pytest.raises(OpenError, match=r"migration\.0 is not a regular file"):
        use_host_slot(tmp_path / "locks")
    (tmp_path / "locks/ct.lck").unlink()
    use_container_lock(tmp_path / "locks")


def test_a_lock_of_another_user_locks_nothing_and_is_not_removed(tmp_path: Path) -> None:
    needs("root")
    (tmp_path / "ct.lck").write_text(f"{os.getpid()}\n")
    os.chown(tmp_path / "ct.lck", NOBODY, NOBODY)
    with pytest.raises(PyploopError, match=r"ct\.lck belongs to user 65534"):
        use_container_lock(tmp_path)
    assert (tmp_path / "ct.lck").exists()


def test_a_fifo_in_the_place_of_a_record_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.json")
    os.mkfifo(tmp_path / "runc-ct.kept-trees")
    told: list[str] = []
    assert journal.records(tmp_path, told.append) == []
    assert told == [f"{tmp_path}: 1.json is not a regular file: not used"]
    assert resumable_trees.allocated(str(tmp_path), "runc", "ct", {"id": "x"}) == {}


# ---- journals


def planted(folder: Path, precious: Path) -> Path:
    """A journal that removes root's file, as a dead process would have left it."""
    entry = {"kind": "write", "path": str(precious), "value": "overwritten"}
    fields = {"schema": journal.SCHEMA, "what": "a copy", "boot": kernel.boot_id(), "owners": []}
    path = folder / "1.json"
    path.write_text(json.dumps({**fields, "started": 1, "entries": [entry]}))
    return path


def thaw(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pyploop.cli.main", "thaw", *words],
        env={**pyploop_env(), journal.ENVIRONMENT: str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
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
