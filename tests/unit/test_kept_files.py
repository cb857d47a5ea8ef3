# SPDX-License-Identifier: Apache-2.0
"""Going on from a kept file: byte for byte the source, whatever that file held; and
which files are gone on with at all."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from going_on import go_on, tell

from pyploop._core import Known
from pyploop.diskcopy import delta, digests
from pyploop.diskcopy.digests import Reader
from pyploop.diskcopy.source_pump import _hash_shift
from pyploop.disks import opening
from pyploop.errors import (
    CancelledError,
    MigrateError,
    ProtocolError,
    PyploopError,
    ReadError,
    VzExitCode,
    WriteError,
)
from pyploop.migration import file_stream
from pyploop.migration.source import file_delta
from pyploop.migration.target import incoming_files, resumable_files, resumable_trees
from pyploop.migration.target.resumable_target import ResumableSink, check_untouched, lease
from pyploop.migration.undo_kinds import undo_all
from pyploop.report.events import Reporter
from pyploop.runtimes import Disk
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.volumes import KEPT
from pyploop.system import beneath, private_folder
from pyploop.system.jobs import Job
from pyploop.undo.journal import Journal

KIB, MIB = 1 << 10, 1 << 20
SIZE = 5 * MIB + 3 * KIB + 7
"""Of a source: no multiple of anything."""
CLUSTER = digests.cluster(SIZE)


def make(path: Path, seed: int = 1, size: int = SIZE) -> bytes:
    """A file with data, zeroes that are written, holes, and both in one cluster."""
    rng = random.Random(seed)
    with path.open("wb") as f:
        f.truncate(size)
        for start, length in ((0, MIB + 9000), (2 * MIB + 4096, 20_000), (3 * MIB, 2 * MIB)):
            f.seek(start)
            f.write(rng.randbytes(max(min(length, size - start), 0)))
        f.seek(3 * MIB + 100 * KIB)
        f.write(bytes(min(300 * KIB, max(size - f.tell(), 0))))
        f.truncate(size)
    return path.read_bytes()


def punch(path: Path, start: int, length: int) -> None:
    """A hole of the file."""
    with path.open("r+b") as f:
        subprocess.run(
            ["fallocate", "-p", "-o", str(start), "-l", str(length), str(path)], check=True
        )
        assert os.fstat(f.fileno()).st_size == path.stat().st_size


def put(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as f:
        f.seek(at)
        f.write(data)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


NOISE = random.Random(99).randbytes(3 * MIB)
DAMAGES: dict[str, tuple[Callable[[Path], object], int]] = {
    # What became of a kept file that was as the source, and how much differs at most.
    "nothing": (lambda p: None, 0),
    "one byte": (lambda p: put(p, MIB - 3, b"\0"), CLUSTER),
    "one byte of the last block": (lambda p: put(p, SIZE - 1, b"\0"), CLUSTER),
    "one byte in a zero block": (lambda p: put(p, 3 * MIB + 200 * KIB, b"x"), CLUSTER),
    "data in a hole": (
        lambda p: put(p, MIB + 400 * KIB, NOISE[: 300 * KIB]),
        300 * KIB + 2 * CLUSTER,
    ),
    "data in the hole of a cluster that has data": (
        lambda p: put(p, 2 * MIB + 40 * KIB, b"left over"),
        CLUSTER,
    ),
    "data past the end": (lambda p: put(p, SIZE + 5, NOISE), 0),
    "holes in data": (lambda p: punch(p, 3 * MIB + 512 * KIB, MIB), MIB),
    "cut short": (lambda p: cut(p, 3 * MIB + 1000), SIZE),
    "empty": (lambda p: cut(p, 0), SIZE),
    "other data everywhere": (lambda p: p.write_bytes(NOISE * 2), SIZE),
    "zeroes everywhere": (lambda p: p.write_bytes(bytes(SIZE)), SIZE),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_target_is_the_source_whatever_was_kept(tmp_path: Path, damage: str) -> None:
    data = make(tmp_path / "source")
    make(tmp_path / "held")
    spoil, most = DAMAGES[damage]
    spoil(tmp_path / "held")
    inode = (tmp_path / "held").stat().st_ino
    copied = go_on(tmp_path / "source", tmp_path / "held")
    assert copied.target == data
    assert copied.inode == inode
    assert copied.found.kept - copied.found.same <= most
    # The last block goes in any case, with its size.
    assert copied.summary.wire_bytes < most + CLUSTER + 8 * KIB
    assert not (tmp_path / "held").exists()


def test_zeroes_at_the_source_become_holes_of_what_was_kept(tmp_path: Path) -> None:
    make(tmp_path / "source")
    (tmp_path / "held").write_bytes(NOISE * 2)
    go_on(tmp_path / "source", tmp_path / "held")
    source, target = (tmp_path / n for n in ("source", "target"))
    assert target.stat().st_blocks <= source.stat().st_blocks + 256


@pytest.mark.parametrize("size", [1, 4095, 4096, CLUSTER - 1, CLUSTER, CLUSTER + 1, 3 * MIB + 1])
def test_a_disk_of_another_size_than_before_is_that_of_the_source(
    tmp_path: Path, size: int
) -> None:
    data = make(tmp_path / "source", size=size)
    for n, other in enumerate((size // 2, size + 1, 2 * size + CLUSTER)):
        (tmp_path / f"held{n}").write_bytes((data + NOISE)[:other])
        copied = go_on(tmp_path / "source", tmp_path / f"held{n}", target=f"target{n}")
        assert copied.target == data


@pytest.mark.parametrize(
    "written",
    [
        lambda p: put(p, 3 * MIB + 77, NOISE[: 2 * CLUSTER]),
        lambda p: put(p, 3 * MIB, bytes(MIB)),
        lambda p: punch(p, 3 * MIB, MIB),
        lambda p: put(p, SIZE - 1, b"y"),
        lambda p: put(p, MIB + MIB // 2, b"in a hole"),
    ],
)
def test_what_is_written_after_the_comparison_is_sent(
    tmp_path: Path, written: Callable[[Path], None]
) -> None:
    """By the scan tracker too, which compares with what the target holds."""
    make(tmp_path / "source")
    make(tmp_path / "held")
    source = tmp_path / "source"
    copied = go_on(source, tmp_path / "held", lambda: written(source))
    assert copied.target == source.read_bytes()
    assert copied.summary.wire_bytes < 2 * MIB + CLUSTER


def test_random_pairs_of_files_end_up_equal(tmp_path: Path) -> None:
    rng = random.Random(int(os.environ.get("PYPLOOP_SEED", "7")))
    for n in range(int(os.environ.get("PYPLOOP_KEPT_PAIRS", "25"))):
        size = rng.choice([1, CLUSTER, MIB, rng.randrange(1, 3 * MIB)])
        paths = tmp_path / f"source{n}", tmp_path / f"held{n}"
        blocks = [rng.randbytes(1) * 4096 for _ in range(3)] + [bytes(4096)]
        for path in paths:
            with path.open("wb") as f:
                f.truncate(size if path is paths[0] else rng.choice([size, size // 3, 2 * size]))
                for _ in range(rng.randrange(40)):
                    f.seek(rng.randrange(size) // 4096 * 4096)
                    f.write((rng.choice(blocks) * rng.randrange(1, 30))[: max(size - f.tell(), 0)])
        data = paths[0].read_bytes()
        assert len(data) == size
        assert go_on(*paths, target=f"target{n}").target == data, f"pair {n}"


# ---- files beside the disks


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lower_delta_is_the_source_s_whatever_was_kept(tmp_path: Path, damage: str) -> None:
    source, held = tmp_path / "source", tmp_path / "held"
    data = make(source)
    make(held)
    spoil, most = DAMAGES[damage]
    spoil(held)
    fd = os.open(held, os.O_RDWR)
    reader, _ = tell(fd, SIZE)
    a, b = socket.socketpair()
    place = file_stream.Place(lambda name: fd, durable=True)
    job = Job(lambda: file_stream.receive(b.detach(), 10, place)).start()
    with file_stream.Writer(a.detach(), 10) as out:
        found = file_delta.send_file(out, "lower", str(source), SIZE, reader)
        out.end()
    job.join(10)
    reader.close()
    assert held.read_bytes() == data
    assert found.kept - found.same <= most
    assert out.sent <= most


# ---- digests


def run(pos: int, *found: bytes) -> bytes:
    return struct.pack("<QI", pos, len(found)) + b"".join(found)


D = b"d" * 32
ABSURD = {
    "not on a cluster": run(5, D),
    "backwards": run(2 * CLUSTER, D) + run(CLUSTER, D),
    "twice": run(0, D, D) + run(CLUSTER, D),
    "past the end": run(8 * CLUSTER, D),
    "over the end": run(7 * CLUSTER, D, D),
    "far past the end": run((1 << 64) - CLUSTER, D),
    "too many": struct.pack("<QI", 0, 1 << 31),
    "cut off": run(0, D, D)[:-1],
    "without an end": run(0, D),
}


@pytest.mark.parametrize("stream", ABSURD)
def test_digests_that_may_not_come_are_refused(stream: str) -> None:
    a, b = socket.socketpair()
    with b:
        b.sendall(ABSURD[stream])
    reader = Reader(a.detach(), 10)
    with pytest.raises(PyploopError):
        list(reader.runs(8 * CLUSTER))
    reader.close()


@pytest.mark.parametrize("gib", [0, 1, 8, 9, 31, 32, 33, 63, 64, 65, 4096])
def test_a_cluster_is_whole_chunks_of_what_the_pump_knows(gib: int) -> None:
    for size in (gib << 30, (gib << 30) + 1, (gib << 30) + 4096):
        unit, chunk = digests.cluster(size), 1 << _hash_shift(size)
        assert unit % chunk == 0
        assert 16 * KIB <= unit <= 64 * KIB
        assert size / unit <= digests.MANY or unit == 64 * KIB


def test_a_digest_of_what_could_not_be_read_equals_nothing() -> None:
    zeroes = memoryview(bytes(CLUSTER))
    runs = iter([(0, [digests.UNKNOWN, digests.digest(zeroes)])])
    parts = digests.equal_parts(runs, 2 * CLUSTER, lambda pos, n: memoryview(bytes(n)))
    assert [(pos, len(data), same) for pos, data, same in parts] == [
        (0, CLUSTER, False),
        (CLUSTER, CLUSTER, True),
    ]


def test_a_comparison_that_is_cancelled_ends(tmp_path: Path) -> None:
    make(tmp_path / "source")
    src = opening.open_source(str(tmp_path / "source"))
    a, _b = socket.socketpair()  # nobody tells anything
    reader = Reader(a.detach(), 60)
    job = Job(lambda: delta.compare_disk(src, Known(SIZE), reader, lambda: None)).start()
    reader.cancel()
    with pytest.raises(ReadError):
        job.join(10)
    reader.close()

    def gone() -> None:
        raise CancelledError("cancelled")

    fd = os.open(tmp_path / "source", os.O_RDWR)
    reader, _ = tell(fd, SIZE)
    with pytest.raises(CancelledError):
        delta.compare_disk(src, Known(SIZE), reader, gone)
    src.close()
    reader.close()
    os.close(fd)


def test_what_the_target_holds_is_noted_in_whole_chunks_only() -> None:
    known = Known(10 * KIB, 12)
    known.note(4 * KIB, bytes(4 * KIB))
    known.note(8 * KIB, b"x" * 2 * KIB)  # up to the end
    for start, length in ((1, 4096), (0, 5000), (8 * KIB, 4096), (1 << 63, 4096)):
        with pytest.raises(OSError) as e:
            known.note(start, bytes(length))
        assert e.value.errno == errno.EINVAL


# ---- nobody else's

_OPENS = "import os, sys; os.open(sys.argv[1], os.{flags} | os.O_NONBLOCK); print('opened')"


def open_elsewhere(path: Path, flags: str) -> None:
    subprocess.run(
        [sys.executable, "-c", _OPENS.format(flags=flags), str(path)],
        capture_output=True,
        timeout=20,
        check=False,
    )


def test_a_file_that_another_process_opened_for_writing_is_not_finished(tmp_path: Path) -> None:
    held, final = tmp_path / "held", tmp_path / "final"
    make(held)
    fd = os.open(held, os.O_RDWR)
    lease(fd)
    with ResumableSink(str(final), str(held), fd, SIZE, leased=True) as sink:
        open_elsewhere(held, "O_WRONLY")
        with pytest.raises(WriteError, match="opened for writing by another process"):
            sink.commit()
    assert held.exists()
    assert not final.exists()


def test_a_file_that_another_process_only_reads_is_as_good_as_ever(tmp_path: Path) -> None:
    make(tmp_path / "held")
    fd = os.open(tmp_path / "held", os.O_RDWR)
    lease(fd)
    open_elsewhere(tmp_path / "held", "O_RDONLY")
    check_untouched(fd, "held")
    os.close(fd)


# ---- which files are gone on with

HERE = {"id": "a" * 32, "name": "here"}


@dataclass
class Target:
    """A host with a container of one disk, `web`."""

    folder: Path
    container: str = "web"

    @property
    def host(self) -> HostConfig:
        return HostConfig(state_dir=str(self.folder / "state"))

    @property
    def image(self) -> Path:
        return self.folder / "ct/web/root.img"

    @property
    def runtime(self) -> Any:
        def destination(label: str) -> str:
            if label != "lower":
                raise MigrateError(VzExitCode.COPY_FAILED, f"no item {label!r}")
            return str(self.folder / "ct/web/lower")

        disk = Disk(str(self.image), "", "", "")
        return SimpleNamespace(
            name="runc",
            container=self.container,
            disks=lambda source: [disk],
            destination=destination,
        )

    @property
    def record(self) -> Path:
        return self.folder / "state/runc-web.kept"

    def files(self) -> list[Path]:
        return sorted((self.folder / "ct").glob(".*.pyploop-kept"))

    def begin(
        self, keep: bool, source: dict[str, str] | None = None
    ) -> tuple[Journal, incoming_files.IncomingFiles, list[str]]:
        """A migration that comes here; also what was said."""
        said: list[str] = []
        report = Reporter()
        report.line = lambda level, text: said.append(text)  # type: ignore[method-assign]
        (self.folder / "state").mkdir(exist_ok=True, mode=0o700)
        (self.folder / "ct").mkdir(exist_ok=True)
        log = Journal.create(
            "migration",
            self.folder / "state",
            migration=os.urandom(8).hex(),
            runtime="runc",
            container=self.container,
            source=source or HERE,
            keep=keep,
        )
        disks = self.runtime.disks(source=False)
        return log, incoming_files.IncomingFiles(self.host, self.runtime, log, disks, report), said

    def leave(self, data: bytes) -> Path:
        """What a failed migration leaves of its disk."""
        log, own, _ = self.begin(keep=True)
        self.image.parent.mkdir(parents=True)
        sink = own.disk("disk 0", str(self.image), reuse=False)
        assert sink is not None
        with sink:
            os.pwrite(sink.fd, data, 0)
        own.close()
        assert undo_all(log, keep=True) == []
        self.image.parent.rmdir()
        assert len(self.files()) == 1
        return self.files()[0]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    yield Target(tmp_path)


DATA = random.Random(11).randbytes(2 * MIB)


def test_what_is_kept_is_offered_once_and_recorded_meanwhile_in_the_journal(target: Target) -> None:
    file = target.leave(DATA)
    assert [f["path"] for f in json.loads(target.record.read_text())["files"]] == [str(file)]
    log, own, said = target.begin(keep=False)
    assert (own.names, said) == (["disk 0"], [])
    assert not target.record.exists()
    assert [e["kept"] for e in log.entries if e["kind"] == "copied"] == [str(file)]
    own.close()
    # It fails, and nothing was to be kept.
    assert undo_all(log, keep=False) == []
    assert (target.files(), target.record.exists()) == ([], False)


def test_what_is_kept_can_be_kept_again(target: Target) -> None:
    file = target.leave(DATA)
    for _ in range(2):
        log, own, _ = target.begin(keep=True)
        assert own.names == ["disk 0"]
        own.close()
        assert undo_all(log, keep=True) == []
        assert file.read_bytes() == DATA
        assert target.record.exists()


def swap(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))  # or its number would be taken again
    file.write_bytes(DATA)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def link(file: Path) -> None:
    elsewhere = file.with_name("elsewhere")
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


UNUSABLE: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    # What happened to it, what is said, and whether it is left alone.
    "gone": (lambda f: f.unlink(), "is gone", False),
    "another file": (swap, "another file now", True),
    "a link": (link, "another file now", True),
    "a second name": (lambda f: os.link(f, f.with_name("x")), "has a second name", False),
    "a FIFO": (fifo, "another file now", True),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_kept_file_that_is_not_what_it_was_is_not_used(target: Target, what: str) -> None:
    file = target.leave(DATA)
    change, words, stays = UNUSABLE[what]
    change(file)
    log, own, said = target.begin(keep=False)
    assert own.names == []
    assert words in said[0]
    assert "copied again" in said[0]
    own.close()
    assert undo_all(log) == []
    assert not target.record.exists()
    # Somebody else's file is not removed by its name, unless the name is ours alone.
    assert os.path.lexists(file) is False or stays


def test_a_kept_file_that_is_in_use_is_not_used(target: Target) -> None:
    file = target.leave(DATA)
    for mode in ("rb", "r+b"):
        with file.open(mode):
            _, own, said = target.begin(keep=True)
        assert (own.names, "in use by another process" in said[0]) == ([], True)
        own.close()
        assert target.files() == []
        file = target.leave(DATA) if mode == "rb" else file


def test_a_kept_file_of_another_source_is_not_used(target: Target) -> None:
    target.leave(DATA)
    other = {"id": "b" * 32, "name": "there"}
    _, own, said = target.begin(keep=False, source=other)
    assert own.names == []
    assert said == [
        "The kept file of disk 0 is not used, and all of it is copied again: it came from here, "
        "not from there"
    ]
    assert (target.files(), target.record.exists()) == ([], False)
    assert resumable_files.allocated(target.host, target.runtime, {"source": other}) == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": "pyploop.kept/1"}',
        '{"schema": "pyploop.kept/1", "migration": "x", "source": {"id": "a", "name": ""}, '
        '"files": [{"name": "disk 0", "path": "/etc/passwd", "inode": 1}]}',
    ],
)
def test_a_damaged_record_costs_only_the_copy(target: Target, text: str) -> None:
    target.leave(DATA)
    target.record.write_text(text)
    _, own, said = target.begin(keep=False)
    assert (own.names, len(said)) == ([], 1)
    assert "cannot be read" in said[0]
    assert (target.files(), target.record.exists()) == ([], False)


def test_what_is_kept_counts_as_room(target: Target) -> None:
    target.leave(DATA)
    room = resumable_files.allocated(target.host, target.runtime, {"source": HERE})
    assert room == {"disk 0": pytest.approx(len(DATA), abs=64 * KIB)}


@pytest.mark.parametrize("schema", ["pyploop.kept-trees/1", "another/1"])
def test_a_record_of_kept_trees_is_known_by_its_schema(tmp_path: Path, schema: str) -> None:
    kept = tmp_path / f".box{KEPT}"
    kept.mkdir()
    (kept / "file").write_bytes(b"x" * MIB)
    tree = {"index": 0, "path": str(kept), "inode": kept.stat().st_ino}
    record = {"schema": schema, "migration": "0" * 16, "source": HERE, "trees": [tree]}
    private_folder.make_new(state := tmp_path / "state")
    (state / "command-box.kept-trees").write_text(json.dumps(record))
    room = resumable_trees.allocated(str(state), "command", "box", HERE)
    assert (room.get(0, 0) >= MIB) == (schema == "pyploop.kept-trees/1")


def test_little_is_not_kept(target: Target) -> None:
    log, own, _ = target.begin(keep=True)
    os.makedirs(target.image.parent)
    with beneath.place(str(target.image.with_name("lower"))) as at:
        os.close(own.item("lower", at, ""))
    target.image.with_name("lower").write_bytes(b"x" * 1000)
    own.close()
    assert undo_all(log, keep=True) == []
    assert list(target.image.parent.iterdir()) == []
    assert (target.files(), target.record.exists()) == ([], False)


def test_only_what_is_kept_can_be_asked_for(target: Target) -> None:
    target.leave(DATA)
    _, own, _ = target.begin(keep=False)
    a, _b = socket.socketpair()
    with a:
        for wanted in ([["disk 1", 5]], [["disk 0", -1]], [["disk 0", 1 << 60]], [["disk 0", "x"]]):
            with pytest.raises(ProtocolError):
                own.send_digests(wanted, a)
        with pytest.raises(ProtocolError):  # its digests were never asked for
            own.disk("disk 0", str(target.image), reuse=True)
    own.close()
