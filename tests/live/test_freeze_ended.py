# SPDX-License-Identifier: Apache-2.0
"""Somebody else ends what is held, or writes all the same: the copy fails with
14, before END without a target, after it with the word that the source is newer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, is_frozen, loop_device, needs, run, wait_until
from support_hold import Container, container, hierarchy, thaw
from support_live import copy, file_system, sparse_file, work_dir
from test_kill_matrix import SIZE, Bench, make_bench, stopped_at

pytestmark = pytest.mark.root
COMPLETE = "the target is complete, but may be older than the source"
NEWER = "go on with the source"


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop", "mkfs.ext4", "fsfreeze")
    with work_dir() as made:
        yield made


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    needs("fsfreeze")
    with work_dir() as made:
        yield from make_bench(monkeypatch, made, made)


@pytest.fixture
def point(folder: Path) -> Iterator[tuple[str, Path]]:
    with (
        loop_device(sparse_file(folder / "image", SIZE)) as device,
        file_system(device, folder / "m") as made,
    ):
        yield device, made


# ---- before END


@pytest.mark.parametrize("what", ["file system", "cgroup"])
def test_what_another_process_thaws_before_end_leaves_no_target(bench: Bench, what: str) -> None:
    with stopped_at(bench, "last blocks sent", "--freeze-limit", "20") as made:
        wait_until(made.at_step, made.words("arrives"))
        if what == "cgroup":
            thaw(bench.container.cgroup.parent)
        else:
            run("fsfreeze", "-u", bench.point)
        (made.folder / "go").touch()
        assert made.sender.wait(20) == 14, made.words("it fails")
        assert "was thawed" in made.words("")
        assert made.receiver.wait(20) == 6, made.words("no END")
        made.check()


def test_what_is_thawed_and_frozen_again_before_end_leaves_no_target(bench: Bench) -> None:
    """FIFREEZE cannot tell; the device's own accounting can."""
    with stopped_at(bench, "last blocks sent", "--freeze-limit", "20") as made:
        wait_until(made.at_step, made.words("arrives"))
        run("fsfreeze", "-u", bench.point)
        (bench.point / "late").write_bytes(b"late")
        run("fsfreeze", "-f", bench.point)
        (made.folder / "go").touch()
        assert made.sender.wait(20) == 14, made.words("it fails")
        assert "is still being written to although it should be stopped" in made.words("")
        assert made.receiver.wait(20) == 6, made.words("no END")
        made.check()


# ---- after END


@pytest.mark.parametrize(
    "command",
    [
        "fsfreeze -u {m}; sleep .2",
        "fsfreeze -u {m}; touch {m}/late; fsfreeze -f {m}",
        "fsfreeze -u {m}; echo late >>{m}/x; sync {m}/x",
    ],
)
@pytest.mark.parametrize("via", ["local", "pipe"])
def test_a_file_system_that_is_thawed_before_the_end_fails_the_copy(
    folder: Path, point: tuple[str, Path], command: str, via: str
) -> None:
    device, m = point
    got = copy(device, folder / "target", "--before-thaw", command.format(m=m), via=via)
    assert (got.code, COMPLETE in got.errors, NEWER in got.errors) == (14, True, True), got.errors
    assert not is_frozen(m)


def test_a_freeze_of_the_stop_command_that_ends_too_early_fails_the_copy(
    folder: Path, point: tuple[str, Path]
) -> None:
    device, m = point
    options = ["-F", f"fsfreeze -f {m}", "--before-thaw", f"fsfreeze -u {m}"]
    got = copy(device, folder / "target", *options)
    assert (got.code, f"{m}, frozen by another process, was thawed" in got.errors) == (14, True), (
        got.errors
    )
    assert not is_frozen(m)
    assert not list(Path(os.environ["PYPLOOP_RUN"]).glob("*"))


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_is_thawed_before_the_end_fails_the_copy(
    folder: Path, point: tuple[str, Path], version: int
) -> None:
    device, m = point
    root = hierarchy(version)
    if root is None:
        pytest.skip(f"needs cgroup v{version} with a freezer")
    with container(root, "ended", m, folder / "beat") as made:
        group = made.cgroup.parent
        word, knob = ("THAWED", "freezer.state") if version == 1 else ("0", "cgroup.freeze")
        resume = f"echo {word} >{group}/{knob}"
        spec = ("--freeze", f"cgroup:{group}")
        got = copy(device, folder / "target", *spec, "--before-thaw", resume)
        assert (got.code, COMPLETE in got.errors) == (14, True), got.errors
        assert made.running() and not is_frozen(m)


def test_a_container_that_vzctl_resumed_meanwhile_fails_the_copy(
    folder: Path, point: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, m = point
    root = hierarchy(1)
    if root is None:
        pytest.skip("needs cgroup v1 with a freezer")
    with container(root, "resumed", m, folder / "beat") as made:
        ctid = vzctl_stand_in(folder, made, monkeypatch)
        resume = f"vzctl --skiplock chkpnt {ctid} --resume"
        got = copy(device, folder / "target", "--freeze", f"vzctl:{ctid}", "--before-thaw", resume)
        assert (got.code, COMPLETE in got.errors) == (14, True), got.errors
        assert made.running() and not is_frozen(m)


def vzctl_stand_in(folder: Path, made: Container, monkeypatch: pytest.MonkeyPatch) -> str:
    """A container whose cgroup has its name, as vzctl makes them."""
    state, programs = folder / "vz", folder / "bin"
    state.mkdir()
    programs.mkdir()
    (programs / "vzctl").symlink_to(ROOT / "tests" / "vzctl")
    group = made.cgroup.parent
    (state / group.name).write_text(str(group))
    monkeypatch.setenv("VZCTL_STANDIN", str(state))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return group.name


@pytest.mark.parametrize("kind", ["device", "file"])
@pytest.mark.parametrize("via", ["local", "pipe"])
def test_a_stopped_source_without_a_file_system_that_is_written_fails_the_copy(
    folder: Path, kind: str, via: str
) -> None:
    image, target = sparse_file(folder / "image", SIZE), folder / "target"
    with loop_device(image) as device:
        source = device if kind == "device" else sparse_file(folder / "plain", SIZE)
        write = f"dd if=/dev/urandom of={source} bs=4k count=1 conv=notrunc,fsync 2>/dev/null"
        got = copy(source, target, "-F", "true", "--before-thaw", write, via=via)
    assert (got.code, "was written to during the last steps" in got.errors) == (14, True), (
        got.errors
    )


@pytest.mark.invariant(number=9)
def test_what_stays_in_the_page_cache_of_a_stopped_device_fails_the_copy(folder: Path) -> None:
    with loop_device(sparse_file(folder / "image", SIZE)) as device:
        write = f"dd if=/dev/urandom of={device} bs=4k count=1 conv=notrunc 2>/dev/null"
        # Kept open: the last close of a device would write it back.
        with open(device, "rb"):
            got = copy(device, folder / "t", "-F", "true", "--before-thaw", write)
    assert (got.code, "was written to during the last steps" in got.errors) == (14, True), (
        got.errors
    )


def test_a_written_file_whose_time_is_put_back_fails_the_copy(folder: Path) -> None:
    source = sparse_file(folder / "plain", SIZE)
    os.utime(source, (1, 1))
    write = f"dd if=/dev/urandom of={source} bs=4k count=1 conv=notrunc 2>/dev/null"
    write += f"; touch -d @1 {source}"
    got = copy(source, folder / "t", "-F", "true", "--before-thaw", write)
    assert (got.code, "was written to during the last steps" in got.errors) == (14, True), (
        got.errors
    )


STORES = """
import mmap, sys, time
with open(sys.argv[1], "r+b") as f: view = mmap.mmap(f.fileno(), 0)
n = 0
while True:
    n += 1
    view[:8] = n.to_bytes(8, "little")
    if n == 1: print("stored", flush=True)
    time.sleep(.001)
"""


def test_a_stopped_file_that_is_written_through_a_mapping_fails_the_copy(folder: Path) -> None:
    """A store into a page that is dirty already does not move the file's times."""
    source = sparse_file(folder / "plain", SIZE)
    argv = [sys.executable, "-c", STORES, str(source)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == b"stored\n"
            got = copy(source, folder / "t", "-F", "true", "--before-thaw", "sleep .1")
        finally:
            writer.kill()
    assert (got.code, "written" in got.errors) == (14, True), got.errors


def test_a_writer_that_was_stopped_by_a_signal_and_goes_on_fails_the_copy(folder: Path) -> None:
    """Nobody can ask whether a process was continued; its writes are seen."""
    with loop_device(sparse_file(folder / "image", SIZE)) as device:
        loop = f"while :; do dd if=/dev/urandom of={device} bs=4k count=1 oflag=direct; done"
        writer = subprocess.Popen(
            ["/bin/sh", "-c", loop], stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            stop, go = (f"kill -{s} -{writer.pid}" for s in ("STOP", "CONT"))
            ended = f"{go}; sleep .2"
            got = copy(device, folder / "t1", "-F", f"{stop}; sleep .1", "--before-thaw", ended)
            assert (got.code, COMPLETE in got.errors) == (14, True), got.errors
            got = copy(device, folder / "t2", "-F", f"{stop}; sleep .1", "--undo", go)
            assert got.code == 0, got.errors
        finally:
            os.killpg(writer.pid, signal.SIGKILL)
            writer.wait()


def test_a_lasting_freeze_of_another_process_is_logged_once(
    folder: Path, point: tuple[str, Path]
) -> None:
    device, m = point
    run("fsfreeze", "-f", m)
    try:
        got = copy(device, folder / "target", via="local")
        assert got.code == 0, got.errors
        assert is_frozen(m)
        assert got.errors.count("is already frozen") == 1, got.errors
    finally:
        run("fsfreeze", "-u", m)
