# SPDX-License-Identifier: Apache-2.0
"""Paths below a folder whose contents somebody else has made never leave it."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyploop.migration import undo_kinds
from pyploop.migration.target import resumable_files, resumable_trees
from pyploop.system import beneath, kernel
from pyploop.undo import journal

Opener = Callable[[int, str], int]
_FOLDER = os.O_PATH | os.O_DIRECTORY


def by_openat2(top: int, path: str) -> int:
    return kernel.open_beneath(top, path, _FOLDER)


def by_steps(top: int, path: str) -> int:
    return beneath.walk(top, path.split("/"), path)


@pytest.fixture(params=[by_openat2, by_steps], ids=["openat2", "old kernel"])
def opener(request: pytest.FixtureRequest) -> Opener:
    found: Opener = request.param
    return found


@pytest.fixture
def top(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "root/a/b").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    fd = os.open(tmp_path / "root", os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def inode(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def test_a_folder_below_is_opened_by_its_name(top: int, tmp_path: Path, opener: Opener) -> None:
    assert inode(opener(top, "a/b")) == (tmp_path / "root/a/b").stat().st_ino


@pytest.mark.parametrize("text", ["../outside", "/", "b", "/proc/self/cwd", ".."])
@pytest.mark.invariant(number=5)
def test_no_link_is_followed_wherever_it_leads(
    top: int, tmp_path: Path, opener: Opener, text: str
) -> None:
    (tmp_path / "root/a/link").symlink_to(text)
    for path in ("a/link", "a/link/b"):
        with pytest.raises(OSError) as e:
            opener(top, path)
        assert e.value.errno == errno.ELOOP, path


@pytest.mark.parametrize(
    "path",
    ["../outside/x", "a/../../outside/x", "a/../x", "./x", "a//x", "a/", "", "a\0/x", "a/./x"],
)
def test_a_path_with_odd_parts_is_refused_before_anything_is_opened(
    tmp_path: Path, path: str
) -> None:
    root = tmp_path / "nothing"  # its absence would be told otherwise
    with pytest.raises(OSError) as e, beneath.place(f"{root}/{path}", str(root)):
        pass
    assert e.value.errno == errno.EXDEV


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}2/x", "{root}"])
def test_a_path_beside_the_root_is_refused(tmp_path: Path, path: str) -> None:
    root = str(tmp_path / "root")
    with pytest.raises(OSError) as e, beneath.place(path.format(root=root), root):
        pass
    assert e.value.errno == errno.EXDEV


def test_a_trusted_path_may_be_written_as_people_do(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with beneath.place(f"{tmp_path}//a/..//a//x") as at:
        os.close(beneath.create(at))
    assert (tmp_path / "a/x").stat().st_mode & 0o777 == 0o600
    for path in ("a/", "a/.", "a/.."):
        with pytest.raises(OSError), beneath.place(f"{tmp_path}/{path}"):
            pass


def test_a_name_longer_than_any_file_system_has_is_an_error_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    long = f"{tmp_path}/{'x' * 300}"
    with pytest.raises(OSError) as e, beneath.place(long, str(tmp_path)) as at:
        beneath.create(at)
    assert e.value.errno == errno.ENAMETOOLONG
    with pytest.raises(OSError), beneath.place(f"{long}/y", str(tmp_path)):
        pass


@pytest.mark.parametrize("there", ["link", "dangling", "hard link", "fifo"])
def test_what_has_the_name_already_is_never_written_to(tmp_path: Path, there: str) -> None:
    victim, name = tmp_path / "victim", tmp_path / "root/name"
    victim.write_text("root's")
    (tmp_path / "root").mkdir()
    if there == "fifo":
        os.mkfifo(name)
    elif there == "hard link":
        os.link(victim, name)
    else:
        name.symlink_to(victim if there == "link" else tmp_path / "new")
    with beneath.place(str(name), f"{tmp_path}/root") as at, pytest.raises(FileExistsError):
        beneath.create(at)
    assert victim.read_text() == "root's"
    assert not (tmp_path / "new").exists()


SWAP = """
import os, sys
folder, link = sys.argv[1:]
print("ready", flush=True)
while True:
    os.rename(folder, folder + ".away"); os.rename(link, folder)
    os.rename(folder, link); os.rename(folder + ".away", folder)
"""


def test_a_folder_that_is_swapped_for_a_link_all_the_time_leads_nowhere_else(
    tmp_path: Path,
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a/b").mkdir(parents=True)
    (outside / "b").mkdir(parents=True)
    (root / "link").symlink_to("../outside")
    process = subprocess.Popen(
        [sys.executable, "-c", SWAP, str(root / "a"), str(root / "link")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    made = refused = 0
    try:
        process.stdout.readline()
        for n in range(3000):
            try:
                with beneath.place(f"{root}/a/b/{n}", str(root)) as at:
                    os.close(beneath.create(at))
                made += 1
            except OSError as e:
                assert e.errno in (errno.ELOOP, errno.ENOENT, errno.EAGAIN), e
                refused += 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert os.listdir(outside / "b") == []
    assert (made > 0, made + refused) == (True, 3000)


# ---- what undoes a migration


@pytest.mark.parametrize("kind", ["remove", "rmdir", "put-back", "copied"])
def test_no_undoing_follows_a_link_that_came_from_the_source(tmp_path: Path, kind: str) -> None:
    root, outside = tmp_path / "private", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "x").symlink_to("../outside")
    target = outside / "file"
    if kind == "rmdir":
        target.mkdir()
    else:
        target.write_text("root's")
    (outside / "saved").write_text("the source's")
    path = str(root / "x/file")
    entry = {"kind": kind, "path": path, "root": str(root), "saved": f"{root}/x/saved"}
    entry |= {"kept": f"{tmp_path}/none"}
    with contextlib.suppress(OSError):  # told as not undone
        journal.undo(entry)
    assert sorted(os.listdir(outside)) == ["file", "saved"]
    assert target.is_dir() if kind == "rmdir" else target.read_text() == "root's"


def test_keeping_what_was_copied_takes_nothing_from_behind_a_link(tmp_path: Path) -> None:
    root, outside = tmp_path / "private", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "x").symlink_to("../outside")
    (outside / "file").write_bytes(bytes(2 << 20))
    log = journal.Journal.create("test", tmp_path / "state", keep=True)
    entry = {"kind": "copied", "what": "private:x/file", "path": str(root / "x/file")}
    log.add({**entry, "kept": str(tmp_path / "kept"), "root": str(root)})
    with contextlib.suppress(OSError):
        resumable_files.retain(log, log.entries[0])
    log.clear()
    assert (outside / "file").exists()
    assert not (tmp_path / "kept").exists()


def test_a_tree_that_is_kept_is_closed_to_other_users_wherever_it_lies(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    log = journal.Journal.create("test", tmp_path / "state", container="web", migration="m")
    tree = tmp_path / "private/tree"
    tree.mkdir(parents=True)
    (tree / "su").touch()
    (tree / "su").chmod(0o4755)
    os.chown(tree, 1000, 1000)
    entry = resumable_trees.entry_for(log, 0, str(tree)) | {"kept": str(tmp_path / "kept")}
    resumable_trees.retain(log, entry)
    log.clear()
    st = (tmp_path / "kept").stat()
    assert (st.st_uid, st.st_gid, st.st_mode & 0o7777) == (0, 0, 0o700)
    assert (tmp_path / "kept/su").exists()


def test_folders_are_made_for_root_alone_and_not_through_a_link(tmp_path: Path) -> None:
    root, outside = tmp_path / "vz/private", tmp_path / "outside"
    outside.mkdir()
    log = journal.Journal.create("test", tmp_path / "state")
    try:
        undo_kinds.make_folders(log, root / "a/b", 0o700, str(root))
        for folder in (root.parent, root, root / "a", root / "a/b"):
            assert folder.stat().st_mode & 0o777 == 0o700, folder
        (root / "x").symlink_to(outside)
        with pytest.raises(OSError):
            undo_kinds.make_folders(log, root / "x/y", 0o700, str(root))
        assert list(outside.iterdir()) == []
        (root / "x").unlink()
        assert undo_kinds.undo_all(log, over=False) == []
        assert not root.parent.exists()
    finally:
        log.clear()
