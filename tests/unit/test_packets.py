# SPDX-License-Identifier: Apache-2.0
"""D2 and D3 against a model of the C library's ends (tests/d2_peer.py)."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import d2_peer
import pytest
import support
from d2_peer import ASYNC, CMD, COPY_DEVICE, DATA, MD5, NEW, OLD, SLIP, Receiver
from support import MIB

from pyploop import libploop
from pyploop.diskcopy.d2_target import PacketOutput
from pyploop.diskcopy.options import Options
from pyploop.diskcopy.sender import Sender
from pyploop.disks import opening
from pyploop.errors import ParameterError, PyploopError, WriteError
from pyploop.report.events import Reporter
from pyploop.trackers.registry import choose
from pyploop.wire import d2, d3

PYPLOOP = 1 << 30
BLOCKS = [
    (0, bytes(range(1, 256)) * 4096),
    (3 * MIB, b"x" * 5000),
    (MIB + 7, bytes(70000)),
    (100, b"four"),
    (3 * MIB + 5000, b"\0" * 4),
]
"""Position and data: overlaps, zeroes, and packets of four bytes."""


def image_of(blocks: list[tuple[int, bytes]]) -> bytes:
    image = bytearray(max(pos + len(data) for pos, data in blocks))
    for pos, data in blocks:
        image[pos : pos + len(data)] = data
    return bytes(image)


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        a.settimeout(20)
        yield a, b


class Ours(threading.Thread):
    """Our receiver on a socket; `reason` is why it failed."""

    def __init__(self, target: Path, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self._target, self._sock = target, sock
        self.reason = ""
        self.start()

    def run(self) -> None:
        try:
            libploop.ploopcopy_receiver(str(self._target), self._sock.fileno())
        except RuntimeError as e:
            self.reason = str(e)

    def end(self) -> str:
        self.join(20)
        assert not self.is_alive(), "our receiver hangs"
        return self.reason


# ---- our receiver


@pytest.mark.parametrize("kind", [DATA, ASYNC])
@pytest.mark.parametrize("offer", [0, MD5, MD5 | COPY_DEVICE, COPY_DEVICE])
def test_receiver_takes_what_each_library_sends(tmp_path: Path, kind: int, offer: int) -> None:
    with pair() as (peer, ours):
        receiver = Ours(tmp_path / "image", ours)
        replies = d2_peer.send(peer, BLOCKS, offer=offer, kind=kind)
        # END is answered when the file has its name.
        assert (tmp_path / "image").read_bytes() == image_of(BLOCKS)
        assert receiver.end() == ""
        assert replies == [0] * (2 if kind == ASYNC else 2 + len(BLOCKS))


@pytest.mark.parametrize(
    ("offered", "reply"),
    [(1, -1), (3, -1), (2, 0), (1 | PYPLOOP, -1 - PYPLOOP), ((1 << 64) - 1, -1 - PYPLOOP)],
)
def test_receiver_answers_the_handshake_with_what_it_supports(
    tmp_path: Path, offered: int, reply: int
) -> None:
    with pair() as (peer, ours):
        receiver = Ours(tmp_path / "image", ours)
        peer.sendall(d2_peer.command(0, offered))
        assert d2_peer.read_reply(peer) == reply
        peer.shutdown(socket.SHUT_RDWR)
        assert "without END" in receiver.end()


def test_the_command_receives_what_the_library_sends(tmp_path: Path) -> None:
    with pair() as (peer, ours):
        done = subprocess.Popen(
            [*support.pyploop_cmd(), "copy", "-d", tmp_path / "image", "-i", str(ours.fileno())],
            pass_fds=[ours.fileno()], env=support.pyploop_env(), stdout=subprocess.DEVNULL,
        )  # fmt: skip
        replies = d2_peer.send(peer, BLOCKS, offer=MD5)
        assert done.wait(20) == 0
    assert replies == [0] * (2 + len(BLOCKS))
    assert (tmp_path / "image").read_bytes() == image_of(BLOCKS)


def test_a_sender_that_waits_for_each_answer_gets_each_in_time(tmp_path: Path) -> None:
    """Lockstep is what the C library does: no answer may wait for the next
    packet, however small the packets and whatever the writer is at."""
    blocks = [(k * 512, bytes([k % 255 + 1]) * 512) for k in range(3000)]
    with pair() as (peer, ours):
        receiver = Ours(tmp_path / "image", ours)
        assert d2_peer.send(peer, blocks) == [0] * 3002
        assert receiver.end() == ""
    assert (tmp_path / "image").read_bytes() == image_of(blocks)


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


D = d2_peer.packet(DATA, 0, b"some data")
HEAD = d2_peer.HEADER
REFUSED = {
    "DATA_DEVICE": (d2_peer.packet(3, 0, b"some data"), 38, "DATA_DEVICE"),
    "DATA_CBT": (d2_peer.packet(4, 0, b"some data"), 38, "DATA_CBT"),
    "an unknown type": (d2_peer.packet(77, 0, b"some data"), 38, "type 77 (unknown)"),
    "INIT_PLOOP": (d2_peer.packet(CMD, 9, struct.pack("<I", 2) + bytes(2044)), 38, "INIT_PLOOP"),
    "INIT_QCOW": (d2_peer.command(3), 38, "INIT_QCOW"),
    "MOUNT": (d2_peer.command(4), 38, "MOUNT"),
    "UMOUNT": (d2_peer.command(5), 38, "UMOUNT"),
    "FINISH with data": (d2_peer.command(1), 38, "FINISH"),
    "a short command": (d2_peer.packet(CMD, 0, b"\0\0"), 13, "command has 2 bytes"),
    "a D1 frame": (support.d1_frame(0, b"x" * 100), 13, "a D1 frame in a D2 stream"),
    "text": (b"Welcome to host.example.com\n", 13, "bad marker"),
    "64 MiB + 1": (HEAD.pack(d2_peer.MARK, DATA, (64 << 20) + 1, 0, 0), 5, "67108865"),
    "4 GiB - 1": (HEAD.pack(d2_peer.MARK, ASYNC, 2**32 - 1, 0, 0), 5, "4294967295"),
    "past 2^63": (d2_peer.packet(DATA, 2**63 - 9, b"some data"), 7, "position"),
    "2^64 - 1": (d2_peer.packet(ASYNC, 2**64 - 1, b"some data"), 7, "position"),
    "2^62": (d2_peer.packet(DATA, 2**62, b"some data"), 7, "cannot write"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_receiver_refuses_with_a_reply_a_reason_and_no_file(tmp_path: Path, case: str) -> None:
    bad, code, words = REFUSED[case]
    with pair() as (peer, ours):
        receiver = Ours(tmp_path / "image", ours)
        peer.sendall(D)
        assert d2_peer.read_reply(peer) == 0
        peer.sendall(bad)
        assert d2_peer.read_reply(peer) == code
        assert peer.recv(1) == b"", "it hangs up, or the peer would wait for ever"
        reason = receiver.end()
    assert words in reason and "was not created" in reason
    assert "frame 1, byte" in reason or words == "cannot write"
    assert list(tmp_path.iterdir()) == []


def test_receiver_refuses_a_handshake_in_the_middle(tmp_path: Path) -> None:
    for before in (d2_peer.command(0, MD5), d2_peer.command(0), D):
        with pair() as (peer, ours):
            receiver = Ours(tmp_path / "image", ours)
            peer.sendall(before)
            md5 = d2_peer.read_reply(peer) != 0
            peer.sendall(d2_peer.command(0, MD5, md5))
            assert d2_peer.read_reply(peer) == 13
            assert "handshake" in receiver.end()
    assert list(tmp_path.iterdir()) == []


def test_the_library_receives_the_commands_stream_too(tmp_path: Path) -> None:
    with pair() as (peer, ours):
        receiver = Ours(tmp_path / "image", ours)
        peer.sendall(support.d1_sync(b"PYP\x01"))
        assert d2_peer.read_all(peer, 8) == b"PYPLOOP\x01"
        peer.sendall(support.d1_frame(7, b"some data"))
        peer.sendall(support.d1_end())
        assert d2_peer.read_all(peer, 8) == support.SUCCESS
        assert receiver.end() == ""
    assert (tmp_path / "image").read_bytes() == bytes(7) + b"some data"


def test_receiver_refuses_a_wrong_md5(tmp_path: Path) -> None:
    for at in (24, 40, 48):
        with pair() as (peer, ours):
            receiver = Ours(tmp_path / "image", ours)
            peer.sendall(d2_peer.command(0, MD5))
            assert d2_peer.read_reply(peer) == -1
            peer.sendall(_flipped(d2_peer.packet(ASYNC, 0, b"some data", md5=True), at))
            assert d2_peer.read_reply(peer) == 13
            assert "MD5" in receiver.end()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offer", [0, MD5 | PYPLOOP])
def test_a_file_that_is_there_is_neither_deleted_nor_written(tmp_path: Path, offer: int) -> None:
    """The C library's receiver opens it without O_EXCL, and deletes it on failure."""
    target = tmp_path / "image"
    target.write_bytes(b"precious")
    with pair() as (peer, ours):
        receiver = Ours(target, ours)
        assert "File exists" in receiver.end()
        with contextlib.suppress(OSError):
            peer.sendall(d2_peer.command(0, offer) if offer else D)
        assert d2_peer.read_reply(peer) == 1
    assert target.read_bytes() == b"precious"


def test_a_full_target_is_reported_at_the_packet_that_did_not_fit(tmp_path: Path) -> None:
    support.needs("root")
    blocks = [(k * MIB, os.urandom(MIB)) for k in range(12)]
    with support.tmpfs(tmp_path / "small", 4 * MIB) as folder, pair() as (peer, ours):
        receiver = Ours(folder / "image", ours)
        replies = d2_peer.send(peer, blocks)
        assert replies == [0] * (len(replies) - 1) + [7] and len(replies) <= 5
        assert "No space left" in receiver.end()
        assert list(folder.iterdir()) == []


def test_a_pipe_or_a_file_is_no_place_for_answers(tmp_path: Path) -> None:
    r, w = os.pipe()
    try:
        with pytest.raises(RuntimeError, match="not a socket"):
            libploop.ploopcopy_receiver(str(tmp_path / "image"), r)
        with pytest.raises(RuntimeError, match="Bad file descriptor"):
            libploop.ploopcopy_receiver(str(tmp_path / "image"), 1 << 19)
    finally:
        os.close(r)
        os.close(w)


# ---- our sender


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    with path.open("wb") as f:
        f.write(os.urandom(2 * MIB) + bytes(MIB) + os.urandom(MIB + 4))
        f.truncate(8 * MIB + 4)  # a hole, and a block of four bytes
    return path


def send(source: Path, fd: int, **options: object) -> Sender:
    """Our sender, from a plain file."""
    out = PacketOutput(fd, Reporter(), answer_timeout=20, **options)  # type: ignore[arg-type]
    with contextlib.closing(opening.open_source(str(source))) as src:
        sender = Sender(src, choose("scan", src), out, Options(stall=20), Reporter())
        sender.run()
        return sender


@pytest.mark.parametrize(
    ("answer", "dialect"),
    [
        (OLD, "D2, ploop peer"),
        (NEW, "D3, ploop peer, MD5, async"),
        (SLIP, "D3, ploop peer, MD5, async"),
    ],
)
def test_sender_speaks_as_its_peer_does(source: Path, answer: int, dialect: str) -> None:
    """1.15 answers 0, 7u14 the negated flags, 9.0.30 minus one."""
    with pair() as (peer, ours):
        model = Receiver(peer, answer)
        sender = send(source, ours.fileno())
        model.join()
    assert model.image == source.read_bytes()
    assert (sender.summary.dialect, sender.summary.acknowledged) == (dialect, "acknowledged")
    assert model.offered == MD5 | PYPLOOP and not model.offered & COPY_DEVICE
    data = [p for p in model.packets if p.kind != CMD]
    assert {p.kind for p in data} == {DATA if answer == OLD else ASYNC}
    # It may write into a file that was there: zeroes and holes are sent.
    assert sum(len(p.data) for p in data) >= 8 * MIB + 4
    assert sum(len(p.data) == 4 for p in data) == 1
    assert [len(p.data) for p in model.packets].count(0) == 1 and model.packets[-1].data == b""


def test_sender_uses_async_when_its_caller_says_that_the_peer_knows_it(source: Path) -> None:
    with pair() as (peer, ours):
        model = Receiver(peer, SLIP)
        model.answer = OLD  # no handshake; but it takes type 2
        out = PacketOutput(ours.fileno(), Reporter(), answer_timeout=20, knows_async=True)
        out.hello()
        assert out.packets.unanswered and not out.packets.digests
        assert out.dialect == "D2, ploop peer, async"


def test_a_pyploop_peer_is_spared_the_zeroes(source: Path, tmp_path: Path) -> None:
    with pair() as (a, b):
        receiver = Ours(tmp_path / "image", b)
        sender = send(source, a.fileno())
        assert receiver.end() == ""
    assert (tmp_path / "image").read_bytes() == source.read_bytes()
    assert sender.summary.dialect == "D3, pyploop peer, MD5, async"
    assert sender.summary.data_bytes < 4 * MIB


@pytest.mark.parametrize("answer", [OLD, NEW])
@pytest.mark.parametrize("fail_at", [1, 3, 8, 10])
@pytest.mark.invariant(number=2)
def test_sender_looks_at_every_reply(source: Path, answer: int, fail_at: int) -> None:
    """The C library's sender reads replies and never looks at them."""
    with pair() as (peer, ours):
        model = Receiver(peer, answer, fail_at=fail_at)
        with pytest.raises(PyploopError, match=r"cannot write its target \(reply 7\)"):
            send(source, ours.fileno())
        model.join()
        assert len(model.packets) == fail_at + 1


@pytest.mark.parametrize(
    ("code", "words"),
    [(1, "exists"), (38, "not support"), (99, "unknown reason"), (5, "too large")],
)
def test_sender_says_why_the_peer_refuses_it(source: Path, code: int, words: str) -> None:
    with pair() as (peer, ours):
        model = Receiver(peer, fail_at=0, code=code)
        with pytest.raises(WriteError, match=words):
            send(source, ours.fileno())
        model.join()


@pytest.mark.invariant(number=2)
def test_a_failed_sync_and_a_failed_end_are_errors(source: Path) -> None:
    for last in (2, 1):
        with pair() as (peer, ours):
            counter = Receiver(peer, NEW)
            send(source, ours.fileno())
            counter.join()
            total = len(counter.packets)
        with pair() as (peer, ours):
            model = Receiver(peer, NEW, fail_at=total - last, code=16)
            with pytest.raises(PyploopError, match="durable"):
                send(source, ours.fileno())
            model.join()


def test_throughput_does_not_depend_on_the_round_trip(source: Path) -> None:
    """Every answer comes 50 ms late; there are enough packets that waiting for
    each would take half a minute."""
    path = source.with_name("many")
    with path.open("wb") as f:
        for k in range(600):
            f.seek(k * 8192)
            f.write(bytes([k % 255 + 1]) * 4096)
    with pair() as (peer, ours), pair() as (near, far):
        model = Receiver(peer, OLD)
        line = threading.Thread(target=_late_line, args=(near, ours, 0.05), daemon=True)
        line.start()
        start = time.monotonic()
        out = PacketOutput(far.fileno(), Reporter(), answer_timeout=20)
        with contextlib.closing(opening.open_source(str(path))) as src:
            src.cluster = 4096
            Sender(src, choose("scan", src), out, Options(stall=20), Reporter()).run()
        seconds = time.monotonic() - start
        model.join()
    assert len([p for p in model.packets if p.kind == DATA]) >= 1199
    assert model.image == path.read_bytes()
    assert seconds < 10, "each of 1199 answers was waited for"


def _late_line(near: socket.socket, far: socket.socket, delay: float) -> None:
    """Packets at once, answers after `delay` seconds each, but not in a row."""
    answers: list[tuple[float, bytes]] = []
    more = threading.Condition()

    def back() -> None:
        while True:
            with more:
                while not answers:
                    more.wait()
                due, data = answers.pop(0)
            if not data:
                return
            time.sleep(max(0.0, due - time.monotonic()))
            with contextlib.suppress(OSError):
                near.sendall(data)

    def collect() -> None:
        data = b"x"
        while data:
            try:
                data = far.recv(65536)
            except OSError:
                data = b""
            with more:
                answers.append((time.monotonic() + delay, data))
                more.notify()

    threads = [threading.Thread(target=t, daemon=True) for t in (back, collect)]
    for t in threads:
        t.start()
    with contextlib.suppress(OSError):
        while data := near.recv(1 << 20):
            far.sendall(data)
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_RDWR)


def test_no_small_packet_waits_for_an_acknowledgement(source: Path, tmp_path: Path) -> None:
    """Nagle's algorithm would hold a SYNC, and each answer, for 40 ms."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        b = server.accept()[0]
    with a, b:
        receiver = Ours(tmp_path / "image", b)
        send(source, a.fileno())
        assert receiver.end() == ""
        for end in (a, b):
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_socket_that_never_blocks_will_do(source: Path, tmp_path: Path) -> None:
    with pair() as (a, b):
        a.setblocking(False)
        b.setblocking(False)
        receiver = Ours(tmp_path / "image", b)
        send(source, a.fileno())
        assert receiver.end() == ""
        assert not a.getblocking() and not b.getblocking()
    assert (tmp_path / "image").read_bytes() == source.read_bytes()


# ---- the alias


def test_the_alias_is_written_once_and_never_over_another_module(tmp_path: Path) -> None:
    def alias() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pyploop.libploop", "--alias", str(tmp_path)]
        return subprocess.run(
            command, env=support.pyploop_env(), capture_output=True, text=True, check=False
        )

    for _ in range(2):
        assert alias().returncode == 0
    code = "import libploop; print(libploop.ploopcopy.__module__)"
    env = support.pyploop_env({"PYTHONPATH": str(tmp_path)})
    assert support.run(sys.executable, "-c", code, env=env) == "pyploop.libploop\n"
    (tmp_path / "libploop.py").write_text("# somebody's\n")
    done = alias()
    assert (done.returncode, done.stdout) == (1, "")
    assert "File exists" in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "libploop.py").read_text() == "# somebody's\n"


# ---- the bytes


def test_packets_have_the_documented_bytes() -> None:
    assert d2.sync() == bytes.fromhex("3eacc04c 01000000 04000000 00000000" + "00" * 12)
    assert d2.end() == bytes.fromhex("3eacc04c 01000000 00000000 00000000" + "00" * 8)
    digest = bytes.fromhex("d41d8cd98f00b204e9800998ecf8427e")
    assert d2.end(digest=True) == d2.end() + digest
    assert d2.sync(features=d3.offer())[16:24] == bytes.fromhex("0100004000000000")
    assert d2.packet(d2.DATA, 5, b"ab") == d2_peer.packet(DATA, 5, b"ab")
    assert d2.reply(-3) == b"\xfd\xff\xff\xff"


def test_a_positive_answer_to_the_handshake_is_a_failure() -> None:
    with pytest.raises(ValueError, match="7"):
        d3.agreed(d3.offer(), 7)
    for offered in (0, 1, 2, 3, d3.offer(), (1 << 64) - 1):
        reply, features = d3.answer(offered)
        assert -(2**31) <= reply <= 0 and d3.agreed(offered, reply) == features


def test_the_exit_code_of_a_refusal_is_the_c_tools() -> None:
    from pyploop.errors import NotSupportedError

    assert NotSupportedError.exit_code == ParameterError.exit_code == 38
