# SPDX-License-Identifier: Apache-2.0
"""What a container leaves behind is removed, whatever it made of it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import needs

from pyploop.freeze import cgroup_freezer
from pyploop.migration import tree_scan, undo_kinds
from pyploop.system import removal


def nest(top: Path, depth: int, name: str = "d") -> None:
    """Folders in folders, deeper than a path can tell."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """pytest could not remove what is nested so deeply; rm can."""
    yield tmp_path
    subprocess.run(["rm", "-rf", "--one-file-system", tmp_path], check=True)


@contextlib.contextmanager
def few_descriptors(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("depth", "name"), [(1010, "d"), (3000, "d"), (30, "n" * 255)])
def test_folders_nested_deeper_than_python_recurses_or_a_path_can_tell_are_removed(
    tmp_path: Path, depth: int, name: str
) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    nest(top, depth, name)
    with few_descriptors(40):
        undo_kinds._remove_tree({"path": str(top)})
    assert os.listdir(tmp_path) == []
    undo_kinds._remove_tree({"path": str(top)})  # again: there is nothing left to undo


def test_links_are_removed_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    top = tmp_path / "tree"
    (top / "a/b").mkdir(parents=True)
    for where in (top, top / "a", top / "a/b"):
        (where / "out").symlink_to(tmp_path / "kept")
        (where / "up").symlink_to("../../..")
        os.mkfifo(where / "fifo")
        os.link(tmp_path / "kept/file", where / "second name")
    removal.remove_contents(str(top))
    assert os.listdir(top) == []
    assert os.listdir(tmp_path / "kept") == ["file"]
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    with pytest.raises(OSError, match="link") as failure:
        removal.remove_contents(str(tmp_path / "link"))
    assert failure.value.errno in (errno.ELOOP, errno.ENOTDIR)
    assert os.listdir(tmp_path / "kept") == ["file"]


def test_what_is_mounted_inside_is_not_entered_and_the_rest_goes(tmp_path: Path) -> None:
    """A bind mount has the device number of what it lies on."""
    needs("root", "mount")
    (tmp_path / "host").mkdir()
    (tmp_path / "host/file").touch()
    top = tmp_path / "tree"
    (top / "a/mounted").mkdir(parents=True)
    (top / "b/c").mkdir(parents=True)
    subprocess.run(["mount", "--bind", tmp_path / "host", top / "a/mounted"], check=True)
    try:
        with pytest.raises(OSError, match="a/mounted: something is mounted there") as failure:
            removal.remove_tree(str(top))
        assert failure.value.errno == errno.EBUSY
        assert (sorted(os.listdir(top)), os.listdir(tmp_path / "host")) == (["a"], ["file"])
    finally:
        subprocess.run(["umount", top / "a/mounted"], check=True)


def test_what_cannot_be_removed_is_named_and_keeps_nothing_else(tmp_path: Path) -> None:
    needs("root", "chattr")
    top = tmp_path / "tree"
    (top / "a/b").mkdir(parents=True)
    (top / "z").mkdir()
    names = [top / f"a/b/{n}" for n in range(8)]
    for path in [*names, top / "z/file"]:
        path.touch()
    if subprocess.run(["chattr", "+i", *names], check=False).returncode:
        pytest.skip("the file system under /tmp has no immutable files")
    try:
        with pytest.raises(OSError, match=r"not removed: a/b/\d: Operation not perm.*3 more"):
            removal.remove_contents(str(top))
        assert (os.listdir(top), len(os.listdir(top / "a/b"))) == (["a"], 8)
    finally:
        subprocess.run(["chattr", "-i", *names], check=True)
    removal.remove_contents(str(top))
    assert os.listdir(top) == []


def test_the_processes_of_deeply_nested_cgroups_are_found(tmp_path: Path) -> None:
    """A container that may make cgroups may nest them."""
    nest(tmp_path, 1500)
    (tmp_path / "cgroup.procs").write_text("7\n")
    (tmp_path / "d/d").joinpath("cgroup.procs").write_text("8\n9\n")
    assert cgroup_freezer.Freezer(tmp_path, v2=True).processes() == [7, 8, 9]
    removal.remove_contents(str(tmp_path))


def test_a_folder_of_many_files_takes_no_memory_for_each(tmp_path: Path) -> None:
    for n in range(20_000):
        os.mknod(tmp_path / f"a name of some length, {n}")
    tree_scan.check_source(str(tmp_path))
    tracemalloc.start()
    try:
        tree_scan.check_source(str(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
