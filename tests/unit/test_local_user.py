# SPDX-License-Identifier: Apache-2.0
"""What a local user may do meanwhile: hold locks, fill file systems, make links first."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support import loop_device, needs, run, tmpfs

from pyploop import libploop
from pyploop.cli import demo_disk
from pyploop.diskcopy import target_file
from pyploop.disks import opening
from pyploop.errors import BusyError, CreateError, DeviceError, OpenError
from pyploop.migration import locks, undo_kinds
from pyploop.migration.source.move import Move
from pyploop.migration.source.request import Request
from pyploop.report.events import Reporter
from pyploop.runtimes import Disk, volumes
from pyploop.runtimes.config import HostConfig
from pyploop.system import commands, private_folder, shared_folder, sysblock
from pyploop.undo import journal
from pyploop.undo.journal import Journal

NOBODY = 65534


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """What the body makes is this user's."""
    needs("root")
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Like /tmp."""
    needs("root")
    made = tmp_path / "shared"
    made.mkdir()
    made.chmod(0o1777)
    for folder in (made, *made.parents[:-1]):
        if not folder.stat().st_mode & 0o001:  # pytest's own are 0700
            folder.chmod(folder.stat().st_mode | 0o011)
    return made


def within(seconds: float, work: Callable[[], object]) -> None:
    """Fails when it takes longer."""
    done = threading.Event()

    def one() -> None:
        work()
        done.set()

    threading.Thread(target=one, daemon=True).start()
    assert done.wait(seconds), "it waits for somebody who may hold it for ever"


# ---- locks


def _take(folder: Path) -> None:
    with locks.container_lock(folder, "101"):
        pass


def _exclude(folder: Path) -> None:
    with locks.exclusive(folder):
        pass


def _replay(folder: Path) -> None:
    with journal.replaying(folder):
        pass


@pytest.mark.parametrize("use", [_take, _exclude, locks.remove_dead, _replay])
def test_a_folder_that_others_can_read_is_not_what_is_locked(
    tmp_path: Path, use: Callable[[Path], None]
) -> None:
    tmp_path.chmod(0o755)  # as vzctl's is
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # whoever can read it can do that
        within(5, lambda: use(tmp_path))
    finally:
        os.close(fd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_two_processes_of_one_user_still_wait_for_each_other(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with journal.replaying(tmp_path), pytest.raises(BusyError, match="is running"):
        journal.replaying(tmp_path).__enter__()
    inside, most = 0, 0

    def one() -> None:
        nonlocal inside, most
        for _ in range(50):
            with locks.exclusive(tmp_path):
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=one) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (most, list(tmp_path.iterdir())) == (1, [])


def test_a_dead_lock_whose_pid_another_user_s_process_has_by_now_is_taken_over(
    tmp_path: Path,
) -> None:
    user = subprocess.Popen(["setpriv", f"--reuid={NOBODY}", "sleep", "60"])
    try:
        while os.stat(f"/proc/{user.pid}").st_uid != NOBODY:
            pass
        (tmp_path / "101.lck").write_text(f"{user.pid}\n")
        with locks.container_lock(tmp_path, "101"):
            assert int((tmp_path / "101.lck").read_text()) == os.getpid()
    finally:
        user.kill()
        user.wait()


def test_unreadable_journals_are_reported(shared: Path) -> None:
    folder = shared / "run"
    folder.mkdir(mode=0o700)
    with as_user(NOBODY):
        with pytest.raises(OpenError, match="Permission denied"):
            journal.records(folder)
        with pytest.raises(OpenError, match="Permission denied"):
            journal.replaying(folder).__enter__()


# ---- full file systems


def test_a_full_file_system_of_the_journal_keeps_no_step_from_being_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    kind = journal.Kind(lambda e: done.append(e["what"]), outlives_boot=True, keep=None)
    monkeypatch.setitem(journal._kinds, "a step", kind)
    needs("root")
    state = tmp_path / "state"
    with tmpfs(state, 65536):
        state.chmod(0o700)
        log = Journal.create("a test", state)
        for what in ("suspend", "dump", "copy"):
            log.add({"kind": "a step", "what": what})
        number = 0
        while True:  # a user takes all that there is
            try:
                (state / f"user.{number}").write_bytes(b"x" * 4096)
            except OSError:
                break
            number += 1
        assert undo_kinds.undo_all(log) == []
        assert done == ["copy", "dump", "suspend"]
        assert not list(state.glob("*.json"))


def test_a_full_folder_for_temporary_files_keeps_no_command_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "which cannot be used"))
    assert commands.run(["echo", "resumed"], 8, 10) == "resumed\n"


# ---- what lies there first


def test_a_log_goes_through_no_link_of_another_user(shared: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("root's own")
    with as_user(NOBODY):
        (shared / "log").symlink_to(precious)
        os.mkfifo(shared / "fifo")
        (shared / "file").write_text("theirs")
        (shared / "folder").symlink_to(tmp_path)
    os.link(precious, shared / "hard")
    for name in ("log", "fifo", "file", "hard", "folder/new"):
        with pytest.raises(OpenError, match="is not"):
            shared_folder.open_log(str(shared / name)).close()
    assert precious.read_text() == "root's own"
    assert not (tmp_path / "new").exists()
    assert (shared / "file").read_text() == "theirs"


def test_a_log_of_one_s_own_is_written_as_ever(shared: Path, tmp_path: Path) -> None:
    (shared / "old").write_text("a longer text than the new one")
    (shared / "link").symlink_to(shared / "behind")
    (shared / "folder").symlink_to(tmp_path)
    for name in ("old", "new", "link", "folder/in"):
        with shared_folder.open_log(str(shared / name)) as f:
            f.write("new")
        assert (shared / name).read_text() == "new"
    os.mkfifo(shared / "fifo")
    reader = os.open(shared / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with shared_folder.open_log(str(shared / "fifo")) as f:
        f.write("new")
    assert os.read(reader, 9) == b"new"
    os.close(reader)


def test_no_target_is_made_behind_a_link_of_another_user(shared: Path, tmp_path: Path) -> None:
    with as_user(NOBODY):
        (shared / "folder").symlink_to(tmp_path)
    with pytest.raises(CreateError, match="user 65534 owns the link"):
        target_file.Sink(str(shared / "folder" / "image"))
    assert not (tmp_path / "image").exists()


def test_a_complete_copy_whose_name_was_taken_stays_in_its_folder_when_that_is_swapped(
    shared: Path, tmp_path: Path
) -> None:
    theirs, elsewhere = shared / "theirs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with as_user(NOBODY):
        theirs.mkdir()
    with (
        pytest.raises(CreateError, match="complete"),
        target_file.Sink(str(theirs / "image")) as target,
    ):
        target.set_size(4096)
        with as_user(NOBODY):
            (theirs / "image").write_text("taken")
            theirs.rename(shared / "moved")
            theirs.symlink_to(elsewhere)
        target.commit()
    assert list(elsewhere.iterdir()) == []
    assert any("complete" in p.name for p in (shared / "moved").iterdir())


def test_a_complete_copy_is_kept_above_when_its_folder_is_gone(shared: Path) -> None:
    folder = shared / "folder"
    folder.mkdir()
    with pytest.raises(CreateError), target_file.Sink(str(folder / "image")) as target:
        target.set_size(4096)
        folder.rmdir()
        target.commit()
    assert [p.name.split("-")[0] for p in shared.iterdir()] == ["image.complete"]


def test_an_image_that_becomes_a_fifo_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 4096)
    attached = sysblock.loop_device_of

    def swap(path: str) -> list[str]:
        found = attached(path)
        image.unlink()
        os.mkfifo(image)
        return found

    monkeypatch.setattr(sysblock, "loop_device_of", swap)

    def use() -> None:
        with pytest.raises(DeviceError, match="not a regular file any more"):
            opening.open_source(str(image))

    within(5, use)


@pytest.mark.root
def test_a_backing_file_that_a_fifo_has_replaced_is_not_waited_for(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * (1 << 20))
    with loop_device(image) as path:
        image.unlink()
        os.mkfifo(tmp_path / "image (deleted)")  # as sysfs calls it now

        def use() -> None:
            source = opening.open_source(path)
            assert "is another file now" in source.io_mode
            source.close()

        within(20, use)


@pytest.mark.root
def test_who_keeps_a_container_s_disk_mounted_is_named(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("mkfs.ext4")
    monkeypatch.setattr(volumes, "BUSY_DEADLINE", 0.1)
    image, point = tmp_path / "image", shared / "root"
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    run("mkfs.ext4", "-q", image)
    point.mkdir()
    volumes.mount(Disk(str(image), str(point), "ext4", "rw"))
    user = subprocess.Popen(["setpriv", f"--reuid={NOBODY}", "sleep", "60"], cwd=point)
    try:
        while os.stat(f"/proc/{user.pid}").st_uid != NOBODY:
            pass
        with pytest.raises(OSError, match=f"process {user.pid} .sleep. of user {NOBODY}"):
            volumes.unmount({"mount": str(point), "image": str(image)})
    finally:
        user.kill()
        user.wait()
        volumes.unmount({"mount": str(point), "image": str(image)})


def test_the_folder_of_a_dump_is_not_named_by_what_the_target_shows(tmp_path: Path) -> None:
    host = HostConfig(state_dir=str(tmp_path / "state"), images_dir=str(tmp_path))
    runtime = cast(Any, SimpleNamespace(name="runc", container="box", keep_fds=(), instance={}))
    request = Request("b", live=True)
    move = Move(host, runtime, request, Reporter(), cast(Any, None), copied={})
    (tmp_path / f"pyploop-{move.id}-out").mkdir()  # by who saw pyploop-ID there
    move.begin_memory(None, 0)
    assert undo_kinds.undo_all(move._journal) == []
    move._lock.close(remove=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"pyploop-{move.id}-out", "state"]


def test_the_demo_s_folder_is_not_one_that_others_can_replace(shared: Path) -> None:
    shared.chmod(0o777)
    with pytest.raises(OpenError, match="others can write to"):
        demo_disk.run_demo(1 << 20, str(shared))


@pytest.mark.parametrize("what", ["fifo", "file", "link"])
def test_the_alias_of_libploop_is_not_another_user_s(shared: Path, what: str) -> None:
    path = shared / "libploop.py"
    with as_user(NOBODY):
        if what == "fifo":
            os.mkfifo(path)
        elif what == "file":
            path.write_text(libploop.ALIAS)
        else:
            path.symlink_to("/etc/hostname")

    def use() -> None:
        with pytest.raises(OSError):
            libploop._write_alias(str(shared))

    within(5, use)


def test_the_guard_file_is_not_reached_through_a_link(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / private_folder.GUARD).symlink_to("/etc/hostname")
    with pytest.raises(OpenError, match="not a regular file"):
        _take(tmp_path)
