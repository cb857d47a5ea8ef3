# SPDX-License-Identifier: Apache-2.0
"""The public API on real devices: the examples of the documentation, tracking, freezing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import ROOT, loop_device, mounted, needs, pyploop_env, run
from support_live import file_system, sparse_file, thawed, work_dir

import pyploop

pytestmark = pytest.mark.root
MIB = 1 << 20
EXAMPLES = ROOT / "docs/examples"


@dataclass(frozen=True)
class Disk:
    folder: Path
    image: Path
    device: str
    point: Path

    def write(self, name: str, size: int) -> bytes:
        data = os.urandom(size)
        (self.point / name).write_bytes(data)
        return data


@pytest.fixture
def disk() -> Iterator[Disk]:
    needs("loop", "mkfs.ext4")
    with work_dir() as folder:
        image = sparse_file(folder / "image", 48 * MIB)
        with loop_device(image) as device, file_system(device, folder / "mnt") as point:
            yield Disk(folder, image, device, point)


def example(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, args)],
        input="\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=pyploop_env(),
    )


def shows(image: Path, folder: Path, name: str, data: bytes) -> None:
    """The image holds a file system with this file."""
    with loop_device(image) as device, mounted(device, folder / "copy.mnt") as point:
        assert (point / name).read_bytes() == data


# ---- the examples


def test_the_copying_example_copies_a_device_in_use(disk: Disk) -> None:
    data = disk.write("a", 2 * MIB)
    done = example("copy_device.py", disk.device, disk.folder / "copy")
    assert (done.returncode, done.stderr) == (0, "")
    assert "first pass" in done.stdout and "frozen for" in done.stdout
    assert thawed(disk.point)
    shows(disk.folder / "copy", disk.folder, "a", data)
    done = example("copy_device.py", disk.device, disk.folder / "copy")
    assert done.returncode == 1 and "File exists" in done.stderr and "remove" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_tracking_example_lists_what_was_written(disk: Disk) -> None:
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "track_device.py", disk.device],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=pyploop_env(),
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert "tracking" in process.stdout.readline()
            disk.write("a", 3 * MIB)
            said, _ = process.communicate("\n", timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    *extents, total = said.splitlines()
    assert extents and total.endswith("bytes, complete")
    assert sum(int(line.split()[1]) for line in extents) == int(total.split()[0]) >= 3 * MIB
    assert thawed(disk.point)


# ---- tracking


def test_a_backup_by_the_tracked_extents_alone_is_the_device(disk: Disk) -> None:
    """As a backup tool does it: everything once, then what has changed, frozen for the last."""
    backup = bytearray()
    disk.write("a", MIB)
    with pyploop.track(disk.device) as tracker, disk.image.open("rb") as f:
        assert (tracker.name, tracker.size) == ("bpf", 48 * MIB)
        backup[:] = f.read()

        def back_up(changes: pyploop.Changes) -> None:
            for start, end in changes.extents:
                f.seek(start)
                backup[start:end] = f.read(end - start)

        for name in "bcd":
            disk.write(name, MIB)
            back_up(tracker.changed())
        data = disk.write("last", MIB)
        with pyploop.frozen(disk.point) as held:
            changes = tracker.changed(quiesced=True)
            back_up(changes)
            held.check()
            assert changes.completeness == "complete"
            assert bytes(backup) == disk.image.read_bytes()
    (disk.folder / "backup").write_bytes(backup)
    shows(disk.folder / "backup", disk.folder, "last", data)


def test_extents_are_ascending_disjoint_and_only_told_once(disk: Disk) -> None:
    with pyploop.track(disk.device) as tracker:
        disk.write("a", 2 * MIB)
        changes = tracker.changed()
        ends = [0, *(e.end for e in changes.extents)]
        assert all(end < e.start or end == 0 for end, e in zip(ends, changes.extents, strict=False))
        assert changes.bytes == sum(e.end - e.start for e in changes.extents) >= 2 * MIB
        with pyploop.frozen(disk.device):
            tracker.changed(quiesced=True)
            assert tracker.changed(quiesced=True).extents == ()
    with pytest.raises(pyploop.ParameterError, match="not tracked"):
        tracker.changed()


# ---- freezing


def test_a_freeze_thaws_after_its_body_whatever_that_does(disk: Disk) -> None:
    with pyploop.frozen(disk.device) as held:
        assert held.mounts == (str(disk.point),)
        assert not thawed(disk.point)
    assert thawed(disk.point)
    with pytest.raises(ZeroDivisionError), pyploop.frozen(disk.point / "lost+found"):
        raise ZeroDivisionError
    assert thawed(disk.point)


def test_a_freeze_past_its_limit_is_thawed_and_reported(disk: Disk) -> None:
    with pytest.raises(pyploop.LoopError, match=r"longer than its limit of 0\.4 s"):  # noqa: SIM117
        with pyploop.frozen(disk.point, limit=0.4) as held:
            while not thawed(disk.point):
                threading.Event().wait(0.01)
            with pytest.raises(pyploop.LoopError):
                held.check()
    assert thawed(disk.point)


def test_a_snapshot_is_refused_when_another_thawed_meanwhile(disk: Disk) -> None:
    needs("fsfreeze")
    with pytest.raises(pyploop.LoopError, match="thawed"), pyploop.frozen(disk.point):
        run("fsfreeze", "-u", disk.point)
    assert thawed(disk.point)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/proc", pyploop.DeviceControlError),
        ("/absent", pyploop.OpenError),
        ("/etc/passwd", pyploop.ParameterError),
    ],
)
def test_what_cannot_be_frozen_is_named(path: str, error: type[pyploop.PyploopError]) -> None:
    needs("root")
    with pytest.raises(error) as e, pyploop.frozen(path):
        pass
    assert e.value.path == path


# ---- several disks


def test_two_disks_are_copied_at_one_moment(disk: Disk) -> None:
    other_image = sparse_file(disk.folder / "other", 48 * MIB)
    with (
        loop_device(other_image) as device,
        file_system(device, disk.folder / "other.mnt") as point,
    ):
        other = Disk(disk.folder, other_image, device, point)
        disks = (disk, other)
        data = [d.write("a", MIB) for d in disks]
        with (
            pyploop.Copy(disk.device, disk.folder / "one") as one,
            pyploop.Copy(other.device, disk.folder / "two") as two,
        ):
            for copying in (one, two):
                copying.first_pass()
                copying.converge()
                copying.prepare_freeze()
            with one.frozen(), two.frozen():
                assert not any(thawed(d.point) for d in disks)
                for copying in (one, two):
                    copying.last_blocks()
                    copying.finish()
        assert all(thawed(d.point) for d in disks)
        for name, expected in zip(("one", "two"), data, strict=True):
            shows(disk.folder / name, disk.folder, "a", expected)


def test_what_a_device_is(disk: Disk) -> None:
    info = pyploop.inspect(disk.device)
    assert (info.kind, info.size) == ("device", 48 * MIB)
    assert info.device is not None and info.device.backing_file == str(disk.image)
    assert [m.point for m in info.mounts] == [str(disk.point)]
    assert info.tracker is not None and info.tracker.name == "bpf"
