# SPDX-License-Identifier: Apache-2.0
"""Directory trees by rsync: what the target has after the last pass is what the
source has, whatever was done to it in between."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from treeloop import account, copying

from pyploop.diskcopy.freeze_policy import Policy
from pyploop.diskcopy.options import Options
from pyploop.errors import LoopError, MigrateError
from pyploop.migration import rsync_options, tree_scan
from pyploop.migration.target import resumable_trees
from pyploop.system.jobs import Job


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    support.needs("root", "rsync")
    made = tmp_path / "source"
    made.mkdir()
    (made / "etc").mkdir()
    (made / "etc/hosts").write_text("127.0.0.1 localhost\n")
    yield made


def test_everything_that_a_file_can_be_arrives(source: Path, tmp_path: Path) -> None:
    odd = source / os.fsdecode(b"odd \xff\n#name")
    odd.write_bytes(os.urandom(5000))
    os.chown(odd, 100000, 100001)
    odd.chmod(0o4711)
    os.setxattr(odd, "user.note", b"x\0y")
    os.setxattr(odd, "security.capability", bytes.fromhex("0100000200200000" + "00" * 12))
    os.utime(odd, ns=(1, 1_234_567_890_123_456_789))
    os.link(odd, source / "etc/second name")
    (source / "link").symlink_to("/etc/passwd")
    os.lchown(source / "link", 5, 6)
    os.mknod(source / "null", 0o20666, os.makedev(1, 3))
    os.mkfifo(source / "fifo")
    with (source / "sparse").open("wb") as f:
        f.truncate(64 << 20)
        f.seek(32 << 20)
        f.write(b"in the middle")
    if shutil.which("setfacl"):
        support.run("setfacl", "-m", "u:1234:rw", source / "etc/hosts")
    (source / "etc").chmod(0o1777)
    with copying(tmp_path, source) as c:
        c.trees.copy_while_running()
        c.trees.prepare_last()
        c.finish()
        assert account(c.source) == account(c.target)
        assert (c.target / "sparse").stat().st_blocks * 512 < 1 << 20


def test_what_a_fake_super_rsync_has_written_arrives(source: Path, tmp_path: Path) -> None:
    """A backup's server in the container has owners and modes in such attributes."""
    file = source / "etc/hosts"
    for name in ("user.rsync.%stat", "user.rsync.%aacl", "user.rsync.x"):
        os.setxattr(file, name, b"100644 0,0 1000:1000")
    with copying(tmp_path, source) as c:
        c.trees.copy_while_running()
        c.trees.prepare_last()
        c.finish()
        there = c.target / "etc/hosts"
        assert {n: os.getxattr(there, n) for n in os.listxattr(there)} == {
            n: os.getxattr(file, n) for n in os.listxattr(file)
        }


# ---- names that are no links any more


def part(path: Path, mode: int) -> None:
    """As `cp -p` and mv: one name becomes a file of its own, with the same contents."""
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").chmod(mode)
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("when", ["suspended", "running", "by contents"])
def test_a_name_that_is_no_link_any_more_is_a_file_of_its_own(
    source: Path, tmp_path: Path, name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "by contents":
        monkeypatch.setattr(tree_scan, "TIMED", frozenset())
    (source / "a").write_bytes(os.urandom(5000))
    os.link(source / "a", source / "b")
    os.link(source / "a", source / "c")
    with copying(tmp_path, source) as c:
        c.trees.copy_while_running()
        if when == "running":
            part(source / name, 0o600)
            c.trees.again()
        c.trees.prepare_last()
        if when != "running":
            part(source / name, 0o600)
        c.finish()
        assert account(c.source) == account(c.target)
        links = {n: (c.target / n).stat().st_nlink for n in "abc"}
        assert links == {n: 1 if n == name else 2 for n in "abc"}
        # What is written to one is not in the other.
        (c.target / name).write_bytes(b"x")
        others = {(c.target / n).read_bytes() for n in "abc" if n != name}
        assert others == {(source / n).read_bytes() for n in "abc" if n != name}


def test_links_of_a_kept_tree_are_not_believed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "a").write_bytes(b"x")
    os.mkfifo(tree / "sub/fifo")
    for name in ("a", "sub/fifo"):
        os.link(tree / name, tree / "sub" / "second")
        os.rename(tree / "sub/second", tree / f"{name}2")
    resumable_trees._part(str(tree))
    left = [p for p in tree.rglob("*") if not p.is_dir()]
    assert len(left) == 2 and all(p.lstat().st_nlink == 1 for p in left)


def test_a_file_that_becomes_a_fifo_under_rsync_s_eyes_holds_nothing_up(
    source: Path, tmp_path: Path
) -> None:
    """rsync has it on its list, and waits in open(2) for one who writes into it."""
    names = [f"{n:04}" for n in range(2000)]
    for name in names:
        (source / name).write_bytes(os.urandom(50_000))
    with copying(tmp_path, source) as c:
        first = Job(c.trees.copy_while_running).start()
        support.wait_until((c.target / names[5]).exists, "files arrive")
        for name in names[-3:]:
            os.mkfifo(source / "new")
            (source / "new").rename(source / name)
        first.join(60)
        c.trees.prepare_last()
        c.finish()
        assert account(c.source) == account(c.target)
        assert c.events[0]["left_out"], "rsync was not met with one"


# ---- changes that the size and time of a file do not tell


def same_second(path: Path) -> None:
    """Another text of the same length, and the same modification time."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def within_a_second(path: Path) -> None:
    """The second, but not the nanosecond, stays."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    second = before.st_mtime_ns // 10**9 * 10**9
    os.utime(path, ns=(second, second + (before.st_mtime_ns + 1) % 10**9))


@pytest.mark.parametrize("change", [same_second, within_a_second])
@pytest.mark.parametrize("names", [1, 2])
def test_a_change_within_the_same_second_arrives(
    source: Path, tmp_path: Path, change: Callable[[Path], None], names: int
) -> None:
    data = source / "#data"  # in a list of files, # begins a comment
    data.write_bytes(os.urandom(100_000))
    if names == 2:
        os.link(data, source / "etc/z")
    with copying(tmp_path, source) as c:
        c.trees.copy_while_running()
        c.trees.prepare_last()
        old = (c.target / "#data").read_bytes()
        change(data)
        c.finish()
        assert (c.target / "#data").read_bytes() != old
        assert account(c.source) == account(c.target)
        # By its time it is found the same in one case, and another in the other.
        assert (c.events[-1]["files"] == 0) == (change is same_second)


def test_a_mapped_page_that_is_written_again_arrives(source: Path, tmp_path: Path) -> None:
    """Only the first write to it changes the file's times."""
    path = source / "mapped"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as f, mmap.mmap(f.fileno(), 8192) as m, copying(tmp_path, source) as c:
        m[0] = 1
        c.trees.copy_while_running()
        m[0] = 2
        times = path.stat().st_mtime_ns
        c.trees.prepare_last()
        m[1] = 3
        c.finish()
        assert (c.target / "mapped").read_bytes()[:3] == b"\2\3\0"
        assert path.stat().st_mtime_ns >= times


def test_only_what_may_have_changed_is_compared_in_the_last_pass(
    source: Path, tmp_path: Path
) -> None:
    for n in range(50):
        (source / f"old{n}").write_bytes(os.urandom(1000))
        os.utime(source / f"old{n}", (1, 1))
    with copying(tmp_path, source) as c:
        # As if they had been there for an hour.
        support.wait_until(_second_has_passed(source), "files are older than the first pass")
        c.trees.copy_while_running()
        c.trees.prepare_last()
        same_second(source / "old7")
        c.finish()
        assert account(c.source) == account(c.target)
        assert (c.events[-1]["files"], c.events[-1]["compared"]) == (0, 1)


def test_more_files_may_have_changed_than_a_pipe_holds_names(source: Path, tmp_path: Path) -> None:
    for n in range(1500):
        (source / f"{n:0100}").write_bytes(b"x")
    with copying(tmp_path, source) as c:
        c.trees.copy_while_running()
        c.trees.prepare_last()
        same_second(source / f"{7:0100}")
        for n in range(1500):
            (source / f"{n:0100}").chmod(0o600)  # a new ctime
        c.finish()
        assert c.events[-1]["compared"] >= 1500
        assert account(c.source) == account(c.target)


def _second_has_passed(source: Path) -> Callable[[], bool]:
    newest = max(p.stat().st_ctime_ns for p in source.rglob("*")) // 10**9
    probe = source.parent / "probe"

    def passed() -> bool:
        probe.write_text("x")
        return probe.stat().st_ctime_ns // 10**9 > newest

    return passed


def test_where_mapped_writes_leave_no_trace_everything_is_compared(tmp_path: Path) -> None:
    support.needs("root", "rsync")
    made = tmp_path / "tmpfs"
    made.mkdir()
    with support.tmpfs(made, 8 << 20):
        (made / "mapped").write_bytes(bytes(4096))
        with (made / "mapped").open("r+b") as f, mmap.mmap(f.fileno(), 4096) as m:
            m[0] = 1
            with copying(tmp_path, made) as c:
                c.trees.copy_while_running()
                c.trees.prepare_last()
                m[0] = 2
                c.finish()
                assert c.events[-1]["everything"]
                assert account(made) == account(c.target)


# ---- names that come, go and move


def test_a_hard_link_that_is_broken_between_passes_does_not_mix_two_files(
    source: Path, tmp_path: Path
) -> None:
    (source / "a").write_bytes(b"one file" * 1000)
    os.link(source / "a", source / "b")
    with copying(tmp_path, source) as c:
        c.trees.copy_while_running()
        c.trees.prepare_last()
        (source / "b").unlink()
        (source / "b").write_bytes(b"another." * 1000)
        c.finish()
        assert account(c.source) == account(c.target)


def test_a_full_folder_for_temporary_files_cuts_no_list_short(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rsync ends with 0 although nothing of what it prints has found room."""
    (source / "a").write_bytes(b"one file" * 1000)
    os.link(source / "a", source / "b")
    full = tmp_path / "full"
    with support.tmpfs(full, 65536), copying(tmp_path, source) as c:
        (full / "user").write_bytes(b"x" * 65536)
        monkeypatch.setattr("tempfile.tempdir", str(full))
        c.trees.copy_while_running()
        assert c.events[0]["files"] == 2, "a name or two are the same file"
        c.trees.prepare_last()
        (source / "b").unlink()
        (source / "b").write_bytes(b"another." * 1000)
        c.finish()
        assert account(c.source) == account(c.target)


def test_what_is_deleted_replaced_or_moved_is_so_at_the_target(
    source: Path, tmp_path: Path
) -> None:
    for name in ("deep/er/x", "gone/y", "file becomes folder", "deep/z"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "becomes file").mkdir()
    with copying(tmp_path, source) as c:
        c.trees.copy_while_running()
        c.trees.prepare_last()
        (source / "deep/er").rename(source / "moved")
        shutil.rmtree(source / "gone")
        (source / "becomes file").rmdir()
        (source / "becomes file").symlink_to("etc")
        (source / "file becomes folder").unlink()
        (source / "file becomes folder").mkdir()
        c.finish()
        assert account(c.source) == account(c.target)


def test_a_folder_that_becomes_a_hard_link_is_no_failure(source: Path, tmp_path: Path) -> None:
    """rsync replaces it and ends with 23."""
    (source / "folder").mkdir()
    (source / "data").write_text("data")
    with copying(tmp_path, source) as c:
        c.trees.copy_while_running()
        c.trees.prepare_last()
        (source / "folder").rmdir()
        os.link(source / "data", source / "folder")
        c.finish()
        assert account(c.source) == account(c.target)


ACTIONS = ("write", "write", "write", "quiet", "link", "unlink", "rename", "mkdir", "move", "chmod")


class Vandal:
    """Does things to a tree, from a seed, until it is told to stop."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root, self._random = root, random.Random(seed)
        self._stop = threading.Event()
        self.done = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.0005):
            try:
                getattr(self, "_" + self._random.choice(ACTIONS))()
            except OSError:
                continue  # what it wanted to do cannot be done just now
            self.done += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _any(self, folders: bool = False) -> Path:
        found = [p for p in sorted(self._root.rglob("*")) if p.is_dir() == folders]
        return self._random.choice([*found, self._root / "etc/hosts"])

    def _new(self) -> Path:
        return self._random.choice([self._root, self._any(folders=True)]) / str(
            self._random.randrange(40)
        )

    def _write(self) -> None:
        path = self._random.choice([self._any(), self._new()])
        size = self._random.choice([0, 10, 5000, 5000, 70_000])
        with path.open("r+b" if path.exists() else "wb") as f:
            f.seek(self._random.randrange(3) * 4096)
            f.write(self._random.randbytes(size))

    def _quiet(self) -> None:
        same_second(self._any())

    def _link(self) -> None:
        os.link(self._any(), self._new())

    def _unlink(self) -> None:
        self._any().unlink()

    def _rename(self) -> None:
        self._any().rename(self._new())

    def _mkdir(self) -> None:
        self._new().mkdir()

    def _move(self) -> None:
        self._any(folders=True).rename(self._new())

    def _chmod(self) -> None:
        self._any().chmod(self._random.choice([0o600, 0o755, 0o4711]))


SEEDS = range(30 if os.environ.get("PYPLOOP_MATRIX") else 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tree_that_changes_all_the_time_arrives_as_it_was_last(
    source: Path, tmp_path: Path, seed: int
) -> None:
    vandal = Vandal(source, seed)
    try:
        support.wait_until(lambda: vandal.done > 100, "there is something to copy")
        with copying(tmp_path, source) as c:
            c.trees.copy_while_running()
            c.trees.prepare_last()
            vandal.stop()
            c.finish()
            assert account(c.source) == account(c.target)
            assert len(c.events) > 1
    finally:
        vandal.stop()


# ---- what fails, and what is refused


def test_a_full_target_fails_with_rsyncs_reason(source: Path, tmp_path: Path) -> None:
    (source / "big").write_bytes(os.urandom(4 << 20))
    target = tmp_path / "target"
    target.mkdir()
    with (
        support.tmpfs(target, 1 << 20),
        copying(tmp_path, source) as c,
        pytest.raises(MigrateError, match="No space left") as e,
    ):
        c.trees.copy_while_running()
    assert e.value.exit_code == 6


def test_a_file_that_never_arrives_fails_before_anything_is_suspended(
    source: Path, tmp_path: Path
) -> None:
    """What is mounted in its place does not give way."""
    (source / "busy").write_text("a file")
    with (
        support.mounted("none", tmp_path / "target/busy", fstype="tmpfs"),
        copying(tmp_path, source) as c,
    ):
        with pytest.raises(MigrateError, match=r"ended with status 23: .*busy") as e:
            c.trees.copy_while_running()
        assert e.value.exit_code == 6
        assert [x["phase"] for x in c.events] == ["first pass", "round 1"]


def test_after_a_pass_whose_server_is_killed_another_one_brings_everything(
    source: Path, tmp_path: Path
) -> None:
    (source / "big").write_bytes(os.urandom(4 << 20))
    with copying(tmp_path, source, options=Options(stall=20, rate=2 << 20)) as c:
        copy = Job(c.trees.copy_while_running).start()
        pids: list[str] = []

        def begun() -> bool:
            pids[:] = support.run(
                "pgrep", "-f", f"rsync --server .*{tmp_path}/state/tree-0.0", check=False
            ).split()
            return len(pids) > 1  # generator and receiver: it writes

        support.wait_until(begun, "the server runs")
        for pid in pids:
            os.kill(int(pid), 9)
        copy.join(60)
        assert ["ended with" in e["left_out"] for e in c.events][:2] == [True, False], c.events
        c.trees.prepare_last()
        c.finish()
        assert account(c.source) == account(c.target)


def test_a_forecast_that_never_fits_suspends_nothing(source: Path, tmp_path: Path) -> None:
    options = Options(stall=20, policy=Policy(max_freeze=1e-6, deadline=0.2))
    with copying(tmp_path, source, options=options) as c, pytest.raises(LoopError, match="allows"):
        c.trees.copy_while_running()


def test_a_peer_can_neither_read_nor_write_elsewhere_nor_choose_how(
    source: Path, tmp_path: Path
) -> None:
    """The server's rsync, spoken to by a client that asks for more."""
    relay = tmp_path / "rsh"
    asked = {
        "read": ["-e", relay, "pyploop::tree/", tmp_path / "stolen"],
        "list": ["-e", relay, "pyploop::"],
        "another module": ["-e", relay, source / "etc", "pyploop::etc/"],
        "above": ["-a", "-e", relay, f"{source}/etc", "pyploop::tree/../../outside/"],
        "devices": ["-a", "--write-devices", "-e", relay, f"{source}/", "pyploop::tree/"],
        "backups": ["-a", "--backup-dir=/etc", "-e", relay, f"{source}/", "pyploop::tree/"],
        "links": ["-a", "-K", "-e", relay, f"{source}/", "pyploop::tree/"],
        "log": ["-a", "-M--log-file=/x", "-e", relay, f"{source}/", "pyploop::tree/"],
        "elsewhere": ["-a", "--link-dest=/etc", "-e", relay, f"{source}/", "pyploop::tree/"],
    }
    with copying(tmp_path, source) as c:
        c.trees.copy_while_running()
        config = tmp_path / "state/tree-0.0.conf"
        relay.write_text(f"#!/bin/sh\nexec rsync --server --daemon --config={config} .\n")
        relay.chmod(0o755)
        before = account(tmp_path)
        for what, words in asked.items():
            done = subprocess.run(
                ["rsync", *map(str, words)], capture_output=True, text=True, check=False
            )
            inside = what == "above" and (c.target / "outside").exists()
            assert done.returncode or what == "list" or inside, (what, done)
            assert "tree" not in done.stdout or what != "list"
            if inside:  # in its chroot, .. leads nowhere
                shutil.rmtree(c.target / "outside")
        left = {k: v for k, v in account(tmp_path).items() if not k.startswith("state")}
        known = {k: v for k, v in before.items() if not k.startswith("state")}
        left.pop("target"), known.pop("target")
        assert left == known


@pytest.mark.parametrize(
    "words",
    [
        *(["-e", "sh"], ["--rsh=sh"], ["--rsync-path=x"], ["-M--x"], ["--daemon"], ["--config=x"]),
        *(["--files-from=x"], ["--exclude=x"], ["-f", "x"], ["--remove-source-files"], ["-n"]),
        *(["--backup"], ["-b"], ["--temp-dir=/x"], ["--log-file=x"], ["--inplace"], ["--append"]),
        *(["-avb"], ["/etc/", "x::y"], ["--"], ["-z", "host:"], ["--bwlimit"], ["--size-only"]),
        ["--cc=none"],
        ["--checksum-choice", "xxh3,none"],
    ],
)
def test_an_option_that_is_not_for_speed_is_refused(words: list[str]) -> None:
    with pytest.raises(MigrateError) as e:
        rsync_options.check_options(words)
    assert e.value.exit_code == 1


def test_options_for_speed_are_taken_and_work(source: Path, tmp_path: Path) -> None:
    words = "-z --bwlimit 100000 -aHAX --whole-file --compress-level=1 -B 2000 -c --numeric-ids"
    taken = rsync_options.check_options(words.split())
    assert "--bwlimit=100000" in taken
    assert "--block-size=2000" in taken
    assert rsync_options.check_options(["-B2000", "-B=2000"]) == ("--block-size=2000",) * 2
    with copying(tmp_path, source, *taken) as c:
        c.trees.copy_while_running()
        c.trees.prepare_last()
        c.finish()
        assert account(c.source) == account(c.target)
