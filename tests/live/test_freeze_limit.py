# SPDX-License-Identifier: Apache-2.0
"""Something takes longer than --freeze-limit: the source runs again, and no
step after that says success or leaves a target that counts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import is_frozen, loop_device, needs, wait_until
from support_live import copy, file_system, sparse_file, work_dir
from test_kill_matrix import ROUNDS, SIZE, Bench, make_bench, stopped_at

pytestmark = pytest.mark.root
LIMIT = ("--freeze-limit", "1.2")
BEFORE_END = (
    "cgroup frozen", "stopped source synced", "freeze begins", "frozen", "proving",
    "last blocks sent", "END may go", "END begins",
)  # fmt: skip
ASLEEP_AT = BEFORE_END if ROUNDS else ("cgroup frozen", "frozen", "last blocks sent", "END begins")
"""All of them with PYPLOOP_KILL_MATRIX."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with work_dir() as folder:
        yield from make_bench(monkeypatch, folder, folder)


def test_at_no_step_before_end_does_a_sender_go_on_for_a_source_that_runs_again(
    bench: Bench,
) -> None:
    """It is asleep from the step on until the watchdog has undone everything."""
    for step in ASLEEP_AT:
        with stopped_at(bench, step, *LIMIT) as made:
            wait_until(made.at_step, made.words("arrives"))
            made.sender.send_signal(signal.SIGSTOP)
            assert bench.container.running(), made.words("the watchdog undoes")
            (made.folder / "go").touch()
            made.sender.send_signal(signal.SIGCONT)
            assert made.sender.wait(20) == 14, made.words("it fails")
            assert made.receiver.wait(20) == 6, made.words("END did not go out")
            assert not made.target.exists()
            made.check()


@pytest.mark.parametrize("step", ["END sent", "acknowledged"])
def test_a_sender_that_learns_too_late_that_the_target_is_complete_fails(
    bench: Bench, step: str
) -> None:
    with stopped_at(bench, step, *LIMIT) as made:
        wait_until(made.at_step, made.words("arrives"))
        made.sender.send_signal(signal.SIGSTOP)
        assert bench.container.running(), made.words("the watchdog undoes")
        (made.folder / "go").touch()
        made.sender.send_signal(signal.SIGCONT)
        assert made.sender.wait(20) in (6, 14), made.words("it fails")
        if step == "acknowledged":
            assert (
                "the target is complete, but may be older than the source, which was thawed"
                in made.words("")
            )
        made.check()


@pytest.mark.parametrize("step", ["cgroup frozen", "frozen", "END begins"])
def test_a_watchdog_that_is_killed_before_the_limit_passes_is_no_way_around_it(
    bench: Bench, step: str
) -> None:
    """Nobody undoes at the limit then; the sender does, and fails."""
    with stopped_at(bench, step, *LIMIT) as made:
        made.kill_watchdog()
        made.sender.send_signal(signal.SIGSTOP)
        assert not bench.container.running(1.3)
        (made.folder / "go").touch()
        made.sender.send_signal(signal.SIGCONT)
        assert made.sender.wait(20) in (3, 14), made.words("it fails")
        assert made.receiver.wait(20) == 6, made.words("END did not go out")
        made.check()


@pytest.mark.parametrize("held", [1.12, 2.0])
@pytest.mark.parametrize("via", ["local", "pipe"])
def test_a_sync_that_hangs_past_the_limit_after_the_stop_is_noticed(held: float, via: str) -> None:
    """The image lies on a file system that the stop command freezes for a while."""
    needs("loop", "mkfs.ext4", "fsfreeze")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(work_dir())
        disk = stack.enter_context(loop_device(sparse_file(folder / "outer", 4 * SIZE)))
        outer = stack.enter_context(file_system(disk, folder / "o"))
        device = stack.enter_context(loop_device(sparse_file(outer / "image", SIZE)))
        point = stack.enter_context(file_system(device, folder / "m"))
        log, target = folder / "log", folder / "target"
        # Something must be dirty, or no sync waits.
        stop = (
            f"echo stop >>{log}; dd if=/dev/urandom of={point}/x bs=64k count=8 2>/dev/null; "
            f"fsfreeze -f {outer}; (sleep {held}; fsfreeze -u {outer}) >/dev/null 2>&1 &"
        )
        undo = f"echo go on >>{log}"
        try:
            got = copy(device, target, *LIMIT, "-F", stop, "--undo", undo, via=via)
        finally:
            wait_until(lambda: not is_frozen(outer), "thawed below")
        assert (got.code, got.receiver_code) == (14, None if via == "local" else 6), got.errors
        assert log.read_text() == "stop\ngo on\n", "undone once"
        assert not target.exists() and not is_frozen(point)


@pytest.mark.invariant(number=6)
def test_end_is_not_written_late_into_a_pipe_that_was_full(bench: Bench) -> None:
    """The receiver takes nothing until the source has been undone."""
    with stopped_at(bench, "END begins", *LIMIT) as made:
        wait_until(made.at_step, made.words("arrives"))
        wait_until(lambda: not unread(made.receiver.pid), "the receiver has read all of it")
        made.receiver.send_signal(signal.SIGSTOP)
        wait_until(lambda: stands_still(made.receiver.pid), "the receiver has stopped")
        ours = fill_pipe_of(made.receiver.pid)
        (made.folder / "go").touch()
        assert made.sender.wait(20) == 7, made.words("it gives up")
        assert "did not read the end of the stream in time" in made.words("")
        left = os.read(ours, 1 << 20)
        os.close(ours)
        assert set(left) == {0}, "no END behind what was there"
        made.receiver.send_signal(signal.SIGCONT)
        assert made.receiver.wait(20) == 6
        made.check()


def stands_still(pid: int) -> bool:
    """Each of its threads: one that still runs would read what is not meant for it."""
    stats = [p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(s.rpartition(")")[2].split()[0] == "T" for s in stats)


def unread(pid: int) -> int:
    """Bytes in the pipe that is that process's stdin."""
    ours = os.open(f"/proc/{pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
    (found,) = struct.unpack("i", fcntl.ioctl(ours, 0x541B, bytes(4)))  # FIONREAD
    os.close(ours)
    return int(found)


def fill_pipe_of(pid: int) -> int:
    """The reading end of that process's stdin; its pipe is full of zeroes."""
    ours = os.open(f"/proc/{pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(f"/proc/{pid}/fd/0", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.close(writer)
    assert unread(pid)
    return ours
