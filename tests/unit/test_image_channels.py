# SPDX-License-Identifier: Apache-2.0
"""Memory images in a channel of the connection: exact bytes, peers of any kind, and ends
of any kind."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support

from pyploop.errors import MigrateError, ProtocolError, PyploopError, ReadError, WriteError
from pyploop.migration import file_stream
from pyploop.migration.file_stream import Budget, Place
from pyploop.migration.image_channels import ImageReader, ImageWriter, open_reader, open_writer
from pyploop.migration.source.dump_stream import send_first, stream_dump
from pyploop.migration.target.incoming_memory import IncomingMemory
from pyploop.system.jobs import Job
from pyploop.transport.mux import Mux
from pyploop.units import KIB, MIB
from pyploop.wire import messages
from pyploop.wire import mux as wire

STALL = 20.0


@pytest.fixture
def pair() -> Iterator[tuple[Mux, Mux]]:
    """The source's end and the target's of one connection."""
    a, b = socket.socketpair()
    ends = Mux(a.fileno(), a.fileno()), Mux(b.fileno(), b.fileno())
    try:
        yield ends
    finally:
        for end in ends:
            end.close()
        a.close()
        b.close()


@pytest.fixture
def against() -> Iterator[tuple[Mux, socket.socket]]:
    """One end, and the other one's raw bytes."""
    a, b = socket.socketpair()
    end = Mux(a.fileno(), a.fileno())
    try:
        yield end, b
    finally:
        end.close()
        a.close()
        b.close()


def place(folder: Path, **limits: Any) -> Place:
    def opened(flags: int) -> Callable[[str], int]:
        return lambda name: os.open(folder / name, os.O_WRONLY | flags, 0o600)

    return Place(opened(os.O_CREAT | os.O_EXCL), opened(0), **limits)


def channel(pair: tuple[Mux, Mux], window: int = wire.WINDOW) -> tuple[ImageWriter, ImageReader]:
    reader = open_reader(pair[1], 1, window, STALL)
    return open_writer(pair[0], 1, window, STALL), reader


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    return source, target


def pages(size: int) -> bytes:
    """A third of them are zero, and the end is within one."""
    rng = random.Random(size)
    made = (bytes(4096) if rng.randrange(3) == 0 else rng.randbytes(4096) for _ in range(size))
    return b"".join([*made, b"end"])


# ---- bytes


@pytest.mark.parametrize("window", [wire.WINDOW, wire.IMAGE_WINDOW])
def test_a_dump_arrives_as_it_is_and_its_zeroes_are_not_sent(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path], window: int
) -> None:
    source, target = folders
    data = {"pages-1.img": pages(2000), "pages-2.img": pages(1), "core.img": os.urandom(700)}
    data |= {"empty.img": b"", "zero.img": bytes(9000)}
    for name, value in data.items():
        (source / name).write_bytes(value)
    (source / "parent").symlink_to("../1")
    writer, reader = channel(pair, window)
    budget = Budget(sum(map(len, data.values())))
    job = Job(lambda: reader.receive(place(target, budget=budget))).start()
    with writer:
        stream_dump({"": source}, writer, Job(lambda: None).start())
    done = job.join(30)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == data
    assert set(done.names) == set(data)
    assert done.data == writer.sent == budget.most - writer.zeroes
    assert writer.zeroes > 400 * 4096
    assert budget.lease() == writer.zeroes
    assert (target / "zero.img").stat().st_blocks == 0


def test_a_long_run_of_zeroes_is_no_silence(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    """The target gives up a source of which it does not get 64 KiB in time."""
    with (folders[0] / "pages-1.img").open("wb") as f:
        f.truncate(100 * MIB)
    writer, reader = channel(pair)
    job = Job(lambda: reader.receive(place(folders[1]))).start()
    with writer:
        stream_dump({"": folders[0]}, writer, Job(lambda: None).start())
    job.join(30)
    assert 64 * KIB <= writer.sent <= MIB // 2
    arrived = folders[1] / "pages-1.img"
    assert arrived.stat().st_size == 100 * MIB and arrived.read_bytes() == bytes(100 * MIB)


def test_images_from_before_the_dump_are_complete_at_the_target_before_it(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    source, target = folders
    (source / "descriptors.json").write_bytes(b"[]")
    writer, reader = channel(pair)
    complete: queue.Queue[str] = queue.Queue()
    job = Job(lambda: reader.receive(place(target, completed=complete.put))).start()
    with writer:
        sent = send_first({"": source}, writer)
        assert sent == ["descriptors.json"]
        assert complete.get(timeout=30) == "descriptors.json"
        assert (target / "descriptors.json").read_bytes() == b"[]"
        (source / "core.img").write_bytes(b"core")
        stream_dump({"": source}, writer, Job(lambda: None).start(), sent)
    assert set(job.join(30).names) == {"descriptors.json", "core.img"}
    assert complete.get(timeout=30) == "core.img"


def test_pages_are_sent_while_the_dump_is_written(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    source, target = folders
    data, arrived = os.urandom(900_000), threading.Event()

    def dump() -> None:
        with (source / "pages-1.img").open("wb", buffering=0) as f:
            f.write(data[:500_000])
            assert arrived.wait(10)  # the first half is there before the second exists
            f.write(data[500_000:])
        (source / "core.img").write_bytes(b"core")

    writer, reader = channel(pair)
    job = Job(lambda: reader.receive(place(target))).start()
    dumping = Job(dump).start()
    with writer:
        sending = Job(lambda: stream_dump({"": source}, writer, dumping)).start()
        there = target / "pages-1.img"
        support.wait_until(
            lambda: there.exists() and there.stat().st_size == 500_000, "the half arrives"
        )
        arrived.set()
        sending.join(10)
    job.join(10)
    assert there.read_bytes() == data
    assert (target / "core.img").read_bytes() == b"core"


def test_a_dump_that_fails_is_not_taken_for_a_whole_one(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    source, target = folders
    (source / "pages-1.img").write_bytes(b"x" * 1000)

    def dump() -> None:
        raise MigrateError(8, "no")

    writer, reader = channel(pair)
    job = Job(lambda: reader.receive(place(target))).start()
    with writer, pytest.raises(MigrateError):
        stream_dump({"": source}, writer, Job(dump).start())
    with pytest.raises(ReadError, match="ended too early"):
        job.join(10)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """So many more that the files of a stream do not all fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(n) for n in os.listdir("/proc/self/fd")) + file_stream.MOST_OPEN + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors")
@pytest.mark.parametrize("name", ["core-{}.img", "pages-{}.img"])
def test_a_dump_of_thousands_of_images_arrives(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path], name: str
) -> None:
    """A container of 145 processes has more than 1,000, which were open all at once."""
    source, target = folders
    for n in range(2000):
        (source / name.format(n)).write_bytes(b"%d" % n)
    writer, reader = channel(pair)
    job = Job(lambda: reader.receive(place(target))).start()
    with writer:
        stream_dump({"": source}, writer, Job(lambda: None).start())
    assert len(job.join(30).names) == 2000
    assert all((target / name.format(n)).read_bytes() == b"%d" % n for n in range(2000))


def test_one_connection_carries_round_after_round(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    source, target = folders
    (source / "pages-1.img").write_bytes(os.urandom(5000))
    for number in range(1, 30):
        reader = open_reader(pair[1], number, wire.WINDOW, STALL)
        (target / str(number)).mkdir()
        job = Job(partial(reader.receive, place(target / str(number)))).start()
        with open_writer(pair[0], number, wire.WINDOW, STALL) as writer:
            stream_dump({"": source}, writer, Job(lambda: None).start())
        assert job.join(10).data == 5000
    support.wait_until(lambda: not pair[0]._channels, "the source forgets them")
    assert not pair[1]._channels


def test_a_limited_stream_takes_its_time(pair: tuple[Mux, Mux], folders: tuple[Path, Path]) -> None:
    (folders[0] / "one").write_bytes(b"x" * MIB)
    reader = open_reader(pair[1], 1, wire.WINDOW, STALL)
    job = Job(lambda: reader.receive(place(folders[1]))).start()
    start = time.monotonic()
    with open_writer(pair[0], 1, wire.WINDOW, STALL, rate=4 * MIB) as writer:
        writer.file("one", str(folders[0] / "one"))
        writer.end()
    job.join(10)
    assert time.monotonic() - start >= 0.15


# ---- peers of 0.1.0


def test_a_target_of_0_1_0_receives_what_is_sent(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    source, target = folders
    (source / "pages-1.img").write_bytes(pages(2000))
    fd = pair[1].open(1)
    job = Job(lambda: file_stream.receive(fd, STALL, place(target))).start()
    with open_writer(pair[0], 1, wire.WINDOW, STALL) as writer:
        stream_dump({"": source}, writer, Job(lambda: None).start())
    job.join(20)
    assert (target / "pages-1.img").read_bytes() == pages(2000)
    support.wait_until(lambda: not pair[1]._channels, "its channel has ended")


def test_what_a_source_of_0_1_0_sends_is_received(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    source, target = folders
    (source / "pages-1.img").write_bytes(pages(2000))
    reader = open_reader(pair[1], 1, wire.WINDOW, STALL)
    job = Job(lambda: reader.receive(place(target))).start()
    with file_stream.Writer(pair[0].open(1), STALL) as out:
        out.file("pages-1.img", str(source / "pages-1.img"))
        out.end()
    job.join(20)
    assert (target / "pages-1.img").read_bytes() == pages(2000)
    support.wait_until(lambda: not pair[0]._channels, "its channel has ended")


def test_the_window_is_a_number_within_bounds() -> None:
    for window in (wire.WINDOW, wire.BULK_WINDOW):
        assert messages.request("dump", {"channel": 1, "window": window})["window"] == window
    for wrong in (wire.WINDOW - 1, wire.BULK_WINDOW + 1, 1 << 40, -1, True, "2097152", None):
        with pytest.raises(ProtocolError):
            messages.request("dump", {"channel": 1, "window": wrong})


# ---- others on the connection


def test_messages_are_answered_while_images_cross(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    source, target = folders
    (source / "pages-1.img").write_bytes(os.urandom(48 * MIB))
    writer, reader = channel(pair, wire.IMAGE_WINDOW)
    job = Job(lambda: reader.receive(place(target))).start()
    with writer:
        sending = Job(lambda: stream_dump({"": source}, writer, Job(lambda: None).start())).start()
        asked = 0
        while not sending.over.is_set():
            pair[0].send({"n": asked})
            assert pair[1].receive(20) == {"n": asked}
            pair[1].send({"n": asked})
            assert pair[0].receive(20) == {"n": asked}
            asked += 1
        sending.join()
    job.join(20)
    assert asked > 3


def test_images_that_nobody_takes_hold_up_nothing_else(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    source, target = folders
    (source / "pages-1.img").write_bytes(os.urandom(4 * wire.WINDOW))
    writer, reader = channel(pair)
    with writer:
        sending = Job(lambda: stream_dump({"": source}, writer, Job(lambda: None).start())).start()
        support.wait_until(lambda: writer.sent > wire.WINDOW - wire.MAX_DATA, "it is stuck")
        ours, theirs = pair[0].open(2), pair[1].open(2)
        with socket.socket(fileno=ours) as one, socket.socket(fileno=theirs) as other:
            one.sendall(b"hello")
            assert other.recv(5) == b"hello"
        assert not sending.over.is_set()
        Job(lambda: reader.receive(place(target))).start()
        sending.join(20)


# ---- ends


def stuck(pair: tuple[Mux, Mux], source: Path) -> tuple[ImageWriter, ImageReader, Job[None]]:
    """A stream that waits for credit."""
    (source / "pages-1.img").write_bytes(os.urandom(2 * wire.WINDOW))
    writer, reader = channel(pair)
    sending = Job(lambda: stream_dump({"": source}, writer, Job(lambda: None).start())).start()
    support.wait_until(lambda: writer.sent > wire.WINDOW - wire.MAX_DATA, "it is stuck")
    return writer, reader, sending


def test_a_cancelled_stream_ends_at_once_at_both_ends(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    writer, reader, sending = stuck(pair, folders[0])
    writer.cancel()
    with pytest.raises(WriteError, match="cannot send files"):
        sending.join(10)
    writer.close()
    with pytest.raises(ReadError, match="ended too early"):
        reader.receive(place(folders[1]))
    pair[0].send({})
    assert pair[1].receive(10) == {}


def test_a_stream_to_a_peer_that_reads_nothing_can_be_cancelled(
    against: tuple[Mux, socket.socket], folders: tuple[Path, Path]
) -> None:
    """A container that is suspended must not wait for it."""
    (folders[0] / "pages-1.img").write_bytes(os.urandom(2 * MIB))
    writer = open_writer(against[0], 1, wire.IMAGE_WINDOW, STALL)
    sending = Job(lambda: stream_dump({"": folders[0]}, writer, Job(lambda: None).start())).start()
    assert not sending.over.wait(0.3)
    writer.cancel()
    with pytest.raises(WriteError):
        sending.join(10)
    support.wait_until(lambda: against[0].failure is not None, "the connection has ended")
    assert "a frame that was cancelled" in str(against[0].failure)
    writer.close()


def test_nobody_waits_to_tell_a_peer_that_reads_nothing(
    against: tuple[Mux, socket.socket],
) -> None:
    end, peer = against
    writer = open_writer(end, 1, wire.IMAGE_WINDOW, STALL)
    stuck = Job(lambda: end.send({"text": "x" * 200_000})).start()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def send_more() -> None:
        for _ in range(9):
            end.send({"text": "x" * 200_000})

    more = Job(send_more).start()
    assert not more.over.wait(0.3)
    done = Job(writer.close).start()
    done.join(5)
    end.end(ReadError("enough"))
    for job in (stuck, more):
        job.end(10)


def test_the_end_of_the_connection_ends_the_stream(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    writer, reader, sending = stuck(pair, folders[0])
    pair[0].end(WriteError("cut"))
    with pytest.raises(WriteError):
        sending.join(10)
    writer.close()
    pair[1].end(ReadError("cut"))
    with pytest.raises(ReadError):
        reader.receive(place(folders[1]))


def test_a_connection_that_is_cut_amid_the_stream_ends_both(folders: tuple[Path, Path]) -> None:
    source, target = folders
    (source / "pages-1.img").write_bytes(os.urandom(32 * MIB))
    a, b = socket.socketpair()
    ends = Mux(a.fileno(), a.fileno()), Mux(b.fileno(), b.fileno())
    writer, reader = channel(ends)
    job = Job(lambda: reader.receive(place(target))).start()
    sending = Job(lambda: stream_dump({"": source}, writer, Job(lambda: None).start())).start()
    support.wait_until(lambda: writer.sent > 4 * MIB, "it is under way")
    a.shutdown(socket.SHUT_RDWR)
    with pytest.raises(WriteError):
        sending.join(20)
    with pytest.raises((ReadError, WriteError)):  # by reading, or by giving credit
        job.join(20)
    writer.close()
    assert ends[0].failure and ends[1].failure
    for end in ends:
        end.close()
    a.close()
    b.close()


def test_a_full_target_says_so_and_the_source_stops(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    (folders[0] / "pages-1.img").write_bytes(os.urandom(4 * MIB))
    writer, reader = channel(pair)
    full = Place(lambda _: os.open("/dev/full", os.O_WRONLY))
    job = Job(lambda: reader.receive(full)).start()
    with writer, pytest.raises(WriteError, match="cannot send files"):
        stream_dump({"": folders[0]}, writer, Job(lambda: None).start())
    with pytest.raises(WriteError, match=r"pages-1\.img.*No space left"):
        job.join(10)
    pair[0].send({})
    assert pair[1].receive(10) == {}


def test_a_target_without_room_for_another_file_fails_as_one_without_room_for_data(
    pair: tuple[Mux, Mux], folders: tuple[Path, Path]
) -> None:
    support.needs("root")
    (folders[0] / "core.img").write_bytes(b"x")
    writer, reader = channel(pair)
    support.run("mount", "-t", "tmpfs", "-o", "nr_inodes=3", "none", folders[1])
    try:
        memory = IncomingMemory(folders[1], None)
        work = memory.receive(reader, 1, 0, lambda _: None, lambda _: None)
        (folders[1] / "last").touch()
        job = Job(work).start()
        with writer, contextlib.suppress(WriteError):  # it may have sent all before
            stream_dump({"": folders[0]}, writer, Job(lambda: None).start())
        with pytest.raises(WriteError, match=r"core\.img.*No space left"):
            job.join(10)
        with pytest.raises(WriteError, match=r"folder for memory images.*No space left"):
            memory.receive(reader, 2, 1, lambda _: None, lambda _: None)
    finally:
        support.run("umount", folders[1])


def test_a_peer_that_gives_no_credit_is_given_up(
    against: tuple[Mux, socket.socket], folders: tuple[Path, Path]
) -> None:
    (folders[0] / "pages-1.img").write_bytes(os.urandom(2 * wire.WINDOW))
    Job(lambda: [*iter(lambda: against[1].recv(1 << 16), b"")]).start()
    writer = open_writer(against[0], 1, wire.WINDOW, 0.2)
    with writer, pytest.raises(WriteError, match="timed out"):
        stream_dump({"": folders[0]}, writer, Job(lambda: None).start())


# ---- a peer that breaks the rules


def head(name: bytes, data: bytes, pos: int = 0) -> bytes:
    return struct.pack("<HHIQ", len(name), 0o600, len(data), pos) + name + data


def data(*parts: bytes) -> bytes:
    return b"".join(wire.frame(wire.DATA, 1, len(p)) + p for p in parts)


REFUSED: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "larger than its kind": (head(b"a", b"", 101), {"largest": lambda _: 100}, "100 bytes"),
    "data beyond its kind": (head(b"a", b"x", 100), {"largest": lambda _: 100}, "100 bytes"),
    "more data beyond it": (
        head(b"a", b"x" * 60) + head(b"a", b"x", 100),
        {"largest": lambda _: 100},
        "100 bytes",
    ),
    "more than announced": (
        head(b"a", b"x" * 60) + head(b"b", b"x" * 60),
        {"budget": Budget(100)},
        "100 bytes",
    ),
    "more of one than announced": (
        head(b"a", b"x" * 60) + head(b"a", b"x" * 40) + head(b"a", b"x"),
        {"budget": Budget(100)},
        "100 bytes",
    ),
    "too many files": (
        head(b"a", b"") + head(b"b", b"") + head(b"c", b""),
        {"most_files": 2},
        "more than 2 files",
    ),
    "a NUL in a name": (head(b"a\0b", b"x"), {}, "NUL"),
    "a name that is too long": (struct.pack("<HHIQ", 1025, 0, 0, 0), {}, "longer than 1024"),
    "a piece that is too large": (struct.pack("<HHIQ", 1, 0, MIB + 1, 0) + b"a", {}, "bounds"),
    "the same of an open file": (
        head(b"a", b"x") + struct.pack("<HHIQ", 1, 0, MIB + 1, 0) + b"a",
        {},
        "bounds",
    ),
    "a position that is none": (struct.pack("<HHIQ", 1, 0, 1, 1 << 62) + b"ax", {}, "bounds"),
    "the last position": (struct.pack("<HHIQ", 1, 0, 1, (1 << 64) - 1) + b"ax", {}, "bounds"),
    "more after the end": (head(b"a", b"", 5) + head(b"a", b"x"), {}, "after its end"),
    "an end that is too early": (head(b"a", b"x") + head(b"", b""), {}, "before 'a' was complete"),
}


@pytest.mark.parametrize("split", [0, 1, 7])
@pytest.mark.parametrize("what", list(REFUSED))
def test_a_stream_of_images_keeps_to_its_limits(
    against: tuple[Mux, socket.socket], tmp_path: Path, what: str, split: int
) -> None:
    stream, limits, why = REFUSED[what]
    limits = {k: Budget(v.most) if isinstance(v, Budget) else v for k, v in limits.items()}
    reader = open_reader(against[0], 1, wire.WINDOW, STALL)
    parts = [stream[n : n + split] for n in range(0, len(stream), split)] if split else [stream]
    against[1].sendall(data(*parts))
    with pytest.raises(ProtocolError, match=why):
        reader.receive(place(tmp_path, **limits))
    assert all(p.stat().st_size <= 100 for p in tmp_path.iterdir())
    against[1].sendall(wire.encode({"n": 1}))  # the connection goes on
    assert against[0].receive(10) == {"n": 1}


def test_a_piece_that_is_cut_off_is_no_piece(
    against: tuple[Mux, socket.socket], tmp_path: Path
) -> None:
    whole = head(b"abc", b"x" * 50)
    for n, size in enumerate([1, 15, 16, 18, 19, 20, len(whole) - 1, len(whole)], 1):
        reader = open_reader(against[0], n, wire.WINDOW, STALL)
        frame = wire.frame(wire.DATA, n, size) + whole[:size] + wire.frame(wire.END, n, 0)
        against[1].sendall(frame)
        (tmp_path / str(n)).mkdir()
        with pytest.raises(ReadError, match="ended too early"):
            reader.receive(place(tmp_path / str(n)))


def test_who_drips_is_given_up(against: tuple[Mux, socket.socket], tmp_path: Path) -> None:
    over = threading.Event()

    def drip() -> None:
        for byte in head(b"a", bytes(1 << 16)):
            if over.wait(0.05):
                return
            with contextlib.suppress(OSError):
                against[1].sendall(data(bytes([byte])))

    dripping = Job(drip).start()
    reader = open_reader(against[0], 1, wire.WINDOW, 0.5)
    try:
        with pytest.raises(ReadError, match="less than 64 KiB"):
            reader.receive(place(tmp_path))
    finally:
        over.set()
        dripping.join(10)


@pytest.mark.parametrize(
    ("opened", "frames", "why"),
    [
        ("reader", data(*[bytes(wire.MAX_DATA)] * 8, b"x"), "more than the credit"),
        ("reader", wire.frame(wire.END, 1, 0) + data(b"x"), "after the end"),
        ("reader", wire.frame(wire.CREDIT, 1, 4) + b"\1\0\0\0", "credit, though nothing"),
        ("reader", wire.frame(wire.DATA, 1, 0), "with 0 bytes"),
        ("reader", wire.frame(wire.DATA, 1, wire.MAX_DATA + 1), "262145 bytes"),
        ("writer", wire.frame(wire.CREDIT, 1, 4) + b"\1\0\0\0", "more credit"),
        ("writer", wire.frame(wire.CREDIT, 1, 4) + b"\377\377\377\377", "more credit"),
        ("writer", data(b"x"), "data, which nobody reads"),
    ],
)
def test_frames_that_may_not_come_end_the_connection(
    against: tuple[Mux, socket.socket], opened: str, frames: bytes, why: str
) -> None:
    end, peer = against
    open_it = open_reader if opened == "reader" else open_writer
    made: ImageReader | ImageWriter = open_it(end, 1, wire.WINDOW, STALL)
    peer.sendall(frames)
    support.wait_until(lambda: end.failure is not None, "the connection ends")
    assert isinstance(end.failure, ProtocolError)
    assert why in str(end.failure)
    made.close()


def test_streams_that_nobody_takes_are_bounded(against: tuple[Mux, socket.socket]) -> None:
    opened = [open_reader(against[0], n, wire.WINDOW, STALL) for n in range(1, 9)]
    with pytest.raises(PyploopError, match="too many channels"):
        open_reader(against[0], 9, wire.WINDOW, STALL)
    opened.pop().close()
    opened.append(open_reader(against[0], 10, wire.WINDOW, STALL))
    for one in opened:
        one.close()
    with pytest.raises(PyploopError, match="opened before"):
        open_reader(against[0], 10, wire.WINDOW, STALL)
