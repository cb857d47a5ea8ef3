# SPDX-License-Identifier: Apache-2.0
"""D1 byte for byte: what Debian's `ploop copy` sends for an image and a list of
dirty extents, and what `pyploop copy --compat ploop` sends for the same.

Both senders see a made-up /dev/ploop0 (tests/fakeploop) on images of their own
with equal contents; the script hands both the same extents.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fakeploop
import pytest
import support
from fakeploop import Capture, Frame
from support import MIB, SUCCESS

from pyploop import _core
from pyploop.diskcopy.framing import COMPATS

SIZE = 5 * MIB
HEADER = b"WithoutFreeSpace" + bytes(28) + (0x746F6E59).to_bytes(4, "little") + bytes(range(80))
"""Of a ploop1 image in use; the C tool looks at nothing else of it."""

Extents = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """An image, and what becomes dirty while it runs and while it is frozen."""

    size: int = SIZE
    running: Extents = ((MIB, 2 * MIB), (3 * MIB, 5 * MIB))
    frozen: Extents = ((8192, 12288),)
    block: int = 2048
    """Sectors of a cluster."""
    zeroes: Extents = ((0, 4096), (2 * MIB, 4 * MIB))
    """Of the image."""
    byte: int = 1
    """What the first write fills its extent with, the next ones count up."""


CASES = {
    "extents of clusters and blocks": Case(),
    "nothing dirty": Case(running=(), frozen=()),
    "all zero, holes too": Case(zeroes=((0, SIZE),)),
    "extents that become zero": Case(byte=0),
    "adjacent extents": Case(running=[(4096 * k, 4096 * k + 4096) for k in range(5, 90)]),
    "an extent longer than a cluster, from its middle": Case(running=((MIB // 2, 4 * MIB + 4096),)),
    "extents of single sectors": Case(running=((512, 1024), (MIB - 512, MIB + 512))),
    "extents that overlap": Case(running=((0, 8192), (4096, 12288), (8192, 16384))),
    "the driver goes back and back again": Case(
        running=((3 * MIB, 4 * MIB), (MIB, MIB + 4096), (2 * MIB, 3 * MIB), (0, 4096)),
        frozen=((4096, 8192), (0, 4096)),
    ),
    "more than is small": Case(size=24 * MIB, running=((0, 24 * MIB),), frozen=((0, 8 * MIB),)),
    "small clusters": Case(block=128, running=((MIB, 2 * MIB + 12288), (4096, 8192))),
    "large clusters": Case(block=8192, size=9 * MIB, running=((MIB, 9 * MIB),)),
    "a tail of a block": Case(size=SIZE + 4096, frozen=((SIZE, SIZE + 4096),)),
    "a tail of a sector": Case(size=SIZE + 512, frozen=((SIZE, SIZE + 512),)),
    "a tail of 100 bytes": Case(size=SIZE + 100),
    "a tail of 1 byte": Case(size=SIZE + 1),
    "a tail of 3 bytes": Case(size=SIZE + 3),
    "a tail of 4 bytes": Case(size=SIZE + 4),
    "a tail of 4 bytes behind a sector": Case(size=SIZE + 516),
    "less than a cluster": Case(size=4100, running=((0, 4096),), frozen=(), zeroes=()),
    "5 bytes": Case(size=5, running=(), frozen=(), zeroes=()),
    "4 bytes": Case(size=4, running=(), frozen=(), zeroes=()),
}


@pytest.fixture(scope="module")
def library(build_cache: Path) -> Path:
    support.needs("root", "cc", "ploop")  # both senders freeze
    return fakeploop.build(build_cache)


def prepare(folder: Path, library: Path, case: Case, fmt: str) -> tuple[Path, dict[str, str]]:
    """An image, and the environment in which it is a ploop device's delta."""
    folder.mkdir()
    (folder / "mnt").mkdir()
    data = bytearray(random.Random(case.size).randbytes(case.size))
    for start, end in case.zeroes:
        data[start:end] = bytes(min(end, case.size) - start)
    if fmt == "ploop1":
        data[: len(HEADER)] = HEADER
    image = folder / "image"
    image.write_bytes(data)
    lines, byte = [], case.byte
    for extents in (case.running, case.frozen):
        for start, end in extents:
            lines.append(f"write {start} {end - start} {byte}")
            byte += 1 if byte else 0
        lines += [f"{start} {end}" for start, end in extents] + ["--"]
    (folder / "script").write_text("\n".join(lines) + "\n")
    return image, fakeploop.env(
        library, image, folder, fmt=fmt, block=case.block, mount=folder / "mnt",
        track=f"script:{folder / 'script'}", sleep=False, extra=support.pyploop_env(),
    )  # fmt: skip


VIAS = {
    "pipe, feedback": (SUCCESS, False),
    "pipe": (None, False),
    "socket, feedback": (SUCCESS, True),
    "socket": (None, True),
}


def send(  # noqa: PLR0917
    folder: Path, library: Path, case: Case, fmt: str, via: str, ours: Sequence[str] | None = None
) -> tuple[Capture, bytes]:
    """What a sender wrote, and the image as it is afterwards."""
    image, env = prepare(folder, library, case, fmt)
    feedback, one_socket = VIAS[via]
    if ours is None:
        got = fakeploop.capture(env, feedback=feedback, one_socket=one_socket)
    else:
        got = fakeploop.capture(
            env, feedback=feedback and feedback * 9, one_socket=one_socket,
            program=support.pyploop_cmd(), more=["--sync-wait", "0", *ours],
        )  # fmt: skip
    assert got.code == 0, got.stderr
    return got, image.read_bytes()


def no_block_of_4(frames: Sequence[Frame]) -> list[Frame]:
    """The C tool's frames, but the blocks of 4 bytes, which its own receiver
    takes for SYNC, in halves."""
    sync = max(k for k, (size, pos, _) in enumerate(frames) if size == 4 and pos == 0)
    result: list[Frame] = []
    for k, (size, pos, data) in enumerate(frames):
        if size == 4 and k != sync:
            result += [(2, pos, data[:2]), (2, pos + 2, data[2:])]
        else:
            result.append((size, pos, data))
    return result


def compare(
    folder: Path, library: Path, case: Case, fmt: str, via: str
) -> tuple[list[Frame], bytes]:
    theirs, image = send(folder / "c", library, case, fmt, via)
    ours, same_image = send(folder / "ours", library, case, fmt, via, ["--compat", "ploop"])
    assert image == same_image
    want, got = no_block_of_4(fakeploop.parse_d1(theirs.stream)), fakeploop.parse_d1(ours.stream)
    assert [f[:2] for f in got] == [f[:2] for f in want]
    assert got == want
    if want == fakeploop.parse_d1(theirs.stream):
        assert ours.stream == theirs.stream
    return got, image


@pytest.mark.parametrize("name", list(CASES))
def test_our_stream_is_the_c_tools_frame_for_frame(
    tmp_path: Path, library: Path, name: str
) -> None:
    got, image = compare(tmp_path, library, CASES[name], "raw", "pipe, feedback")
    assert fakeploop.replay(got) == image


@pytest.mark.parametrize("via", list(VIAS))
@pytest.mark.parametrize("fmt", ["raw", "ploop1"])
def test_our_stream_is_the_c_tools_over_every_channel(
    tmp_path: Path, library: Path, fmt: str, via: str
) -> None:
    got, image = compare(tmp_path, library, Case(size=SIZE + 516), fmt, via)
    if fmt == "ploop1":
        assert got[-2][:2] == (512, 0) and got[-2][2][44:48] == bytes(4)
        image = image[:44] + bytes(4) + image[48:]
    assert fakeploop.replay(got) == image


# ---- each tool's receiver, fed with the other's stream


def receive(
    command: Sequence[str], target: Path, stream: bytes, via: str
) -> tuple[int, bytes, bytes]:
    """Exit code, feedback and stderr of a receiver that is given the stream."""
    feedback, one_socket = VIAS[via]
    with contextlib.ExitStack() as stack:
        if one_socket:
            a, b = socket.socketpair()
        else:
            (r, w), (fb_r, fb_w) = os.pipe(), os.pipe()
        inp, out = (a.detach(), b.detach()) if one_socket else (r, w)
        back, answers = (inp, out) if one_socket else (fb_w, fb_r)
        process = subprocess.Popen(
            [*command, "-d", str(target), "-i", str(inp), *(["-f", str(back)] if feedback else [])],
            env=support.pyploop_env(), pass_fds=(inp, back), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        for fd in {inp, back}:
            os.close(fd)
        for fd in {out, answers}:
            stack.callback(os.close, fd)
        stack.callback(process.kill)
        left = memoryview(stream)
        while left:
            left = left[os.write(out, left) :]
        _, err = process.communicate(timeout=30)
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while part := os.read(answers, 4096) if feedback else b"":
                got += part
        return process.returncode, got, err


C_RECEIVER = ["ploop", "copy"]
OUR_RECEIVER = [*support.pyploop_cmd(), "copy"]


# Every channel and framing, with formats alternating.  A HELLO that is not
# answered on a socket costs two seconds: once.
ways = pytest.mark.parametrize(
    ("via", "compat", "fmt"),
    [
        (via, compat, ("raw", "ploop1")[(i + k) % 2])
        for i, via in enumerate(VIAS)
        for k, compat in enumerate(COMPATS)
        if (via, compat) != ("socket", "native")
    ],
)


@ways
def test_the_c_receiver_makes_the_same_image_of_our_stream(
    tmp_path: Path, library: Path, fmt: str, via: str, compat: str
) -> None:
    support.needs("ploop")
    case = Case(size=SIZE + 4, running=((MIB, 2 * MIB), (3 * MIB, SIZE + 4)))
    got, image = send(tmp_path / "ours", library, case, fmt, via, ["--compat", compat])
    check_receipt(C_RECEIVER, tmp_path / "target", got.stream, image, fmt, via)


@pytest.mark.parametrize("via", list(VIAS))
@pytest.mark.parametrize("fmt", ["raw", "ploop1"])
def test_our_receiver_makes_the_same_image_of_the_c_stream(
    tmp_path: Path, library: Path, fmt: str, via: str
) -> None:
    got, image = send(tmp_path / "c", library, Case(size=SIZE + 516 + 4), fmt, via)
    check_receipt(OUR_RECEIVER, tmp_path / "target", got.stream, image, fmt, via)


def check_receipt(  # noqa: PLR0917
    command: Sequence[str], target: Path, stream: bytes, image: bytes, fmt: str, via: str
) -> None:
    code, answers, err = receive(command, target, stream, via)
    assert code == 0, err
    if fmt == "ploop1":
        image = image[:44] + bytes(4) + image[48:]
    assert target.read_bytes() == image
    syncs = sum(f[0] == 4 for f in fakeploop.parse_d1(stream))
    assert answers == (SUCCESS * syncs if VIAS[via][0] else b"")


@pytest.mark.parametrize(("clusters", "tail", "compat"), [
    (0, 0, "auto"), (1, 0, "auto"), (3, 0, "ploop"), (2, 0, "native"),
    (1, 4, "auto"), (1, 4096, "auto"), (1, 4096, "native"), (0, 1, "ploop"),
])  # fmt: skip
def test_an_image_of_4_bytes_more_arrives_whole_at_the_c_receiver(
    tmp_path: Path, clusters: int, tail: int, compat: str
) -> None:
    """Of a plain file, and of the lengths that leave 4 bytes after the cuts."""
    support.needs("ploop")
    size = clusters * MIB + tail + 4
    source = tmp_path / "source"
    source.write_bytes(random.Random(size).randbytes(size))
    r, w = os.pipe()
    with open(r, "rb") as stream:
        process = subprocess.Popen(
            [*OUR_RECEIVER, "-s", str(source), "--sync-wait", "0", "--compat", compat],
            env=support.pyploop_env(), stdout=w, stderr=subprocess.PIPE,
        )  # fmt: skip
        os.close(w)
        sent = stream.read()
    assert process.wait(30) == 0, process.stderr and process.stderr.read()
    assert process.stderr is not None
    process.stderr.close()
    check_receipt(C_RECEIVER, tmp_path / "target", sent, source.read_bytes(), "raw", "pipe")


@pytest.mark.parametrize("extents", [
    ((MIB, MIB + 4),), ((MIB, 2 * MIB + 4),), ((4, 8), (12, 16), (100, 104)),
    ((SIZE - 4, SIZE),), ((0, 4),),
])  # fmt: skip
@pytest.mark.parametrize("known", [True, False])
def test_a_dirty_extent_of_4_bytes_is_never_a_sync(
    tmp_path: Path, extents: Extents, known: bool
) -> None:
    """Below the driver: the pump itself, with and without what it knows."""
    support.needs("ploop")
    image = random.Random(1).randbytes(SIZE)
    source = tmp_path / "source"
    source.write_bytes(image)
    r, w = os.pipe()
    with open(source, "rb") as src, open(r, "rb") as stream, open(w, "wb") as out:
        result: list[bytes] = []
        reader = threading.Thread(target=lambda: result.append(stream.read()))
        reader.start()
        pump = _core.Pump(
            src_fd=src.fileno(), src_base=0, align=1, size=SIZE, out_fd=out.fileno(),
            sink=_core.SINK_FRAMES,
            cluster=MIB, slots=4, readers=1, known=_core.Known(SIZE) if known else None,
        )  # fmt: skip
        pump.run(_core.Extents.of([(0, SIZE)]))
        pump.run(_core.Extents.of(extents))
        out.write(support.d1_end())
        out.close()
        reader.join()
    check_receipt(C_RECEIVER, tmp_path / "target", result[0], image, "raw", "pipe")
    assert not any(size == 4 for size, _, _ in fakeploop.parse_d1(result[0]))


# ---- receivers before 1.11, by a model: none of them can be had any more


def old_receiver(frames: Sequence[Frame]) -> bytes:
    """It writes whatever stands in a frame, SYNC's 4 bytes too, and answers nothing."""
    image = bytearray()
    for size, pos, data in frames[:-1]:
        image.extend(bytes(max(0, pos + size - len(image))))
        image[pos : pos + size] = data
    return bytes(image)


@ways
def test_a_receiver_before_1_11_has_the_same_image(
    tmp_path: Path, library: Path, fmt: str, via: str, compat: str
) -> None:
    """Block 0 is a hole of zeroes that is written while it runs; only on a
    channel with a way back is there a HELLO, whose bytes must not stay."""
    case = Case(size=SIZE + 4, zeroes=((0, MIB),), frozen=((4096, 8192),))
    got, image = send(tmp_path / "ours", library, case, fmt, via, ["--compat", compat])
    if fmt == "ploop1":
        image = image[:44] + bytes(4) + image[48:]
    assert old_receiver(fakeploop.parse_d1(got.stream)) == image


# ---- which framing a peer gets


def loop_less_source(folder: Path) -> tuple[Path, bytes]:
    """A plain file of a hole, data, written zeroes, data and a hole."""
    path = folder / "source"
    data = random.Random(7).randbytes(MIB)
    with path.open("wb") as f:
        f.seek(2 * MIB)
        f.write(data + bytes(MIB) + data)
        f.truncate(8 * MIB)
    return path, path.read_bytes()


class Sent:
    """A copy of a plain file to a peer that answers `answers`, or cannot."""

    def __init__(self, folder: Path, answers: bytes | None, *options: str) -> None:
        source, self.image = loop_less_source(folder)
        events = folder / "events"
        (r, w), (fb_r, fb_w) = os.pipe(), os.pipe()
        os.write(fb_w, answers or b"")
        os.close(fb_w)
        back = [] if answers is None else ["-f", str(fb_r)]
        with open(r, "rb") as stream:
            command = [*OUR_RECEIVER, "-s", str(source), *back, "--json", str(events), *options]
            with subprocess.Popen(
                [*command, "--sync-wait", "0"],
                env=support.pyploop_env(), stdout=w, stderr=subprocess.PIPE, pass_fds=[fb_r],
            ) as process:  # fmt: skip
                os.close(w)
                os.close(fb_r)
                self.frames = support.d1_parse(stream.read())
                assert process.stderr is not None
                self.log = process.stderr.read().decode()
        assert process.returncode == 0, self.log
        self.summary = json.loads(events.read_text().splitlines()[-1])
        self.blocks = [(f.pos, len(f.data)) for f in self.frames if not (f.is_sync or f.is_end)]
        assert support.d1_replay(self.frames) == self.image
        assert self.summary["wire_bytes"] == sum(16 + len(f.data) for f in self.frames)


def test_a_c_peer_gets_clusters_zeroes_and_all(tmp_path: Path) -> None:
    sent = Sent(tmp_path, SUCCESS * 9)
    assert sent.summary["dialect"] == "D1, ploop peer"
    assert "Dialect: D1, ploop peer" in sent.log
    assert sent.frames[0].data == b"PYP\x01"
    assert sent.blocks == [(k * MIB, MIB) for k in range(8)]


def test_asked_for_nothing_but_the_c_stream_is_sent(tmp_path: Path) -> None:
    sent = Sent(tmp_path, SUCCESS, "--compat", "ploop", "-F", "true")
    assert sent.summary["dialect"] == "D1, as ploop sends it"
    assert sent.blocks == [(k * MIB, MIB) for k in range(8)]
    assert [f.pos for f in sent.frames if f.is_sync] == [0]


def test_a_peer_that_may_be_c_gets_the_data_whole_and_no_holes(tmp_path: Path) -> None:
    """Nor a HELLO: nobody could answer it."""
    sent = Sent(tmp_path, None)
    assert sent.summary["dialect"] == "D1, perhaps a ploop peer"
    assert {f.data for f in sent.frames if f.is_sync} <= {sent.image[:4]}
    assert sent.blocks == [(k * MIB, MIB) for k in (2, 3, 4)] + [(8 * MIB - 4096, 4096)]


@pytest.mark.parametrize("answers", [b"PYPLOOP\x01" + SUCCESS * 8, None, SUCCESS * 9])
@pytest.mark.invariant(number=8)
def test_our_own_peer_gets_no_zeroes_and_so_does_one_that_is_called_native(
    tmp_path: Path, answers: bytes | None
) -> None:
    ours = answers is not None and answers.startswith(b"PYPLOOP")
    sent = Sent(tmp_path, answers, *([] if ours else ["--compat", "native"]))
    assert sent.summary["dialect"] == ("D1, pyploop peer" if ours else "D1, native")
    assert sent.summary["acknowledged"] == ("acknowledged" if ours else "unknown")
    # The first block, where HELLO may have been written, and the last.
    ends = 4096 if answers is None else 2 * 4096
    assert sum(n for _, n in sent.blocks) == 2 * MIB + ends
