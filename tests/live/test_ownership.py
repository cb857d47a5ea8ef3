# SPDX-License-Identifier: Apache-2.0
"""The source changes hands, shape or place while it is copied: the copy ends
with a reason, never with a target that is not the frozen source."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MIB, is_frozen, loop_device, mounted, needs, pyploop_cmd, pyploop_env, run
from support_live import file_system, sparse_file, work_dir

from pyploop.errors import LoopError
from pyploop.freeze import FileSystems
from pyploop.report.events import Reporter
from pyploop.system.mount_table import Mount

pytestmark = pytest.mark.root
SIZE = 32 * MIB


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop", "mkfs.ext4")
    with work_dir() as made:
        yield made


def pyploop(*args: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*pyploop_cmd(), "-v-1", *map(str, args)],
        env=pyploop_env(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def fails(code: int, what: str, target: Path, *args: object) -> None:
    """This exit code, one line that says `what`, and no target."""
    done = pyploop("copy", *args, "-d", target)
    lines = [x for x in done.stderr.splitlines() if not x.startswith("Sending ")]
    assert (done.returncode, len(lines)) == (code, 1), done.stderr
    assert what in lines[0]
    assert not target.exists()


def test_a_freeze_of_somebody_else_that_ends_too_early_is_noticed(folder: Path) -> None:
    needs("fsfreeze")
    image = sparse_file(folder / "image", SIZE)
    with loop_device(image) as device, file_system(device, folder / "m") as point:
        systems = FileSystems([Mount(str(point), "ext4", device)], Reporter())
        run("fsfreeze", "-f", point)
        try:
            systems.freeze()
            systems.check_frozen()
            run("fsfreeze", "-u", point)
            with pytest.raises(LoopError, match="thawed"):
                systems.check_frozen()
            assert not is_frozen(point)
        finally:
            systems.close()


def test_a_freeze_of_the_stop_command_is_left_as_it_is(folder: Path) -> None:
    needs("fsfreeze")
    image = sparse_file(folder / "image", SIZE)
    with loop_device(image) as device, file_system(device, folder / "m") as point:
        (point / "x").write_bytes(b"x")
        target = folder / "target"
        done = pyploop("copy", "-s", device, "-d", target, "-F", f"fsfreeze -f {point}")
        assert done.returncode == 0, done.stderr
        assert is_frozen(point)
        run("cmp", image, target)
        run("fsfreeze", "-u", point)


def test_a_mount_point_that_is_not_of_the_source_ends_with_4(folder: Path) -> None:
    image, other = sparse_file(folder / "image", SIZE), sparse_file(folder / "other", SIZE)
    (folder / "b").mkdir()
    with (
        loop_device(image) as device,
        loop_device(other) as second,
        file_system(device, folder / "m"),
    ):
        run("mkfs.ext4", "-q", second)
        with mounted(second, folder / "b") as wrong:
            for place in (wrong, folder):
                fails(4, "not on a file system", folder / "t", "-s", device, "--mount", place)


def test_a_mount_that_comes_during_the_copy_ends_it(folder: Path) -> None:
    image = sparse_file(folder / "image", SIZE)
    run("mkfs.ext4", "-q", "-F", image)
    (folder / "m").mkdir()
    with loop_device(image) as device:
        mount = f"mount {device} {folder}/m"
        try:
            fails(14, "is mounted at", folder / "target", "-s", device, "-F", mount)
        finally:
            run("umount", folder / "m")


def test_a_source_that_grows_during_the_copy_ends_with_6(folder: Path) -> None:
    image = sparse_file(folder / "image", SIZE)
    grow = f"truncate -s {SIZE + MIB} {image}"
    fails(6, "at the start", folder / "target", "-s", image, "-F", grow)
    with loop_device(image) as device:
        again = f"truncate -s {SIZE + 2 * MIB} {image}; losetup -c {device}"
        fails(6, "at the start", folder / "target", "-s", device, "-F", again)


def test_a_file_that_is_attached_only_in_part_is_not_cut(folder: Path) -> None:
    image = sparse_file(folder / "image", SIZE)
    with loop_device(image, offset=MIB):
        fails(2, "only in part", folder / "target", "-s", image)


@pytest.mark.invariant(number=6)
def test_commands_inside_the_freeze_share_its_limit(folder: Path) -> None:
    image = sparse_file(folder / "image", SIZE)
    with loop_device(image) as device, file_system(device, folder / "m") as point:
        # It waits for a thaw that waits for it.
        done = pyploop(
            "copy", "-s", device, "-d", folder / "target", "--freeze-limit", "1",
            "--before-thaw", f"touch {point}/x",
        )  # fmt: skip
        assert (done.returncode, is_frozen(point)) == (12, False), done.stderr


def test_a_receiver_that_is_gone_is_noticed_although_the_feedback_stays_open(folder: Path) -> None:
    image = sparse_file(folder / "image", SIZE)
    (r, w), (answers, held) = os.pipe(), os.pipe()
    try:
        sender = subprocess.Popen(
            [*pyploop_cmd(), "copy", "-s", str(image), "-o", str(w), "-f", str(answers)],
            env=pyploop_env(), pass_fds=(w, answers), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(w)
        os.read(r, 20)  # the first SYNC, which nobody will answer
        os.close(r)
        _, err = sender.communicate(timeout=30)
        assert sender.returncode == 7, err
    finally:
        os.close(answers)
        os.close(held)


def test_signals_close_together_leave_one_line(folder: Path) -> None:
    image = sparse_file(folder / "image", SIZE)
    for _ in range(3):
        sender = subprocess.Popen(
            [*pyploop_cmd(), "-v-1", "copy", "-s", str(image), "-d", str(folder / "t"),
             "-F", f": > {folder}/stopped; sleep 5"],
            env=pyploop_env(), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not (folder / "stopped").exists():
            time.sleep(0.01)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            sender.send_signal(number)
        _, err = sender.communicate(timeout=30)
        assert "Traceback" not in err
        assert -sender.returncode in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        (folder / "stopped").unlink()
