# SPDX-License-Identifier: Apache-2.0
"""The proof of a copy: the tree of hashes, what both ends say about it, and faults that it
finds (docs/internals/proof.md)."""

from __future__ import annotations

import json
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MIB, d1_end, d1_frame, pyploop_cmd

import pyploop
from pyploop import CopyOptions, _core
from pyploop._core import Extents, Proof, Pump, Receiver
from pyploop.cli import verify as command
from pyploop.diskcopy import proof as proofs
from pyploop.diskcopy.receipt import Receipt
from pyploop.diskcopy.receiver import Received, receive
from pyploop.disks import opening
from pyploop.disks.image import clear_in_use
from pyploop.disks.source import Source
from pyploop.errors import (
    DeviceError,
    FormatError,
    ParameterError,
    ProtocolError,
    PyploopError,
    WriteError,
)
from pyploop.report.events import Reporter
from pyploop.wire import d1

BLOCK = 4096
FAULTS = 1000


def model(image: bytes) -> bytes:
    """The root of an image, as docs/internals/proof.md says it."""
    size = len(image)
    blocks = (image[i : i + BLOCK] for i in range(0, size, BLOCK))
    level = [struct.pack("<Q", _core.hash_block_ref(b)) for b in blocks] or [bytes(8)]
    first = True
    while first or len(level) > 1:
        groups = (b"".join(level[i : i + 256]) for i in range(0, len(level), 256))
        level = [_core.hash128_ref(g) if any(g) else bytes(16) for g in groups]
        first = False
    return _core.hash128_ref(level[0] + struct.pack("<QII", size, BLOCK, 1))


# ---- the tree


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 700 * BLOCK),
    st.lists(st.tuples(st.integers(0, 700 * BLOCK), st.binary(max_size=3 * BLOCK)), max_size=12),
    st.data(),
)
def test_the_root_is_that_of_the_contents_however_they_were_written(
    size: int, writes: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    proof, image = Proof(size), bytearray(size)
    with open(os.memfd_create("image"), "r+b", buffering=0) as file:
        for pos, what in writes:
            part = what[: max(size - pos, 0)]
            if part:
                image[pos : pos + len(part)] = part
                os.pwrite(file.fileno(), part, pos)
                proof.note(pos, part)
            if data.draw(st.booleans()):
                assert proof.root(file.fileno()) == model(bytes(image))
        assert proof.root(file.fileno()) == model(bytes(image))


def test_the_root_of_a_known_image_is_the_one_in_the_documents() -> None:
    """Receipts are compared by later versions, too."""
    image = bytes(range(256)) * 16 + bytes(BLOCK) + b"the end"
    proof = Proof(len(image))
    proof.note(0, image)
    assert proof.root() == model(image)
    assert proof.root().hex() == "63aab10e386f1a4b811371aa6f537684"


def test_what_is_past_the_end_of_an_image_is_refused() -> None:
    proof = Proof(100)
    with pytest.raises(ValueError, match="past the end"):
        proof.note(99, b"xx")


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(0, 70_000 - 1), max_size=60))
def test_a_descent_finds_just_the_blocks_that_differ(blocks: set[int]) -> None:
    size = 70_000 * BLOCK - 5  # three levels of nodes
    ours, theirs = Proof(size), Proof(size)
    for block in blocks:
        theirs.note(block * BLOCK, bytes([block % 255 + 1]) * min(BLOCK, size - block * BLOCK))
    ours.root()
    witness = witness_of(theirs)
    found = proofs.descend(ours, witness)
    assert found == [(b * BLOCK, min((b + 1) * BLOCK, size)) for b in sorted(blocks)]


def witness_of(proof: Proof) -> proofs.Ask:
    said: list[bytes] = []
    witness = proofs.Witness(proof.size, said.append, lambda times: b"")
    witness.proof = proof
    proof.root()
    witness.refused = 1

    def ask(level: int, nodes: list[int], size: int) -> bytes:
        frame = d1.question(level, nodes)
        assert len(nodes) <= d1.MANY_NODES
        said.clear()
        witness.answer(level, frame[d1.HEADER.size :])
        assert len(said[0]) == size
        return said[0]

    return ask


def test_more_differences_than_an_accident_makes_are_not_sent_again() -> None:
    size = 300 * MIB
    ours, theirs = Proof(size), Proof(size)
    for pos in range(0, size, MIB):
        theirs.note(pos, b"x" * BLOCK)
    ours.root()
    with pytest.raises(proofs.TargetDiffers, match=r"differs .* in 300 parts of 1\.0 MiB"):
        proofs.descend(ours, witness_of(theirs))


# ---- both ends


@contextmanager
def receiving(
    path: Path, harm: Callable[[bytes], bytes] | None = None
) -> Iterator[tuple[int, int, list[object]]]:
    """A receiver in a thread, and the two descriptors of its sender.  harm: what a stretch of
    the stream becomes on the way."""
    fds = [*os.pipe(), *os.pipe()]
    stream_r, stream_w, back_r, back_w = fds
    result: list[object] = []
    relays: list[threading.Thread] = []
    source = stream_r
    if harm is not None:
        through_r, through_w = os.pipe()
        fds += [through_r]
        source = through_r
        relays.append(threading.Thread(target=_relay, args=(stream_r, through_w, harm)))

    def run() -> None:
        try:
            result.append(receive(str(path), source, back_w, Reporter(), 20))
        except PyploopError as e:
            result.append(e)
        finally:
            os.close(back_w)
            if harm is None:
                os.close(stream_r)

    threads = [threading.Thread(target=run), *relays]
    for thread in threads:
        thread.start()
    try:
        yield stream_w, back_r, result
    finally:
        os.close(stream_w)
        for thread in threads:
            thread.join()
        os.close(back_r)
        for fd in fds[4:]:
            os.close(fd)


def _relay(source: int, to: int, harm: Callable[[bytes], bytes]) -> None:
    try:
        while data := os.read(source, 1 << 16):
            data = harm(data)
            while data:
                data = data[os.write(to, data) :]
    except BrokenPipeError:
        pass
    finally:
        os.close(source)
        os.close(to)


def root_received(result: list[object]) -> str | None:
    (received,) = result
    assert isinstance(received, Received), received
    root: str | None = received.fields()["root"]
    return root


def image(path: Path, size: int) -> bytes:
    data = bytearray(os.urandom(size))
    data[size // 3 : size // 2] = bytes(size // 2 - size // 3)
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize("compress", ["never", "zstd"])
def test_two_pyploops_agree_on_the_root_of_what_was_copied(tmp_path: Path, compress: str) -> None:
    data = image(tmp_path / "source", 3 * MIB + 77)
    options = CopyOptions(proof="always", compress=compress)
    with receiving(tmp_path / "target") as (stream, back, got):
        result = pyploop.copy(tmp_path / "source", stream, options=options, feedback=back)
    assert (result.root, result.proven, result.resent_bytes) == (model(data).hex(), True, 0)
    assert (tmp_path / "target").read_bytes() == data
    assert root_received(got) == result.root


@pytest.mark.parametrize("options", [CopyOptions(), CopyOptions(proof="never")])
def test_a_copy_that_asks_for_no_proof_keeps_none(tmp_path: Path, options: CopyOptions) -> None:
    image(tmp_path / "source", 10_000)
    with receiving(tmp_path / "target") as (stream, back, got):
        result = pyploop.copy(tmp_path / "source", stream, options=options, feedback=back)
    assert (result.root, result.proven) == (None, False)
    assert root_received(got) is None


class Flip:
    """Inverts one bit of the stream, in byte `at`."""

    def __init__(self, at: int) -> None:
        self.at, self.times, self.passed = at, 1, 0

    def __call__(self, data: bytes) -> bytes:
        made = bytearray(data)
        if self.passed <= self.at < self.passed + len(data):
            made[self.at - self.passed] ^= 4
            self.times = 0
        self.passed += len(data)
        return bytes(made)


def test_a_bit_that_is_flipped_on_the_way_is_found_and_its_block_sent_again(
    tmp_path: Path,
) -> None:
    data = image(tmp_path / "source", 3 * MIB + 77)
    with receiving(tmp_path / "target", Flip(1_000_000)) as (stream, back, got):
        result = pyploop.copy(
            tmp_path / "source", stream, options=CopyOptions(proof="always"), feedback=back
        )
    assert result.resent_bytes == BLOCK
    assert result.proven
    assert (tmp_path / "target").read_bytes() == data
    assert root_received(got) == result.root == model(data).hex()


def test_whatever_is_flipped_on_the_way_the_target_is_right_or_there_is_none(
    tmp_path: Path,
) -> None:
    rng = random.Random(5)
    data = image(tmp_path / "source", 100_000)
    outcomes = set()
    for number in range(20):
        target = tmp_path / f"target{number}"
        flip = Flip(rng.randrange(200, 83_000))
        try:
            with receiving(target, flip) as (stream, back, _):
                options = CopyOptions(proof="always")
                result = pyploop.copy(tmp_path / "source", stream, options=options, feedback=back)
            assert flip.times or result.resent_bytes
            assert target.read_bytes() == data
            outcomes.add("again")
        except PyploopError:
            assert not target.exists()
            outcomes.add("failed")
    assert "again" in outcomes


def test_the_header_that_ends_the_copy_of_a_ploop_image_is_in_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a part of a block, and not what the source has."""

    def open_image(*args: Any, **how: Any) -> Source:
        source = opening.open_source(*args, **how)
        source.image_format = "ploop1"
        return source

    data = image(tmp_path / "source", 10_000)
    monkeypatch.setattr("pyploop.api.copying.opening", SimpleNamespace(open_source=open_image))
    with receiving(tmp_path / "target") as (stream, back, _):
        result = pyploop.copy(
            tmp_path / "source", stream, options=CopyOptions(proof="always"), feedback=back
        )
    target = (tmp_path / "target").read_bytes()
    assert target == clear_in_use(data[:512]) + data[512:] != data
    assert (result.root, result.resent_bytes) == (model(target).hex(), 0)


def test_a_target_that_differs_after_blocks_were_sent_again_fails_at_both_ends(
    tmp_path: Path,
) -> None:
    image(tmp_path / "source", 200_000)
    flip = Flip(100_000)
    frame_of_a_block = d1.HEADER.pack(d1.MARK, BLOCK, 0)[:8]

    def harm(data: bytes) -> bytes:
        """Once, and once more in the block that is sent again, which comes alone or behind
        other bytes."""
        again = -1 if flip.times else data.find(frame_of_a_block)
        if again >= 0 and (at := again + d1.HEADER.size) < len(data):
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        return flip(data)

    with (
        receiving(tmp_path / "target", harm) as (stream, back, got),
        pytest.raises(ProtocolError, match=r"target is not what was sent .* no target was made"),
    ):
        pyploop.copy(
            tmp_path / "source", stream, options=CopyOptions(proof="always"), feedback=back
        )
    assert isinstance(got[0], proofs.TargetDiffers)
    assert "blocks were sent again already" in str(got[0])
    assert not (tmp_path / "target").exists()


class Stream:
    """A sender of our own, up to the agreement on PROOF."""

    def __init__(self, stream: int, back: int, size: int) -> None:
        self.stream, self.back = stream, back
        hellos = (b"PYP\x01", 0), (b"PYP\x02", 0), (b"PYP\x03", size), (b"PYP\x05", 2)
        for hello, pos in hellos:
            self.write(d1_frame(pos, hello))
        assert self.read(8) == b"PYPLOOP\x01"
        assert self.read(64)[:8] == b"PYPLOOP\x02"
        assert self.read(64)[:8] == b"PYPLOOP\x03"
        self.read(16 * struct.unpack("<16sQI", self.read(28))[2])
        assert self.read(64)[:8] == b"PYPLOOP\x05"
        assert self.read(16) == struct.pack("<QQ", 2, 0)

    def write(self, data: bytes) -> None:
        assert os.write(self.stream, data) == len(data)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (part := os.read(self.back, size - len(data))):
            data += part
        return data


DATA = random.Random(3).randbytes(10_000)
GOOD = d1.proof(len(DATA), BLOCK, 1, model(DATA))


def test_end_after_a_proof_that_agrees_is_answered_as_ever(tmp_path: Path) -> None:
    with receiving(tmp_path / "target") as (stream, back, got):
        sender = Stream(stream, back, len(DATA))
        sender.write(d1_frame(0, DATA[:5000]) + d1_frame(5000, DATA[5000:]) + GOOD + d1_end())
        assert sender.read(8) == b"SUCCESS\n"
    assert (tmp_path / "target").read_bytes() == DATA
    assert root_received(got) == model(DATA).hex()


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        (b"", "without the PROOF that it agreed to"),
        (GOOD + d1_frame(0, DATA[:3]), "without the PROOF that it agreed to"),
        (d1.proof(len(DATA) + 1, BLOCK, 1, bytes(16)), "PROOF is of 10001 bytes"),
        (d1.proof(len(DATA), 8192, 1, bytes(16)), "in blocks of 8192"),
        (d1.proof(len(DATA), BLOCK, 2, bytes(16)), "by algorithm 2"),
        (d1.question(0, [0]), "nodes of a proof that was not refused"),
        (d1.HEADER.pack(d1.PROOF_MARK, 47, 0) + bytes(47), "a PROOF frame has 47 bytes"),
        (d1_frame(9_990, bytes(11)), "past the size that the source announced"),
    ],
    ids=range(8),
)
def test_what_is_no_proof_of_the_announced_image_ends_the_copy(
    tmp_path: Path, frames: bytes, why: str
) -> None:
    with receiving(tmp_path / "target") as (stream, back, got):
        sender = Stream(stream, back, len(DATA))
        sender.write(d1_frame(0, DATA) + frames + d1_end())
        assert sender.read(8) in (b"FAILURE\n", b"")
    assert isinstance(got[0], PyploopError)
    assert why in str(got[0])
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(("level", "node"), [(0, 1), (1, 0), (7, 0), (0, 1 << 63)])
def test_a_question_about_nodes_that_are_not_there_ends_the_copy(
    tmp_path: Path, level: int, node: int
) -> None:
    with receiving(tmp_path / "target") as (stream, back, got):
        sender = Stream(stream, back, len(DATA))
        sender.write(d1_frame(0, DATA) + d1.proof(len(DATA), BLOCK, 1, bytes(16)) + d1_end())
        assert sender.read(64)[:8] == b"DIFFERS\n"
        sender.write(d1.question(level, [node]))
        assert sender.read(1) == b""
    assert f"node {node} of level {level}, which is not there" in str(got[0])


def test_a_sender_that_gives_up_after_a_difference_leaves_no_target(tmp_path: Path) -> None:
    with receiving(tmp_path / "target") as (stream, back, got):
        sender = Stream(stream, back, len(DATA))
        sender.write(d1_frame(0, DATA) + d1.proof(len(DATA), BLOCK, 1, bytes(16)) + d1_end())
        assert sender.read(64)[:8] == b"DIFFERS\n"
    assert "and the sender gave up" in str(got[0])
    assert not (tmp_path / "target").exists()


def test_a_receiver_that_cannot_compare_is_refused_where_a_proof_is_a_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyploop.diskcopy.replies.SUPPORTED", d1.NO_FEATURES)
    image(tmp_path / "source", 10_000)
    with (
        receiving(tmp_path / "target") as (stream, back, _),
        pytest.raises(ParameterError, match="the receiver does not compare a proof"),
    ):
        pyploop.copy(
            tmp_path / "source", stream, options=CopyOptions(proof="always"), feedback=back
        )
    assert not (tmp_path / "target").exists()


def test_a_receipt_is_also_written_where_the_receiver_cannot_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyploop.diskcopy.replies.SUPPORTED", d1.NO_FEATURES)
    image(tmp_path / "source", 10_000)
    options = CopyOptions(receipt=tmp_path / "receipt")
    with receiving(tmp_path / "target") as (stream, back, _):
        result = pyploop.copy(tmp_path / "source", stream, options=options, feedback=back)
    assert (result.proven, result.root is None) == (False, False)
    found = pyploop.verify(tmp_path / "target", tmp_path / "receipt")
    assert (found.same, found.proven) == (True, False)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (CopyOptions(proof="never", receipt="r"), "needs the proof"),
        (CopyOptions(proof="always", protocol="ploop"), "--compat ploop"),
        (CopyOptions(receipt="r", protocol="ploop"), "--compat ploop"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    tmp_path: Path, options: CopyOptions, why: str
) -> None:
    image(tmp_path / "source", 10_000)
    with pytest.raises(ParameterError, match=why):
        pyploop.copy(tmp_path / "source", tmp_path / "target", options=options)


# ---- a thousand faults of each kind


def sent(data: bytes, live: bool) -> tuple[Proof, bytes]:
    """The proof of a sender, and its stream without the greeting."""
    proof, known = Proof(len(data)), _core.Known(len(data))
    with open(os.memfd_create("source"), "r+b", buffering=0) as source:
        source.write(data)
        read, write = os.pipe()
        stream: list[bytes] = []

        def drain() -> None:
            while part := os.read(read, 1 << 16):
                stream.append(part)

        reader = threading.Thread(target=drain)
        reader.start()
        pump = Pump(
            src_fd=source.fileno(),
            src_base=0,
            size=len(data),
            align=1,
            out_fd=write,
            sink=_core.SINK_FRAMES,
            cluster=1 << 18,
            slots=4,
            readers=1,
            known=known,
            proof=proof,
        )
        flags = _core.PASS_SKIP_ZERO | _core.PASS_LAST | (_core.PASS_LIVE if live else 0)
        pump.run(Extents.of([(0, len(data))]), flags)
        os.close(write)
        reader.join()
        os.close(read)
    return proof, b"".join(stream)


@pytest.mark.parametrize("live", [False, True])
def test_each_of_a_thousand_faults_in_the_stream_is_found(tmp_path: Path, live: bool) -> None:
    """A bit of the data, of a position or of a size: the roots differ, or it is no stream."""
    rng = random.Random(7)
    data = rng.randbytes(20_000) + bytes(30_000) + rng.randbytes(9_000)
    proof, stream = sent(data, live)
    root, found = proof.root(), 0
    for _ in range(FAULTS // 2):
        at = rng.randrange(len(stream))
        harmed = bytearray(stream)
        harmed[at] ^= 1 << rng.randrange(8)
        found += root_of(bytes(harmed), len(data)) != root
    assert found == FAULTS // 2
    assert root_of(stream, len(data)) == root == model(data)


def root_of(stream: bytes, size: int) -> bytes | None:
    """That of a receiver's target; None: it has refused the stream."""
    proof = Proof(size)
    with (
        open(os.memfd_create("stream"), "r+b", buffering=0) as source,
        open(os.memfd_create("target"), "r+b", buffering=0) as target,
    ):
        source.write(d1_frame(0, b"sync") + stream + d1_end())
        source.seek(0)
        pump = Receiver(
            in_fd=source.fileno(),
            out_fd=target.fileno(),
            slots=2,
            slot_size=1 << 16,
            max_frame=1 << 20,
        )
        pump.run()
        pump.expect_proof(proof)
        pump.expect(d1.Feature.PROOF)
        try:
            while (event := pump.run()[0]) != _core.RECV_END:
                if event == _core.RECV_QUESTION:
                    return None
        except _core.Fault:
            return None
        return proof.root(target.fileno())


def test_each_of_a_thousand_faults_in_the_target_is_found_by_its_receipt(tmp_path: Path) -> None:
    """As of its page cache: one bit is another when it is written back."""
    rng = random.Random(8)
    source, target, receipt = (tmp_path / name for name in ("source", "target", "receipt"))
    data = image(source, MIB + 77)
    pyploop.copy(source, target, options=CopyOptions(receipt=receipt))
    assert pyploop.verify(target, receipt).same
    paper = Receipt.read(str(receipt))
    assert paper is not None
    found = 0
    with open(target, "r+b", buffering=0) as file:
        for i in range(FAULTS):
            at = rng.randrange(len(data))
            wrong = bytes([data[at] ^ 1 << rng.randrange(8)])
            os.pwrite(file.fileno(), wrong, at)
            if i % 50 == 0:  # by the command's own way, which takes longer
                result = pyploop.verify(target, receipt)
                found += not result.same and any(a <= at < b for a, b in result.differing)
            else:
                proof = Proof(len(data))
                proof.note(0, target.read_bytes())
                found += proof.root().hex() != paper.root
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert found == FAULTS
    assert pyploop.verify(target, receipt).same


def test_each_of_a_thousand_writes_that_no_tracker_saw_is_found(tmp_path: Path) -> None:
    """The source was written, and no mark says so: the pair, or the source and the receipt."""
    rng = random.Random(9)
    source, target, receipt = (tmp_path / name for name in ("source", "target", "receipt"))
    data = image(source, MIB + 77)
    pyploop.copy(source, target, options=CopyOptions(receipt=receipt))
    paper = Receipt.read(str(receipt))
    copied = Proof(len(data))
    copied.note(0, target.read_bytes())
    assert paper is not None
    assert copied.root().hex() == paper.root
    found = 0
    with open(source, "r+b", buffering=0) as file:
        for i in range(FAULTS):
            at = rng.randrange(len(data))
            first, last = at // BLOCK * BLOCK, min(at // BLOCK * BLOCK + BLOCK, len(data))
            os.pwrite(file.fileno(), bytes([data[at] ^ 255]), at)
            if i % 50 == 0:
                result = pyploop.verify(source, target)
                found += result.differing == ((first, last),)
                found += -pyploop.verify(source, receipt).same
            else:
                now = Proof(len(data))
                now.note(0, source.read_bytes())
                found += list(copied.differences(now)) == [(first, last)]
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert found == FAULTS


# ---- receipts, and the command


def copied(tmp_path: Path, size: int = 300_000) -> tuple[Path, Path, Path]:
    source, target, receipt = (tmp_path / name for name in ("source", "target", "receipt"))
    image(source, size)
    pyploop.copy(source, target, options=CopyOptions(receipt=receipt))
    return source, target, receipt


def test_a_receipt_says_what_was_copied_from_where_to_where(tmp_path: Path) -> None:
    source, target, receipt = copied(tmp_path)
    paper = json.loads(receipt.read_text())
    assert paper["schema"] == "pyploop.receipt/1"
    assert (paper["size"], paper["block"], paper["part"]) == (300_000, BLOCK, MIB)
    assert paper["root"] == model(source.read_bytes()).hex()
    host = os.uname().nodename
    assert (paper["source"], paper["source_host"]) == (str(source), host)
    assert (paper["target"], paper["target_host"]) == (str(target), host)
    assert (paper["acknowledged"], paper["proven"]) == ("local", False)
    assert paper["began"] <= paper["ended"]
    assert paper["frozen"] is None
    assert paper["pyploop"] == pyploop.__version__


def test_verify_tells_by_its_exit_code_whether_they_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, receipt = copied(tmp_path)
    root = json.loads(receipt.read_text())["root"]

    def verify(*words: object) -> tuple[int, str]:
        code = command.run([*map(str, words)], 3)
        return code, capsys.readouterr().out

    for pair in ((target, receipt), (source, receipt), (source, target)):
        code, out = verify(*pair)
        assert code == 0
        assert root in out
    with open(target, "r+b") as f:
        f.seek(5000)
        f.write(b"!!!")
    code, out = verify(source, target)
    assert (code, out.splitlines()[1]) == (1, "  bytes 4096 to 8192 (4.0 KiB)")
    code, out = verify("--json", target, receipt)
    found = json.loads(out)
    assert (code, found["same"], found["differing"]) == (1, False, [[0, 300_000]])
    os.truncate(target, 299_999)
    for pair in ((target, receipt), (source, target)):
        code, out = verify(*pair)
        assert code == 1
        assert f"{target} has 299999 bytes" in out or "and " + str(target) in out


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "pyploop.receipt/2"},
        {"root": "zz"},
        {"root": ""},
        {"size": -1},
        {"size": "1"},
        {"part": 0},
        {"part": 3 * MIB},
        {"part": 1 << 62},
        {"parts": "!"},
        {"parts": ""},
        {"unsafe": None},
        {"more": 1},
    ],
)
def test_a_damaged_receipt_is_not_compared(tmp_path: Path, change: dict[str, object]) -> None:
    _, target, receipt = copied(tmp_path)
    paper = json.loads(receipt.read_text())
    receipt.write_text(json.dumps(paper | change))
    with pytest.raises(FormatError, match="is a receipt that is damaged, or of another version"):
        pyploop.verify(target, receipt)


def test_a_receipt_that_is_nested_without_end_is_damaged(tmp_path: Path) -> None:
    _, target, receipt = copied(tmp_path)
    receipt.write_text('{"schema": "pyploop.receipt/1", "unsafe": ' + "[" * 500_000)
    with pytest.raises(FormatError, match="is a receipt that is damaged"):
        pyploop.verify(target, receipt)


def test_a_receipt_that_cannot_be_written_any_more_is_an_error_and_the_target_is_kept(
    tmp_path: Path,
) -> None:
    data = image(tmp_path / "source", 10_000)
    folder = tmp_path / "folder"
    folder.mkdir()

    def remove(event: object) -> None:
        if folder.exists():
            folder.rmdir()

    with pytest.raises(
        WriteError, match=r"target is complete, but the receipt .* cannot be written"
    ):
        pyploop.copy(
            tmp_path / "source",
            tmp_path / "target",
            options=CopyOptions(receipt=folder / "receipt"),
            on_event=remove,
        )
    assert (tmp_path / "target").read_bytes() == data


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("none/receipt", WriteError, "No such file or directory; nothing was copied"),
        ("folder", WriteError, "Is a directory; nothing was copied"),
        ("target", ParameterError, "is the target itself"),
        ("folder/../target", ParameterError, "is the target itself"),
        ("source", ParameterError, "would destroy the source"),
        ("link", ParameterError, "would destroy the source"),
    ],
)
def test_a_place_where_a_receipt_cannot_be_is_found_before_the_first_byte(
    tmp_path: Path, name: str, kind: type[PyploopError], why: str
) -> None:
    data = image(tmp_path / "source", 10_000)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("source")
    options = CopyOptions(receipt=tmp_path / name)
    with pytest.raises(kind, match=why):
        pyploop.copy(tmp_path / "source", tmp_path / "target", options=options)
    assert (tmp_path / "source").read_bytes() == data
    assert not (tmp_path / "target").exists()


def test_what_is_missing_is_an_error_and_not_a_difference(tmp_path: Path) -> None:
    source, _, receipt = copied(tmp_path)
    for pair in ((tmp_path / "none", receipt), (source, tmp_path / "none")):
        with pytest.raises(DeviceError, match="cannot open the source"):
            pyploop.verify(*pair)


def test_a_command_before_the_thaw_can_compare_the_frozen_source_with_the_receipt(
    tmp_path: Path,
) -> None:
    """So a write that no tracker saw is found while the source is still frozen."""
    source, target, receipt = (tmp_path / name for name in ("source", "target", "receipt"))
    image(source, 100_000)
    words = [*map(str, pyploop_cmd()), "verify", str(source), str(receipt)]
    options = CopyOptions(receipt=receipt, before_thaw=" ".join(words) + f" > {tmp_path / 'out'}")
    pyploop.copy(source, target, options=options)
    assert "root" in (tmp_path / "out").read_text()
