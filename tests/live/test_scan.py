# SPDX-License-Identifier: Apache-2.0
"""A scan has no events: what shows that somebody writes behind its back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import MIB, is_frozen, loop_device, needs
from support_live import copy, file_system, random_file, sparse_file, work_dir

from pyploop.diskcopy.options import Options
from pyploop.diskcopy.sender import Sender
from pyploop.diskcopy.source_pump import SourcePump
from pyploop.diskcopy.target_file import Sink
from pyploop.diskcopy.target_registry import FileOutput
from pyploop.disks.opening import open_source
from pyploop.errors import LoopError
from pyploop.freeze.stoppers import Spec
from pyploop.report.events import Reporter
from pyploop.trackers import Batch
from pyploop.trackers.scan import ScanTracker

pytestmark = pytest.mark.root

BLOCK = 4096


@pytest.fixture
def folder() -> Iterator[Path]:
    with work_dir() as path:
        yield path


def scan(source: str, target: Path, options: Options) -> None:
    with contextlib.closing(open_source(source)) as src, Sink(str(target)) as sink:
        Sender(src, ScanTracker(src), FileOutput(sink), options, Reporter()).run()


def behind_it(monkeypatch: pytest.MonkeyPatch, write: Callable[[], None], times: int) -> None:
    """So often, write to what a scan has just read and found unchanged."""
    send, left = SourcePump.send, [times]

    def send_and_write(self: SourcePump, batches: list[Batch], flags: int = 0) -> int:
        sent = send(self, batches, flags)
        if any(b.changed for b in batches) and not sent and left[0]:
            left[0] -= 1
            write()
        return sent

    monkeypatch.setattr(SourcePump, "send", send_and_write)


def through(path: str | Path) -> Callable[[], None]:
    """Writes block 0, and has it reach the disk."""

    def write() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_DSYNC)
        try:
            os.pwrite(fd, os.urandom(BLOCK), 0)
        finally:
            os.close(fd)

    return write


@pytest.mark.parametrize("kind", ["device", "file"])
def test_a_write_behind_the_last_scan_is_scanned_again(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("loop")
    image, target = random_file(folder / "image", 2 * MIB), folder / "target"
    device = loop_device(image) if kind == "device" else contextlib.nullcontext(str(image))
    with device as source:
        behind_it(monkeypatch, through(source), 4)
        scan(source, target, Options())
    assert target.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("kind", ["device", "file"])
@pytest.mark.invariant(number=9)
def test_a_write_behind_the_scan_after_a_stop_ends_the_copy(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("loop")
    image, target = random_file(folder / "image", 2 * MIB), folder / "target"
    device = loop_device(image) if kind == "device" else contextlib.nullcontext(str(image))
    with device as source:
        behind_it(monkeypatch, through(source), 99)
        with pytest.raises(LoopError, match="although it should be stopped"):
            scan(source, target, Options(stops=[Spec("cmd", "true")]))
    assert not target.exists()


MAPPER = """
import mmap, os, sys
f = open(sys.argv[1], "r+b")
m = mmap.mmap(f.fileno(), 0)
for _ in sys.stdin.buffer:
    m[:4096] = os.urandom(4096)
    os.write(1, b"\\n")
"""


@contextlib.contextmanager
def by_mapping(path: Path) -> Iterator[Callable[[], None]]:
    """Another process writes block 0 through a mapping that it has already written."""
    words = [sys.executable, "-c", MAPPER, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as mapper:
        assert mapper.stdin is not None and mapper.stdout is not None
        stdin, stdout = mapper.stdin, mapper.stdout

        def write() -> None:
            stdin.write(b"\n")
            stdin.flush()
            assert stdout.readline() == b"\n"

        write()
        yield write


def test_a_write_through_a_mapping_after_a_stop_ends_the_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, target = random_file(folder / "image", 2 * MIB), folder / "target"
    with by_mapping(image) as write:
        behind_it(monkeypatch, write, 99)
        with pytest.raises(LoopError, match="although it should be stopped"):
            scan(str(image), target, Options(stops=[Spec("cmd", "true")]))
    assert not target.exists()


def test_a_write_through_a_mapping_that_changes_no_time_is_scanned_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tmpfs: what a scan after the stop finds may be half of what was written."""
    with tempfile.TemporaryDirectory(prefix="pyploop-", dir="/dev/shm") as memory:
        image, target = random_file(Path(memory) / "image", 2 * MIB), folder / "target"
        with by_mapping(image) as write:
            send = SourcePump.send

            def write_and_send(self: SourcePump, batches: list[Batch], flags: int = 0) -> int:
                if any(b.changed for b in batches):
                    write()
                return send(self, batches, flags)

            monkeypatch.setattr(SourcePump, "send", write_and_send)
            with pytest.raises(LoopError, match="although it should be stopped"):
                scan(str(image), target, Options(stops=[Spec("cmd", "true")]))
        assert not target.exists()


def test_a_scan_that_the_freeze_limit_does_not_allow_is_refused_before_the_freeze(
    folder: Path,
) -> None:
    needs("loop", "mkfs.ext4")
    image, target = sparse_file(folder / "image", 64 * MIB), folder / "target"
    with loop_device(image) as device, file_system(device, folder / "mnt") as point:
        (point / "data").write_bytes(os.urandom(32 * MIB))
        stopped = folder / "stopped"
        options = ["--tracker", "scan", "--freeze-limit", "5ms", "-F", f"touch {stopped}"]
        got = copy(device, target, *options, via="local")
        assert got.code == 14, got.errors
        assert "--freeze-limit allows 0.005 s; nothing was frozen" in got.errors
        assert not stopped.exists() and not target.exists() and not is_frozen(point)
