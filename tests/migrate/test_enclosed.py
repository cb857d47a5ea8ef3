# SPDX-License-Identifier: Apache-2.0
"""A container that changes its own files while they are copied gets nothing of its
host into the copy, and cannot keep the host from removing what it left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from treeloop import Copying, account, copying

from pyploop.errors import CancelledError, MigrateError
from pyploop.migration import rsync, tree_scan
from pyploop.migration.target import resumable_trees
from pyploop.system import enclosure
from pyploop.system.jobs import Job
from pyploop.undo.journal import Journal

FILES = 100
SECRET = b"only root of the host may read this\n"
_SWAPPER = """\
import os, sys
folder, link, aside = sys.argv[1:]
print("on", flush=True)
while True:
    os.rename(folder, aside); os.rename(link, folder)
    os.rename(folder, link); os.rename(aside, folder)
"""


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder of the host's, for root alone, with names that the tree has too."""
    support.needs("root", "rsync")
    made = tmp_path / "secret"
    (made / "below").mkdir(mode=0o700, parents=True)
    made.chmod(0o700)
    for n in range(FILES):
        (made / f"below/{n}").write_bytes(SECRET)
        (made / f"{n}").write_bytes(SECRET)
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    (made / "a/swapped/below").mkdir(parents=True)
    for n in range(FILES):
        for name in ("a/swapped", "a/swapped/below"):
            (made / name / str(n)).write_bytes(b"x" * len(SECRET))
    return made


@contextlib.contextmanager
def swapping(source: Path, target: str | Path) -> Iterator[None]:
    """A process that replaces a folder by a link, and back, all the time."""
    (source / "a/link").symlink_to(target)
    words = [source / "a/swapped", source / "a/link", source / "a/aside"]
    with subprocess.Popen(
        [sys.executable, "-I", "-c", _SWAPPER, *words], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def stolen(target: Path) -> list[str]:
    return [
        str(path.relative_to(target))
        for path in target.rglob("*")
        if not path.is_symlink() and path.is_file() and SECRET in path.read_bytes()
    ]


@pytest.mark.parametrize("how", ["absolute", "relative", "by proc"])
def test_a_folder_that_is_swapped_for_a_link_brings_nothing_of_the_host(
    tmp_path: Path, source: Path, secret: Path, how: str
) -> None:
    up = "../" * len((source / "a").parts)
    where = {
        "absolute": str(secret),
        "relative": up + str(secret),
        "by proc": f"/proc/1/root{secret}",
    }[how]
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        with copying(folder, source) as c:
            with swapping(source, where):
                for _ in range(3):
                    # rsync does not bear everything, and nothing is begun after that.
                    with contextlib.suppress(MigrateError, CancelledError):
                        c.trees.copy_while_running()
            assert stolen(c.target) == []
        for name in ("link", "aside"):
            if (source / "a" / name).is_symlink():
                (source / "a" / name).unlink()


def test_what_stands_still_is_copied_whole_after_all_the_swapping(
    tmp_path: Path, source: Path, secret: Path
) -> None:
    whole = True
    with copying(tmp_path, source) as c:
        with swapping(source, secret):
            try:
                c.trees.copy_while_running()
            except MigrateError:  # rsync does not bear everything: a new one then
                whole = False
        if whole:
            finished_whole(c)
        assert stolen(c.target) == []
    if not whole:
        again = tmp_path / "again"
        again.mkdir()
        with copying(again, source) as c:
            c.trees.copy_while_running()
            finished_whole(c)


def finished_whole(c: Copying) -> None:
    c.trees.prepare_last()
    c.finish()
    assert account(c.source) == account(c.target)


def test_the_scan_never_leaves_the_tree(source: Path, secret: Path) -> None:
    inside = {st.st_ino for _, st in tree_scan.entries(str(source))}
    with swapping(source, secret):
        for _ in range(100):
            found = dict(tree_scan.entries(str(source)))
            link = (source / "a/link", source / "a/swapped")
            others = {st.st_ino for st in found.values()} - inside
            assert len(others) <= 1, link  # the link itself
            assert not {os.stat(secret / f"{n}").st_ino for n in range(3)} & others


def test_only_the_tree_and_programs_are_in_the_root_of_the_sources_rsync(
    source: Path, secret: Path
) -> None:
    """What a path can reach there, asked of a shell in rsync's place."""
    script = (
        "cd /tree && ls / && cat /tree/../etc/passwd /proc/1/environ"
        f" {secret}/0; echo x > /tree/new; echo x > /new; echo a/*"
    )
    words = [sys.executable, "-I", "-S", enclosure.__file__, str(source)]
    words += [*rsync._needed("/bin/sh"), "--", "/bin/sh", "sh", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    *top, last = done.stdout.split("\n")[:-1]
    programs = {Path(p).parts[1] for p in (sys.prefix, sys.base_prefix)}  # Python's own
    others = {"home", "var", "run", "proc", "sys", "dev", "tmp", "srv"} - programs
    assert not others & set(top)
    assert "tree" in top
    assert last == "a/swapped"
    assert done.stderr.count("No such file") == 3
    assert "/tree/new: Read-only file system" in done.stderr
    assert not (source / "new").exists()
    assert [p for p in Path("/proc/self/mounts").read_text().split() if p == "/tree"] == []


_TRUSTING = """\
#!/bin/sh
# Like an rsync before 3.5: each name is looked up anew, links in it are followed.
for word; do
  case $word in */) cat "${word}a/link/0" "${word}a/swapped/0" ;; esac
done
exit 1
"""


def test_an_rsync_that_follows_links_finds_nothing_behind_them(
    tmp_path: Path, source: Path, secret: Path
) -> None:
    """What a swapped folder is for an rsync that looks at the wrong moment."""
    (source / "a/link").symlink_to(secret)
    program = tmp_path / "rsync"
    program.write_text(_TRUSTING)
    program.chmod(0o755)
    client = rsync.Client(str(program), (), str(source))
    try:
        done = client.wait()
        printed = done.items.text(ended=True)
    finally:
        client.close()
    assert (done.status, printed) == (1, "x" * len(SECRET))
    assert "a/link/0: No such file" in done.errors
    assert str(SECRET, "ascii").strip() not in done.errors


def test_without_the_right_to_mount_nothing_is_read(source: Path) -> None:
    support.needs("setpriv")
    words = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    words += [sys.executable, "-I", "-S", enclosure.__file__, str(source), "--", "/bin/sh", "sh"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    why = f"cannot keep a program within {source}: unshare: Operation not permitted\n"
    assert (done.returncode, done.stdout, done.stderr) == (126, "", why)


def test_a_tree_that_became_a_link_is_refused(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "link").symlink_to(secret)
    with copying(tmp_path, secret) as c:
        c.trees._copies[0].tree = type(c.trees._copies[0].tree)(str(tmp_path / "link"))
        with pytest.raises(MigrateError, match=f"within {tmp_path}/link: .*Not a directory"):
            c.trees.prepare_last()


# ---- what it leaves


@pytest.mark.parametrize(("depth", "name"), [(150, "d"), (15, "n" * 250)])
def test_deeply_nested_folders_arrive(tmp_path: Path, source: Path, depth: int, name: str) -> None:
    nest(source, depth, name)
    with copying(tmp_path, source) as c:
        assert tree_scan.check_source(str(source)) > 0
        c.trees.copy_while_running()
        c.trees.prepare_last()
        Job(c.finish).start().join(60)
        paths = [c.source.joinpath(*[name] * depth), c.target.joinpath(*[name] * depth)]
        assert [os.listdir(path) for path in paths] == [["file"], ["file"]]


def test_a_name_that_is_too_long_for_rsync_is_refused_before_anything_starts(
    source: Path,
) -> None:
    nest(source, 17, "n" * 250)
    with pytest.raises(MigrateError, match="nested too deeply for rsync") as refusal:
        tree_scan.check_source(str(source))
    assert refusal.value.exit_code == 6


def test_a_kept_tree_is_for_nobody_but_root(tmp_path: Path) -> None:
    """It may hold setuid files of the container's, and lies where users may look."""
    (tmp_path / "state").mkdir(mode=0o700)
    fields = {"migration": "0" * 16, "runtime": "runc", "container": "ct"}
    log = Journal.create("a migration", tmp_path / "state", source={"id": "x"}, **fields)
    tree = tmp_path / "tree"
    entry = resumable_trees.entry_for(log, 0, str(tree))
    tree.mkdir(mode=0o755)
    (tree / "setuid").touch()
    (tree / "setuid").chmod(0o4755)
    resumable_trees.retain(log, entry)
    kept = Path(entry["kept"])
    assert (os.listdir(kept), kept.stat().st_mode & 0o7777) == (["setuid"], 0o700)
    log.clear()


def nest(top: Path, depth: int, name: str) -> None:
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
