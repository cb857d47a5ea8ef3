# SPDX-License-Identifier: Apache-2.0
"""pyploop._core from Python: bitmaps against numpy, pumps over pipes and files."""

from __future__ import annotations

import errno
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT, Frame, d1_end, d1_frame, d1_header, d1_parse, d1_replay, d1_sync

from pyploop import _core, units
from pyploop._core import Bitmap, Extents, Fault, Known, Pump, Receiver
from pyploop.system import peer_patience
from pyploop.wire import d1, d2

SIZE = 300_001
ranges = st.lists(
    st.tuples(st.booleans(), st.integers(0, SIZE + 9999), st.integers(0, SIZE + 9999)), max_size=20
)


@settings(deadline=None, max_examples=80)
@given(ranges, st.sampled_from([9, 12, 13, 16]))
def test_bitmap_is_what_numpy_says(operations: list[tuple[bool, int, int]], shift: int) -> None:
    b = Bitmap(SIZE, shift)
    granule = 1 << shift
    starts = np.arange(0, SIZE, granule)
    ends = np.minimum(starts + granule, SIZE)
    want = np.zeros(len(starts), bool)
    for is_set, start, end in operations:
        if is_set:
            b.set(start, end)
            want[(starts < end) & (ends > start) & (start < end)] = True
        else:
            b.clear(start, end)
            want[(starts >= start) & (ends <= end) & (start < end)] = False
    words = np.asarray(memoryview(b)).view(np.uint8)
    assert np.array_equal(np.unpackbits(words, bitorder="little")[: len(want)].astype(bool), want)
    assert b.count == want.sum()
    assert b.bytes == (ends - starts)[want].sum() == b.extents().bytes
    got = np.zeros(SIZE, bool)
    for s, e in b.extents():
        got[s:e] = True
    assert np.array_equal(got, np.repeat(want, ends - starts))


def test_bitmap_refuses_another_size_and_takes_another_granule() -> None:
    fine, coarse = Bitmap(SIZE, 12), Bitmap(SIZE, 16)
    fine.set(70_000, 70_001)
    coarse.update(fine)
    assert list(coarse.extents()) == [(65536, 131072)]
    with pytest.raises(OSError, match="Invalid argument"):
        fine.update(Bitmap(SIZE + 1, 12))
    with pytest.raises(OSError, match="Invalid argument"):
        Bitmap(1, 8)
    with pytest.raises(TypeError):
        fine.update(None)  # type: ignore[arg-type]


marks = st.sets(st.integers(0, SIZE // 4096))


@given(marks, marks)
@settings(deadline=None, max_examples=40)
def test_bitmaps_meet_and_part_like_sets(a: set[int], b: set[int]) -> None:
    def bitmap(blocks: set[int]) -> Bitmap:
        made = Bitmap(SIZE)
        pairs = ((n * 4096, min((n + 1) * 4096, SIZE)) for n in sorted(blocks))
        made.add(Extents.of(pairs))
        return made

    def blocks(of: Bitmap) -> set[int]:
        return {n for s, e in of.extents() for n in range(s // 4096, -(-e // 4096))}

    both, first = bitmap(a), bitmap(a)
    both.intersect(bitmap(b))
    first.subtract(bitmap(b))
    assert (blocks(both), blocks(first)) == (a & b, a - b)
    with pytest.raises(OSError, match="Invalid argument"):
        both.intersect(Bitmap(SIZE, 13))


@given(st.binary(max_size=5000))
@settings(deadline=None)
def test_hash_is_zero_only_for_zeroes(data: bytes) -> None:
    if not data:
        return
    assert _core.hash_block(data) == _core.hash_block_ref(data)
    assert (_core.hash_block(data) == 0) == (not any(data)) == _core.is_zero(data)


class Piped:
    """A pump into a pipe whose other end is collected."""

    def __init__(self, src: Path, known: Known | None = None, cluster: int = 65536) -> None:
        self.src = os.open(src, os.O_RDONLY)
        self._read, self.out = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.out, False)
        self._got: list[bytes] = []
        self._thread = threading.Thread(target=self._collect)
        self._thread.start()
        size = os.fstat(self.src).st_size
        self.pump = Pump(
            src_fd=self.src, src_base=0, size=size, align=1, out_fd=self.out,
            sink=_core.SINK_FRAMES, cluster=cluster, slots=4, readers=1, known=known,
        )  # fmt: skip

    def _collect(self) -> None:
        while part := os.read(self._read, 1 << 20):
            self._got.append(part)

    def close(self) -> list[Frame]:
        os.close(self.out)
        self._thread.join()
        os.close(self._read)
        os.close(self.src)
        return d1_parse(b"".join(self._got))


def test_pump_sends_exactly_the_extents(tmp_path: Path) -> None:
    data = os.urandom(200_000)
    (tmp_path / "src").write_bytes(data)
    p = Piped(tmp_path / "src")
    p.pump.run(Extents.of([(0, 65536), (100_000, 170_000)]))
    p.pump.write(d1_end())
    frames = p.close()
    assert frames == [
        Frame(0, data[:65536]),
        Frame(100_000, data[100_000:165_536]),
        Frame(165_536, data[165_536:170_000]),
        Frame(0, b""),
    ]


def test_pump_never_sends_a_four_byte_block_defect_5(tmp_path: Path) -> None:
    data = os.urandom(65536 + 4)
    (tmp_path / "src").write_bytes(data)
    p = Piped(tmp_path / "src", Known(len(data), 12))
    p.pump.run(Extents.of([(0, len(data))]), _core.PASS_SKIP_ZERO | _core.PASS_LAST)
    frames = p.close()
    assert not any(f.is_sync for f in frames)
    assert d1_replay(frames) == data


@pytest.mark.slow
@pytest.mark.skipif(
    "PYPLOOP_MATRIX" not in os.environ,
    reason="reads 4 GiB: tests/run nightly; test_pump.c has such an extent in holes",
)
def test_pump_sends_a_dirty_extent_of_4_gib_whole_defect_6(tmp_path: Path) -> None:
    size = (4 << 30) + 8192
    with (tmp_path / "src").open("wb") as f:
        f.truncate(size)
        f.seek(4096)
        f.write(b"first")
        f.seek((4 << 30) + 4000)
        f.write(b"last")
    dirty = Bitmap(size, 20)
    dirty.set(0, 4 << 30)
    assert list(dirty.extents()) == [(0, 4 << 30)]
    p = Piped(tmp_path / "src", Known(size, 16), cluster=1 << 20)
    p.pump.run(dirty.extents(), _core.PASS_SKIP_ZERO)
    stats = p.pump.stats
    frames = p.close()
    assert (stats.read, stats.done) == (4 << 30, 4 << 30)
    assert [f.pos for f in frames] == [4096]
    assert frames[0].data.startswith(b"first")


def test_pump_fault_names_the_place_of_a_short_source(tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(bytes(200_000))
    p = Piped(tmp_path / "src")
    os.truncate(tmp_path / "src", 70_000)
    with pytest.raises(Fault) as e:
        p.pump.run(Extents.of([(0, 200_000)]))
    p.close()
    assert (e.value.errno, e.value.stage) == (errno.ENODATA, "read")
    assert e.value.pos >= 65536


def test_pump_cancel_ends_a_run_that_waits_for_the_peer(tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(os.urandom(400_000))
    src = os.open(tmp_path / "src", os.O_RDONLY)
    r, w = os.pipe2(os.O_NONBLOCK)
    pump = Pump(
        src_fd=src, src_base=0, size=400_000, align=1, out_fd=w, sink=_core.SINK_FRAMES,
        cluster=65536, slots=2, readers=0,
    )  # fmt: skip
    threading.Timer(0.05, pump.cancel).start()
    with pytest.raises(Fault) as e:
        pump.run(Extents.of([(0, 400_000)]))
    assert e.value.errno == errno.ECANCELED
    for fd in (src, r, w):
        os.close(fd)


def received(stream: bytes, path: Path) -> tuple[list[tuple[int, int, bytes]], bytes]:
    """The events of a stream, and the rest of it."""
    r, w = os.pipe()

    def feed() -> None:
        left = stream
        while left:
            left = left[os.write(w, left) :]
        os.close(w)

    threading.Thread(target=feed).start()
    out = os.open(path, os.O_RDWR | os.O_CREAT)
    pump = Receiver(in_fd=r, out_fd=out, slots=2, slot_size=4096, max_frame=1 << 20)
    events = []
    try:
        while True:
            events.append(pump.run())
            if events[-1][0] == _core.RECV_END:
                os.ftruncate(out, pump.stats.image_size)
                return events, b"".join(iter(lambda: os.read(r, 65536), b""))
    finally:
        while os.read(r, 65536):
            pass
        os.close(r)
        os.close(out)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.binary(min_size=1, max_size=9000)), max_size=9)
)
def test_receiver_makes_the_image_that_the_frames_say(blocks: list[tuple[int, bytes]]) -> None:
    import tempfile

    frames = [Frame(p, d) for p, d in blocks if len(d) != 4]
    stream = b"".join(d1_frame(f.pos, f.data) for f in frames) + d1_sync(b"1234") + d1_end()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        events, rest = received(stream + b"rest", path)
        assert path.read_bytes() == d1_replay(frames)
    assert [k for k, _, _ in events] == [_core.RECV_SYNC, _core.RECV_END]
    assert events[0][2] == b"1234"
    assert rest == b"rest"


def test_receiver_fault_names_frame_and_stream_position(tmp_path: Path) -> None:
    stream = d1_frame(0, b"x" * 100) + d1_header(5, 0, mark=0x4CC0AC3E)
    with pytest.raises(Fault) as e:
        received(stream, tmp_path / "image")
    assert (e.value.errno, e.value.stage) == (errno.EBADMSG, "protocol")
    assert (e.value.frame, e.value.mark, e.value.stream) == (1, 0x4CC0AC3E, 132)


@pytest.mark.invariant(number=5)
def test_read_at_the_size_limit_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    with pytest.raises(Fault) as e:
        received(d1_header((1 << 20) + 1, 0), tmp_path / "image")
    assert e.value.errno == errno.EMSGSIZE


def test_numbers_that_python_writes_down_too_are_those_of_the_headers() -> None:
    """The modules of the wire format know nothing of C (docs/internals/design.md)."""
    text = "".join(
        (ROOT / "csrc" / name).read_text() for name in ("base.h", "patience.h", "wire.h")
    )
    define = re.findall(r"#define PL_(\w+) (0x\w+?|\d+)u\s", text)
    c = {name: int(value, 0) for name, value in define}
    del c["DIGEST"]  # of MD5, which hashlib knows
    for name in ("D1_COMPRESSED_MARK", "PACKED_HEADER", "CODEC_ZSTD"):
        del c[name]  # Python sees no such frame
    enums = re.findall(r"PL_((?:PACKET|FEATURE)_\w+) = (\d+)", text)
    c |= {name: int(value) for name, value in enums}
    assert c == {
        "BLOCK": units.BLOCK,
        "PROGRESS": peer_patience.PROGRESS,
        "D1_MARK": d1.MARK,
        "BARRIER_MARK": d1.BARRIER_MARK,
        "BARRIER_HEAD": d1.BARRIER_HEAD.size,
        "BARRIER_NAMES": d1.MANY_LANES,
        "LANES": _core.MOST_LANES,
        "D1_HEADER": d1.HEADER.size,
        "SYNC_SIZE": d1.SYNC_SIZE,
        "PROOF_MARK": d1.PROOF_MARK,
        "CLAIM_SIZE": d1.CLAIM.size,
        "NODES_MAX": d1.MANY_NODES,
        "D2_MARK": d2.MARK,
        "D2_HEADER": d2.HEADER.size,
        "PACKET_DATA": d2.DATA,
        "PACKET_CMD": d2.CMD,
        "PACKET_DATA_ASYNC": d2.DATA_ASYNC,
        **{f"FEATURE_{feature.name}": feature for feature in d1.Feature},
    }
