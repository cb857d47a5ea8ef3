# SPDX-License-Identifier: Apache-2.0
"""A finished copy is never thrown away: what becomes of the target when something
fails after its data are durable, and on file systems that lack operations."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support

from pyploop import _core
from pyploop.cli import copy as cli
from pyploop.cli import thaw
from pyploop.diskcopy import target_name, write_mode
from pyploop.diskcopy.target_file import Sink
from pyploop.disks.backing import Below, FileSystem
from pyploop.errors import CreateError, Interrupted
from pyploop.report.events import Reporter, TextRenderer
from pyploop.system import kernel
from pyploop.undo.journal import folder

DATA = os.urandom(100_000)
Patch = pytest.MonkeyPatch


def failing(real: Callable[..., Any], code: int, when: Callable[..., bool]) -> Callable[..., Any]:
    """`real`, which fails for such arguments."""

    def call(*args: Any, **more: Any) -> Any:
        if when(*args, **more):
            raise OSError(code, os.strerror(code))
        return real(*args, **more)

    return call


def without_tmpfile(patch: Patch) -> None:
    def tmpfile(path: Any, flags: int, *rest: Any, **more: Any) -> bool:
        return flags & os.O_TMPFILE == os.O_TMPFILE

    patch.setattr(os, "open", failing(os.open, errno.EOPNOTSUPP, tmpfile))


def without_noreplace(patch: Patch) -> None:
    without_tmpfile(patch)
    patch.setattr(kernel, "rename_noreplace", failing(print, errno.EINVAL, lambda *a: True))


def without_links(patch: Patch) -> None:
    without_noreplace(patch)
    patch.setattr(os, "link", failing(os.link, errno.EPERM, lambda *a, **k: True))


FILE_SYSTEMS: dict[str, Callable[[Patch], None]] = {
    "all": lambda patch: None,
    "no O_TMPFILE": without_tmpfile,
    "no RENAME_NOREPLACE": without_noreplace,
    "no links": without_links,
}


@pytest.fixture(params=FILE_SYSTEMS)
def any_fs(request: pytest.FixtureRequest, monkeypatch: Patch) -> str:
    FILE_SYSTEMS[request.param](monkeypatch)
    return str(request.param)


def copy(tmp_path: Path, *args: str) -> int:
    """A local copy of DATA to `t/image`, in this process; the exit code."""
    (tmp_path / "source").write_bytes(DATA)
    (tmp_path / "t").mkdir(exist_ok=True)
    return cli.run(["-s", str(tmp_path / "source"), "-d", str(tmp_path / "t/image"), *args], 3)


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


# ---- every kind of file system


def test_a_copy_gets_its_name_on_any_file_system(
    tmp_path: Path, any_fs: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert copy(tmp_path) == 0
    assert (tmp_path / "t/image").read_bytes() == DATA
    assert names(tmp_path / "t") == ["image"]
    assert (tmp_path / "t/image").stat().st_mode & 0o7777 == 0o600
    assert ("until it is complete" in capfd.readouterr().out) == (any_fs != "all")
    assert list(folder().glob("*.json")) == []


@pytest.mark.invariant(number=7)
def test_a_name_that_was_taken_meanwhile_is_not_replaced_and_the_copy_is_kept(
    tmp_path: Path, any_fs: str
) -> None:
    with pytest.raises(CreateError) as e, Sink(str(tmp_path / "image")) as sink:
        os.write(sink.fd, DATA)
        (tmp_path / "image").write_text("mine")
        sink.commit()
    assert (tmp_path / "image").read_text() == "mine"
    (kept,) = (p for p in tmp_path.iterdir() if p.name != "image")
    assert kept.name.startswith("image.complete-")
    assert kept.read_bytes() == DATA
    assert f"File exists; {kept} is complete and was kept" in str(e.value)
    assert e.value.exit_code == 1


def test_a_signal_after_the_name_was_given_leaves_the_file_and_says_so(
    tmp_path: Path, any_fs: str
) -> None:
    with pytest.raises(Interrupted) as e, Sink(str(tmp_path / "image")) as sink:
        sink.commit()
        raise Interrupted(15)
    assert names(tmp_path) == ["image"]
    assert f"{tmp_path / 'image'} is complete and was kept" in e.value.state


def test_a_file_system_that_links_no_nameless_file_is_found_before_the_first_byte(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """O_TMPFILE without a link from /proc, as on a file system that lies."""
    monkeypatch.setattr(os, "link", failing(os.link, errno.EPERM, lambda *a, **k: True))
    with Sink(str(tmp_path / "image")) as sink:
        assert sink.temporary is not None
        sink.commit()
    assert names(tmp_path) == ["image"]


def test_a_file_system_that_can_rename_nothing_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    without_links(monkeypatch)
    monkeypatch.setattr(os, "rename", failing(os.rename, errno.EIO, lambda *a, **k: True))
    with pytest.raises(CreateError, match="Input/output error"):
        Sink(str(tmp_path / "image"))
    assert names(tmp_path) == []


# ---- failures after the data are durable


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_folder_that_cannot_be_synced_costs_a_note_only(
    tmp_path: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    synced: list[str] = []
    real = kernel.syncfs
    monkeypatch.setattr(os, "fsync", failing(os.fsync, code, lambda fd: True))

    def syncfs(fd: int, path: str) -> None:
        synced.append(path)
        real(fd, path)

    monkeypatch.setattr(kernel, "syncfs", syncfs)
    assert copy(tmp_path) == 0
    assert (tmp_path / "t/image").read_bytes() == DATA
    assert synced == [str(tmp_path / "t/image")]
    assert "cannot sync a folder, so all of it was synced" in capfd.readouterr().out


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOSPC])
def test_a_folder_whose_sync_fails_ends_with_16_and_the_file_stays(
    tmp_path: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(os.fsync, code, lambda fd: True))
    assert copy(tmp_path) == 16
    assert (tmp_path / "t/image").read_bytes() == DATA
    assert "t/image is complete and was kept" in capfd.readouterr().err


def test_a_file_system_whose_substitute_fails_ends_with_16_and_the_file_stays(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EINVAL, lambda fd: True))
    monkeypatch.setattr(kernel, "syncfs", failing(kernel.syncfs, errno.EIO, lambda *a: True))
    assert copy(tmp_path) == 16
    assert (tmp_path / "t/image").read_bytes() == DATA


def test_a_file_that_cannot_be_synced_alone_is_with_its_file_system(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    lacking = failing(_core.fdatasync, errno.EINVAL, lambda fd: True)
    monkeypatch.setattr("pyploop.diskcopy.target_file.fdatasync", lacking)
    assert copy(tmp_path) == 0
    monkeypatch.setattr(kernel, "syncfs", failing(kernel.syncfs, errno.EIO, lambda *a: True))
    (tmp_path / "t/image").unlink()
    assert copy(tmp_path) == 16
    assert names(tmp_path / "t") == []


def test_a_folder_that_was_renamed_meanwhile_is_reported_by_its_new_name(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(Interrupted) as e, Sink(str(tmp_path / "t/image")) as sink:
        (tmp_path / "t").rename(tmp_path / "u")
        sink.commit()
        raise Interrupted(15)
    assert f"{tmp_path / 'u/image'} is complete and was kept" in e.value.state
    assert names(tmp_path / "u") == ["image"]


def test_a_folder_that_was_moved_meanwhile_is_said(tmp_path: Path) -> None:
    said = io.StringIO()
    report = Reporter()
    report.add(TextRenderer(3, said, said))
    (tmp_path / "t").mkdir()
    with Sink(str(tmp_path / "t/image"), report) as sink:
        (tmp_path / "t").rename(tmp_path / "u")
        sink.commit()
    assert f"was moved: the target is {tmp_path / 'u/image'}" in said.getvalue()


@pytest.mark.root
@pytest.mark.parametrize("how", ["hidden", "unmounted"])
def test_a_complete_target_that_no_path_leads_to_is_no_success(tmp_path: Path, how: str) -> None:
    point, real = tmp_path / "t", tmp_path / "real"
    point.mkdir()
    real.mkdir()
    with contextlib.ExitStack() as undo:
        if how == "unmounted":
            support.run("mount", "--bind", real, point)
        with pytest.raises(CreateError) as e, Sink(str(point / "image")) as sink:
            if how == "unmounted":
                support.run("umount", "-l", point)
            else:
                undo.enter_context(support.tmpfs(point, 1 << 20))
            sink.commit()
    assert "no path leads to it" in str(e.value)
    assert names(real if how == "unmounted" else point) == ["image"]


def test_nothing_is_said_of_a_file_whose_owner_undoes_it(tmp_path: Path) -> None:
    """A migration, that is: its journal has the file."""
    with pytest.raises(CreateError) as e, Sink(str(tmp_path / "a"), owner_undoes=True) as sink:
        (tmp_path / "a").write_text("mine")
        sink.commit()
    assert "kept" not in str(e.value)
    assert names(tmp_path) == ["a"]


@pytest.mark.invariant(number=2)
@pytest.mark.invariant(number=7)
def test_data_that_cannot_be_synced_are_no_target(tmp_path: Path, monkeypatch: Patch) -> None:
    broken = failing(_core.fdatasync, errno.EIO, lambda fd: True)
    monkeypatch.setattr("pyploop.diskcopy.target_file.fdatasync", broken)
    assert copy(tmp_path) == 16
    assert names(tmp_path / "t") == []


def test_a_folder_that_was_removed_meanwhile_leaves_the_copy_in_the_one_above(
    tmp_path: Path,
) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(CreateError) as e, Sink(str(tmp_path / "t/image")) as sink:
        os.write(sink.fd, DATA)
        (tmp_path / "t").rmdir()
        sink.commit()
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == DATA
    assert f"{kept} is complete and was kept" in str(e.value)


@pytest.mark.root
@pytest.mark.invariant(number=7)
def test_a_folder_that_takes_no_name_any_more_does_not_lose_the_copy(
    tmp_path: Path, any_fs: str
) -> None:
    support.needs("root", "chattr")
    (tmp_path / "t").mkdir()
    probe = subprocess.run(["chattr", "+i", tmp_path / "t"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("no immutable folders on this file system")
    subprocess.run(["chattr", "-i", tmp_path / "t"], check=True)
    try:
        with pytest.raises(CreateError) as e, Sink(str(tmp_path / "t/image")) as sink:
            os.write(sink.fd, DATA)
            subprocess.run(["chattr", "+i", tmp_path / "t"], check=True)
            sink.commit()
    finally:
        subprocess.run(["chattr", "-i", tmp_path / "t"], check=True)
    (kept,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert kept.read_bytes() == DATA
    assert f"{kept} is complete and was kept" in str(e.value)
    if any_fs != "all":
        # It had to keep the name of an unfinished file, and is none.
        fd = os.open(tmp_path / "t", os.O_RDONLY)
        assert target_name.left_behind(fd, "image") == []
        os.close(fd)
        assert kept.exists()


def test_an_answer_that_was_lost_is_no_failure(tmp_path: Path, monkeypatch: Patch) -> None:
    """A rename over a network that took place, and is answered by an error."""
    without_noreplace(monkeypatch)
    real = os.link

    def link(*args: Any, **more: Any) -> None:
        real(*args, **more)
        if more.get("follow_symlinks") is False and args[1] == "image":
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link)
    assert copy(tmp_path) == 0
    assert names(tmp_path / "t") == ["image"]


@pytest.mark.invariant(number=7)
def test_a_command_before_the_thaw_that_fails_leaves_the_complete_target(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert copy(tmp_path, "--before-thaw", "false") == 12
    assert (tmp_path / "t/image").read_bytes() == DATA
    assert "t/image is complete and was kept" in capfd.readouterr().err


def test_a_trace_and_events_that_cannot_be_written_do_not_spoil_the_copy(tmp_path: Path) -> None:
    assert copy(tmp_path, "--trace", "/dev/full", "--json", "/dev/full") == 0
    assert (tmp_path / "t/image").read_bytes() == DATA


# ---- parts


def part(path: Path, name: str = "image", boot: str | None = None) -> Path:
    boot = boot or kernel.boot_id()[:8]
    made = path / f".{name}.{boot}-0123abcd.part"
    made.write_bytes(b"unfinished")
    made.chmod(0o600)
    return made


def left_behind(path: Path) -> list[str]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return target_name.left_behind(fd, "image")
    finally:
        os.close(fd)


def test_what_a_killed_copy_left_is_removed_by_the_next_one_which_says_so(
    tmp_path: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t").mkdir()
    left = part(tmp_path / "t")
    without_tmpfile(monkeypatch)
    assert copy(tmp_path) == 0
    assert names(tmp_path / "t") == ["image"]
    assert f"Removed {left}, left by a copy that was killed" in capfd.readouterr().out


def test_what_a_killed_copy_left_is_removed_by_pyploop_thaw(tmp_path: Path) -> None:
    code = (
        "import errno, os, signal\n"
        "real = os.open\n"
        "def no(path, flags, *a, **k):\n"
        "    if flags & os.O_TMPFILE == os.O_TMPFILE:\n"
        "        raise OSError(errno.EOPNOTSUPP, '')\n"
        "    return real(path, flags, *a, **k)\n"
        "os.open = no\n"
        "from pyploop.diskcopy.target_file import Sink\n"
        f"Sink({str(tmp_path / 'image')!r})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [support.pyploop_cmd()[0], "-c", code]
    subprocess.run(command, env=support.pyploop_env(), check=False, timeout=20)
    (left,) = tmp_path.iterdir()
    thawed = support.run(*support.pyploop_cmd(), "thaw", "--all", env=support.pyploop_env())
    assert f"remove {left}" in thawed
    assert names(tmp_path) == []
    assert list(folder().glob("*.json")) == []


def test_a_signal_as_the_part_is_made_leaves_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    without_tmpfile(monkeypatch)
    real = target_name.lock_part

    def interrupted(fd: int) -> None:
        real(fd)
        if len(names(tmp_path)) == 1 and tried:
            raise Interrupted(15)
        tried.append(fd)

    tried: list[int] = []
    monkeypatch.setattr(target_name, "lock_part", interrupted)
    with pytest.raises(Interrupted):
        Sink(str(tmp_path / "image"))
    assert names(tmp_path) == []
    assert list(folder().glob("*.json")) == []


def test_the_part_of_a_living_copy_is_not_touched(tmp_path: Path, monkeypatch: Patch) -> None:
    without_tmpfile(monkeypatch)
    with Sink(str(tmp_path / "image")) as sink:
        assert left_behind(tmp_path) == []
        assert thaw.run(["--all"], 0) == 0
        assert names(tmp_path) == [sink.temporary]


NOT_OURS: dict[str, Callable[[Path], object]] = {
    "another name": lambda p: part(p, "image2"),
    "a name that only begins alike": lambda p: (p / ".image.part").write_text("x"),
    "no random part": lambda p: (p / ".image.0123abcd-xyz.part").write_text("x"),
    "a folder": lambda p: (p / f".image.{kernel.boot_id()[:8]}-0123abcd.part").mkdir(),
    "a symbolic link": lambda p: (p / f".image.{kernel.boot_id()[:8]}-0123abcd.part").symlink_to(
        part(p, "image2")
    ),
    "a pipe": lambda p: os.mkfifo(p / f".image.{kernel.boot_id()[:8]}-0123abcd.part"),
    "complete": lambda p: part(p).chmod(target_name.COMPLETE),
    "perhaps of another machine": lambda p: part(p, boot="00000000"),
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_what_only_looks_alike_is_not_touched(tmp_path: Path, case: str) -> None:
    NOT_OURS[case](tmp_path)
    before = names(tmp_path)
    assert left_behind(tmp_path) == []
    assert names(tmp_path) == before


@pytest.mark.root
def test_the_part_of_another_user_is_not_touched(tmp_path: Path) -> None:
    support.needs("root")
    os.chown(part(tmp_path), support.NOBODY, support.NOBODY)
    assert left_behind(tmp_path) == []
    assert len(names(tmp_path)) == 1


def test_the_part_of_an_earlier_boot_is_removed_when_nobody_wrote_for_a_day(tmp_path: Path) -> None:
    old = part(tmp_path, boot="00000000")
    os.utime(old, (0, time.time() - target_name.OLD - 60))
    assert left_behind(tmp_path) == [old.name]
    assert names(tmp_path) == []


def test_a_part_that_is_taken_for_left_behind_as_it_is_made_ends_the_copy(tmp_path: Path) -> None:
    made = part(tmp_path)
    with made.open("rb") as mine, made.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="Stale"):
            target_name.lock_part(mine.fileno())
        made.unlink()
        fcntl.flock(other, fcntl.LOCK_UN)
        with pytest.raises(OSError, match="Stale"):
            target_name.lock_part(mine.fileno())


# ---- real file systems


@contextlib.contextmanager
def fuse(command: list[str], point: Path) -> Iterator[Path]:
    point.mkdir()
    subprocess.run(command, check=True, capture_output=True, timeout=20)
    try:
        yield point
    finally:
        support.unmount(point)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["sshfs", "bindfs", "sshfs without links"])
def test_a_copy_to_a_file_system_in_user_space(tmp_path: Path, kind: str) -> None:
    program = kind.split(maxsplit=1)[0]
    server = "/usr/lib/openssh/sftp-server"
    support.needs("root", program, *([server] if program == "sshfs" else []))
    if not os.path.exists("/dev/fuse"):
        support.missing("needs /dev/fuse")
    behind = tmp_path / "behind"
    behind.mkdir()
    script = tmp_path / "ssh"
    script.write_text(f"#!/bin/sh\nexec {server}\n")
    script.chmod(0o700)
    commands = {
        "bindfs": ["bindfs", str(behind), str(tmp_path / "t")],
        "sshfs": ["sshfs", "-o", f"ssh_command={script}", f"h:{behind}", str(tmp_path / "t")],
    }
    command = commands[program]
    if "without" in kind:
        command += ["-o", "disable_hardlink"]
    with fuse(command, tmp_path / "t"):
        assert copy(tmp_path) == 0
        assert names(tmp_path / "t") == ["image"]
    assert (behind / "image").read_bytes() == DATA
    assert names(behind) == ["image"]


def test_a_target_that_exists_is_named_for_what_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name, words in {
        "/dev/null": "it is a character device",
        str(tmp_path / "dir"): "it is a folder. Hint: name a file in it",
        str(tmp_path / "link"): "it is a symbolic link",
        str(tmp_path / "pipe"): "it is a named pipe",
        str(tmp_path / "file"): "File exists (it was not touched)",
    }.items():
        assert cli.run(["-s", "/etc/hostname", "-d", name], 0) == 1
        assert words in capfd.readouterr().err


@pytest.mark.root
def test_a_block_device_as_target_is_refused_with_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    support.needs("loop")
    (tmp_path / "img").write_bytes(bytes(1 << 20))
    with support.loop_device(tmp_path / "img") as device:
        assert cli.run(["-s", "/etc/hostname", "-d", device], 0) == 1
    assert "it is a block device. Hint: to write onto the device itself, add --to-device" in (
        capfd.readouterr().err
    )


# ---- how it is written


@pytest.mark.parametrize(
    ("types", "asked", "words"),
    [
        (["ext4"], "auto", "O_DIRECT"),
        (["overlay", "xfs"], "auto", "O_DIRECT"),
        (["overlay", "tmpfs"], "direct", "buffered (tmpfs has no disk)"),
        (["nfs4"], "auto", "buffered (on nfs4; --write direct is tried there)"),
        (["nfs4"], "direct", "O_DIRECT"),
        ([], "auto", "buffered (on an unknown file system"),
        (["ext4"], "buffered", "buffered (--write)"),
    ],
)
def test_the_file_system_that_has_the_blocks_decides_how_a_target_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    types: list[str],
    asked: write_mode.Write,
    words: str,
) -> None:
    monkeypatch.setattr(kernel, "direct_alignment", lambda fd, path: None)  # Linux before 6.1
    below = Below(file_systems=[FileSystem((0, i), t, t, "/", None) for i, t in enumerate(types)])
    with (tmp_path / "file").open("w") as f:
        mode = write_mode.choose(f.fileno(), "file", asked, below)
    assert mode.words.startswith(words)
    assert mode.direct == ((4096, 512) if words == "O_DIRECT" else None)
    assert mode.ahead == (words == "O_DIRECT" and asked == "auto")


def test_a_file_that_the_kernel_does_not_write_directly_is_written_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "direct_alignment", lambda fd, path: (0, 0))
    below = Below(file_systems=[FileSystem((0, 1), "ext4", "/", "/", None)])
    with (tmp_path / "file").open("w") as f:
        mode = write_mode.choose(f.fileno(), "file", "direct", below)
    assert mode.direct is None
    assert mode.words == "buffered (the file system does not take O_DIRECT for this file)"
