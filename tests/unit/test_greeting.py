# SPDX-License-Identifier: Apache-2.0
"""Versions 3 and 5 of the greeting: what the two ends tell each other of the target's
place before the first byte, on which features they agree, and what an older end makes of
it (docs/internals/protocol.md)."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from support import FAILURE, SUCCESS, d1_end, d1_frame, d1_sync

from pyploop import _core
from pyploop.diskcopy import replies
from pyploop.diskcopy.d1_target import StreamOutput
from pyploop.disks import opening
from pyploop.disks.source import Source
from pyploop.errors import ParameterError, ProtocolError, SyncError, WriteError
from pyploop.report.events import Reporter
from pyploop.wire import d1

HELLO, HELLO_2, PLACE, REFUSED, FEATURES = (b"PYP" + bytes([n]) for n in range(1, 6))
HELLO_REPLY, HELLO_2_REPLY, PLACE_REPLY, _, FEATURES_REPLY = (
    b"PYPLOOP" + bytes([n]) for n in range(1, 6)
)
TIMES = bytes(56)
BOOT = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
DATA = os.urandom(10_000)


def place(boot: bytes, room: int, *things: tuple[int, int, int], count: int | None = None) -> bytes:
    count = len(things) if count is None else count
    return (
        boot + struct.pack("<QI", room, count) + b"".join(struct.pack("<IIQ", *t) for t in things)
    )


# ---- the sender


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    (tmp_path / "source").write_bytes(DATA)
    with contextlib.closing(opening.open_source(str(tmp_path / "source"))) as opened:
        yield opened


@contextlib.contextmanager
def peer(
    answers: bytes, offered: d1.Feature = d1.NO_FEATURES
) -> Iterator[tuple[StreamOutput, int]]:
    """An output whose peer has answered already, and what it reads."""
    (out_r, out_w), (back_r, back_w) = os.pipe(), os.pipe()
    os.write(back_w, HELLO_REPLY + HELLO_2_REPLY + TIMES + answers)
    os.close(back_w)
    out = StreamOutput(
        out_w,
        back_r,
        Reporter(),
        two_way=False,
        sync_wait=0,
        answer_timeout=5,
        offered=offered,
    )
    try:
        out.hello()
        assert os.read(out_r, 100) == d1_sync(HELLO) + d1_sync(HELLO_2)
        yield out, out_r
    finally:
        for fd in (out_r, out_w, back_r):
            os.close(fd)


def question(size: int) -> bytes:
    return d1_frame(size, PLACE)


def test_a_receiver_of_version_2_takes_the_question_for_a_sync(source: Source) -> None:
    with peer(SUCCESS + TIMES + SUCCESS + TIMES) as (out, read):
        assert out.announce(source, compare_room=True) == len(question(len(DATA)))
        assert os.read(read, 100) == question(len(DATA))
        assert out.things() is None
        out.refuse(ParameterError("no"))  # it would be a SYNC there
        os.set_blocking(read, False)
        with pytest.raises(BlockingIOError):
            os.read(read, 1)
        out._answer(out._answers or -1, "SYNC")


def test_a_receiver_of_version_1_is_not_asked(source: Source) -> None:
    with peer(b"") as (out, read):
        out._timed = False
        assert out.announce(source, compare_room=True) == 0
        os.set_blocking(read, False)
        with pytest.raises(BlockingIOError):
            os.read(read, 1)


def test_what_lies_below_the_target_is_known_on_the_same_machine_only(source: Source) -> None:
    things = ((7, 1, 0), (8, 2, 77))
    for boot, known in ((BOOT, set(things)), (bytes(16), None), (os.urandom(16), None)):
        with peer(PLACE_REPLY + TIMES + place(boot, 1 << 40, *things)) as (out, _):
            out.announce(source, compare_room=True)
            assert out.things() == known


def test_a_receiver_that_cannot_have_the_size_ends_the_copy_with_7(source: Source) -> None:
    with (
        peer(FAILURE + TIMES) as (out, _),
        pytest.raises(WriteError, match="cannot take the 10000"),
    ):
        out.announce(source, compare_room=True)


def test_a_receiver_without_room_learns_that_nothing_follows(source: Source) -> None:
    with peer(PLACE_REPLY + TIMES + place(BOOT, 9_999)) as (out, read):
        with pytest.raises(WriteError, match=r"the receiver has room for 9\.8 KiB"):
            out.announce(source, compare_room=True)
        assert os.read(read, 100) == question(len(DATA)) + d1_frame(7, REFUSED)


@pytest.mark.parametrize("room", [9_999, (1 << 64) - 1])
def test_room_is_not_compared_when_it_is_unknown_or_not_wanted(source: Source, room: int) -> None:
    with peer(PLACE_REPLY + TIMES + place(BOOT, room)) as (out, _):
        out.announce(source, compare_room=room != 9_999)


@pytest.mark.parametrize(
    "answer",
    [
        b"PYPLOOP\x04" + TIMES,
        PLACE_REPLY + TIMES + place(BOOT, 0, count=4097),
        PLACE_REPLY + TIMES + place(BOOT, 0, (1, 2, 3), count=2),
        PLACE_REPLY + TIMES[:-1],
    ],
)
def test_an_answer_that_is_none_ends_with_13(source: Source, answer: bytes) -> None:
    with peer(answer) as (out, _), pytest.raises(ProtocolError):
        out.announce(source, compare_room=True)


OFFERED = d1.Feature.COMPRESSED | d1.Feature.LANES
OFFER = d1_frame(5, FEATURES)


def of_version_3(*answers: bytes) -> bytes:
    return PLACE_REPLY + TIMES + place(bytes(16), 1 << 40) + b"".join(answers)


def accepted(features: int, reserved: int = 0) -> bytes:
    return FEATURES_REPLY + TIMES + struct.pack("<QQ", features, reserved)


@pytest.mark.parametrize(
    ("answer", "agreed"),
    [
        (SUCCESS + TIMES, 0),  # of version 3: to a SYNC
        (accepted(0), 0),
        (accepted(4), 4),
        (accepted(5, 77), 5),  # what is reserved is for later
    ],
)
def test_the_features_that_the_receiver_accepts_are_agreed(
    source: Source, answer: bytes, agreed: int
) -> None:
    with peer(of_version_3(answer, SUCCESS, TIMES), OFFERED) as (out, read):
        sent = question(len(DATA)) + OFFER
        assert out.features == 0
        assert out.announce(source, compare_room=True) == len(sent)
        assert os.read(read, 100) == sent
        assert out.features == agreed
        out._answer(out._answers or -1, "SYNC")


def test_a_sender_that_wants_no_feature_sends_what_it_always_sent(source: Source) -> None:
    with peer(of_version_3()) as (out, read):
        out.announce(source, compare_room=True)
        assert os.read(read, 100) == question(len(DATA))


def test_a_receiver_of_version_2_is_not_offered_features(source: Source) -> None:
    with peer(SUCCESS + TIMES, OFFERED) as (out, read):
        out.announce(source, compare_room=True)
        assert os.read(read, 100) == question(len(DATA))
        assert out.features == 0


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (accepted(2), ProtocolError),  # it was not offered
        (accepted(1 << 63), ProtocolError),
        (accepted(1)[:-1], ProtocolError),
        (PLACE_REPLY + TIMES, ProtocolError),
        (FAILURE + TIMES, SyncError),
    ],
)
def test_a_wrong_answer_to_the_offer_ends_the_copy(
    source: Source, answer: bytes, error: type[Exception]
) -> None:
    with peer(of_version_3(answer), OFFERED) as (out, _), pytest.raises(error):
        out.announce(source, compare_room=True)


# ---- the receiver


@contextlib.contextmanager
def receiver(target: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A receiver that has been greeted in version 2: it, its input, its answers."""
    (in_r, in_w), (back_r, back_w) = os.pipe(), os.pipe()
    command = [*support.pyploop_cmd(), "-v-1", "copy", "-d", str(target), "-f", str(back_w)]
    child = subprocess.Popen(
        command,
        stdin=in_r,
        stderr=subprocess.PIPE,
        pass_fds=[back_w],
        env=support.pyploop_env(),
        text=True,
    )
    os.close(in_r)
    os.close(back_w)
    try:
        os.write(in_w, d1_sync(HELLO) + d1_sync(HELLO_2))
        assert exactly(back_r, 72)[:16] == HELLO_REPLY + HELLO_2_REPLY
        yield child, in_w, back_r
    finally:
        child.kill()
        child.communicate()
        os.close(in_w)
        os.close(back_r)


def exactly(fd: int, size: int) -> bytes:
    got = b""
    while len(got) < size:
        part = os.read(fd, size - len(got))
        assert part, got
        got += part
    return got


def ended(child: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = child.communicate(timeout=20)
    return child.returncode, err


def test_a_receiver_reports_where_its_target_lies(tmp_path: Path) -> None:
    with receiver(tmp_path / "image") as (child, to, back):
        os.write(to, question(5 << 30))
        assert exactly(back, 64)[:8] == PLACE_REPLY
        boot, room, count = struct.unpack("<16sQI", exactly(back, 28))
        things = list(struct.iter_unpack("<IIQ", exactly(back, 16 * count)))
        assert boot == BOOT
        assert 0 < room <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
        dev = os.stat(tmp_path).st_dev
        assert (os.major(dev), os.minor(dev), 0) in things
        # The size was only tried.
        os.write(to, d1_frame(0, DATA) + d1_end())
        assert exactly(back, 64)[:8] == SUCCESS
        assert ended(child) == (0, "")
    assert (tmp_path / "image").read_bytes() == DATA


@pytest.mark.parametrize("size", [(1 << 63) - 5, 1 << 63, (1 << 64) - 1])
def test_a_size_that_no_file_can_have_is_refused(tmp_path: Path, size: int) -> None:
    with receiver(tmp_path / "image") as (child, to, back):
        os.write(to, question(size))
        assert exactly(back, 64)[:8] == FAILURE
        code, err = ended(child)
    assert code == 7
    assert f"image cannot become {size} bytes large" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "words"), [(38, "lies on its source"), (7, "too little room")])
def test_a_sender_that_does_not_begin_ends_the_receiver_with_its_code(
    tmp_path: Path, code: int, words: str
) -> None:
    with receiver(tmp_path / "image") as (child, to, back):
        os.write(to, question(1 << 20))
        exactly(back, 64)
        os.write(to, d1_frame(code, REFUSED))
        ended_with, err = ended(child)
    assert ended_with == code
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_the_question_in_the_middle_of_a_copy_is_a_sync(tmp_path: Path) -> None:
    with receiver(tmp_path / "image") as (child, to, back):
        os.write(to, d1_frame(0, DATA) + question(1 << 62) + d1_frame(38, REFUSED) + d1_end())
        assert [exactly(back, 64)[:8] for _ in range(3)] == [SUCCESS] * 3
        assert ended(child) == (0, "")
    assert (tmp_path / "image").read_bytes() == DATA


ALL = (1 << 64) - 1


def test_a_receiver_accepts_what_it_knows_of_the_offer_once(tmp_path: Path) -> None:
    with receiver(tmp_path / "image") as (child, to, back):
        os.write(to, question(len(DATA)) + d1_frame(ALL, FEATURES))
        assert exactly(back, 64)[:8] == PLACE_REPLY
        exactly(back, 16 * struct.unpack("<16sQI", exactly(back, 28))[2])
        assert exactly(back, 64)[:8] == FEATURES_REPLY
        assert exactly(back, 16) == struct.pack("<QQ", replies.SUPPORTED, 0)
        proof = _core.Proof(len(DATA))
        proof.note(0, DATA)
        os.write(to, d1_frame(ALL, FEATURES) + d1_frame(0, DATA))
        os.write(to, d1.proof(len(DATA), 4096, 1, proof.root()) + d1_end())
        assert [exactly(back, 64)[:8] for _ in range(2)] == [SUCCESS] * 2
        assert ended(child) == (0, "")
    assert (tmp_path / "image").read_bytes() == DATA


def test_an_offer_in_the_middle_of_a_copy_is_a_sync(tmp_path: Path) -> None:
    with receiver(tmp_path / "image") as (child, to, back):
        os.write(to, d1_frame(0, DATA) + d1_frame(ALL, FEATURES) + d1_end())
        assert [exactly(back, 64)[:8] for _ in range(2)] == [SUCCESS] * 2
        assert ended(child) == (0, "")
    assert (tmp_path / "image").read_bytes() == DATA


@pytest.mark.parametrize("mark", [0x4CC0AC50, 0x4CC0AC51, 0x4CC0AC52])
def test_frames_of_a_feature_that_was_not_agreed_are_refused(tmp_path: Path, mark: int) -> None:
    with receiver(tmp_path / "image") as (child, to, _):
        os.write(to, d1_frame(0, FEATURES) + struct.pack("<IIQ", mark, 8, 0) + bytes(8))
        code, err = ended(child)
    assert code == 13
    assert f"bad marker {mark:#x} instead of 0x4cc0ac3d at frame 0" in err
    assert list(tmp_path.iterdir()) == []


def test_a_sender_that_is_gone_at_the_end_leaves_the_complete_target(tmp_path: Path) -> None:
    with receiver(tmp_path / "image") as (child, to, back):
        with open(os.devnull) as null:
            os.dup2(null.fileno(), back)
        os.write(to, d1_frame(0, DATA) + d1_end())
        code, err = ended(child)
    assert code == 7
    assert "image is complete and was kept" in err
    assert (tmp_path / "image").read_bytes() == DATA
