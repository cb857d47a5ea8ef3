# SPDX-License-Identifier: Apache-2.0
"""The Python parsers of what others wrote, each as a function of bytes that fails
on a finding: another exception than the error it promises, or a result that
contradicts the bytes.  test_parsers.py runs them under hypothesis.  A campaign,
guided by coverage (needs `pip install atheris`):

    python3 tests/fuzz/parsers.py TARGET [OPTION OF LIBFUZZER…]
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyploop.diskcopy import d1_target, framing
from pyploop.disks import disk_descriptor, image
from pyploop.errors import (
    DescriptorError,
    FormatError,
    ProtocolError,
    PyploopError,
    SyncError,
)
from pyploop.report.events import Reporter
from pyploop.report.timeline import Heard, Recorder, chrome_trace
from pyploop.runtimes.vzctl import config_files
from pyploop.wire import d1, d2, d3, mux

FILE_LIMIT = 64 << 20


def parse_image(data: bytes) -> None:
    """4 bytes: the size of the file, which goes on as a hole behind the rest."""
    size = int.from_bytes(data[:4], "little") % FILE_LIMIT
    fd = os.memfd_create("image")
    try:
        os.write(fd, data[4:])
        os.truncate(fd, max(size, len(data) - 4))
        try:
            found = image.inspect(f"/proc/self/fd/{fd}")
        except FormatError as e:
            assert "\n" not in str(e)
            return
    finally:
        os.close(fd)
    if found.header is not None:
        h = found.header
        assert h.entries == -(-h.size // h.cluster) and h.bat_end <= found.file_size
        assert found.allocated <= min(found.file_size, h.entries * h.cluster)


def parse_descriptor(data: bytes) -> None:
    try:
        found = disk_descriptor.parse(data, "x.xml")
    except DescriptorError as e:
        assert "\n" not in str(e)
        return
    assert found.chain[0].parent is None and found.size >= 0 and found.cluster > 0
    for below, above in zip(found.chain, found.chain[1:], strict=False):
        assert above.parent == below.guid and above.format == "ploop1"


def parse_place(data: bytes) -> None:
    """What a D1 peer tells of where its target lies."""
    stream = io.BytesIO(data)

    def read(size: int) -> bytes:
        assert size <= d1.PLACE_HEAD.size + d1.MANY_THINGS * d1.THING.size
        if len(got := stream.read(size)) < size:
            raise ProtocolError("the end")
        return got

    with contextlib.suppress(ProtocolError, ValueError):
        place = d1.Place.unpack(read)
        assert place.pack() == data[: stream.tell()]


def parse_features(data: bytes) -> None:
    """What a D1 peer answers to an offer of features."""
    offered = d1.Feature.COMPRESSED | d1.Feature.LANES
    with contextlib.ExitStack() as fds:
        (out_r, out_w), (back_r, back_w) = os.pipe(), os.pipe()
        for fd in (out_r, out_w, back_r):
            fds.callback(os.close, fd)
        os.write(back_w, data[:4096])
        os.close(back_w)
        out = d1_target.StreamOutput(
            out_w,
            back_r,
            Reporter(),
            two_way=False,
            sync_wait=0,
            answer_timeout=5,
            offered=offered,
        )
        out._answers = back_r
        with contextlib.suppress(SyncError, ProtocolError):
            out._offer_features()
        assert int(out.features) & ~int(offered) == 0
        assert not out.features or data.startswith(d1.FEATURES_REPLY)


def parse_feedback(data: bytes) -> None:
    """What a D1 peer answers to HELLO, then to SYNC; then it is gone."""
    with contextlib.ExitStack() as fds:
        (out_r, out_w), (back_r, back_w) = os.pipe(), os.pipe()
        for fd in (out_r, out_w, back_r):
            fds.callback(os.close, fd)
        os.write(back_w, data[:65536])
        os.close(back_w)
        out = d1_target.StreamOutput(
            out_w, back_r, Reporter(), two_way=False, sync_wait=0, answer_timeout=5
        )
        # Ours is asked again, and then its answers may carry a record of times.
        first, rest = data[:8], data[8:]
        second = first
        timed = False
        if first == d1.HELLO_REPLY:
            second, rest = data[8:16], data[16:]
            timed = second == d1.HELLO_2_REPLY
            rest = rest[d1.TIMES.size :] if timed else rest
        try:
            out.hello()
        except SyncError:
            assert d1.FAILURE in (first, data[8:16])
            return
        except ProtocolError as e:
            assert first != d1.SUCCESS and "\n" not in str(e)
            return
        native = first == d1.HELLO_REPLY
        assert out.framing is (framing.PYPLOOP if native else framing.PLOOP)
        # A peer of ours is asked for its times, too.
        at = 16 if native else 8
        if native and data[8:16] == d1.HELLO_2_REPLY:
            at += d1.TIMES.size
        try:
            out._answer(back_r, "SYNC")
        except PyploopError:
            assert data[at : at + 8] != d1.SUCCESS or len(data) < at + 8 + d1.TIMES.size
        else:
            assert data[at : at + 8] == d1.SUCCESS


def parse_times(data: bytes) -> None:
    """Records of version 2: whatever the peer says of its clock, ours decides."""
    recorder = Recorder()
    recorder.stage = "frozen"
    with recorder.step("target commit"):
        pass
    asked = 100.0
    for at in range(0, len(data) - d1.TIMES.size + 1, d1.TIMES.size):
        record = d1.Times.unpack(data[at : at + d1.TIMES.size])
        assert d1.Times.unpack(record.pack()) == record
        recorder.remote(Heard(asked, asked + 1, record))
        asked += 1
    for span in recorder.spans[1:]:
        assert min(100.0, recorder.spans[0].start) <= span.start <= span.end <= asked
        if span.name != "remote receive":
            assert span.start >= 100.0
    json.loads(chrome_trace(recorder))
    assert "\n" not in recorder.advice()


def parse_handshake(data: bytes) -> None:
    """D3's features, both ways, and the names in messages about D2."""
    offered, reply, kind, command = struct.unpack("<QiII", data[:20].ljust(20, b"\0"))
    answer, features = d3.answer(offered)
    assert features & ~(d3.SUPPORTED & offered) == 0
    d2.REPLY.pack(answer)
    assert d3.agreed(offered, answer) == features
    try:
        agreed = d3.agreed(d3.offer(), reply)
    except ValueError:
        assert reply > 0
    else:
        assert reply <= 0 and agreed & ~d3.offer() == 0
    for text in (d2.name_of(kind, command), d2.meaning(reply)):
        assert text and "\n" not in text


def parse_mux(data: bytes) -> None:
    """A hello among other bytes, a header, and a message behind it."""
    found = mux.find_hello(data)
    assert found is None or (0 < found.end <= len(data) and found.version)
    with contextlib.suppress(ProtocolError):
        frame = mux.parse(data[:8].ljust(8, b"\0"))
        assert frame.length <= max(mux.MAX_CONTROL, mux.MAX_DATA)
    with contextlib.suppress(ProtocolError):
        assert isinstance(mux.decode(data[8:]), dict)


def parse_vzconf(data: bytes) -> None:
    conf = config_files.VzConf({"VEID": "101"})
    conf.update(data.decode("utf-8", "surrogateescape"), "x")
    assert not set(conf.values) & set(conf.unreadable)


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


_HEADER = struct.pack(
    "<16sIIIIIQIIIQ", b"WithouFreSpacExt", 2, 16, 1, 8, 10, 80, 0x746F6E59, 8, 0, 0
)
_V1 = struct.pack("<16sIIIIIQIIIQ", b"WithoutFreeSpace", 2, 16, 1, 8, 10, 80, 0, 0, 0, 0)
_SIZE = struct.pack("<I", 16 * 4096)
_GUID = "{%08x-0000-0000-0000-000000000000}"
_XML = (
    "<Parallels_disk_image><Disk_Parameters><Disk_size>80</Disk_size></Disk_Parameters>"
    "<StorageData><Storage><Start>0</Start><End>80</End><Blocksize>8</Blocksize>"
    f"<Image><GUID>{_GUID % 1}</GUID><Type>Plain</Type><File>a</File></Image>"
    f"<Image><GUID>{_GUID % 2}</GUID><Type>Compressed</Type><File>b</File></Image>"
    f"</Storage></StorageData><Snapshots><TopGUID>{_GUID % 2}</TopGUID>"
    f"<Shot><GUID>{_GUID % 1}</GUID><ParentGUID>{_GUID % 0}</ParentGUID></Shot>"
    f"<Shot><GUID>{_GUID % 2}</GUID><ParentGUID>{_GUID % 1}</ParentGUID></Shot>"
    "</Snapshots></Parallels_disk_image>"
).encode()

TARGETS = {
    "image": Target(
        parse_image,
        (
            _SIZE + _HEADER + struct.pack("<10I", 0, 1, 0, 15, 8, 0, 0, 0, 2, 0),
            _SIZE + _V1 + struct.pack("<10I", 8, 0, 64, 0, 0, 0, 0, 0, 0, 120),
            _SIZE + _HEADER[:44] + struct.pack("<IIIQ", 0x312E3276, 8, 0, 16),
            _SIZE + b"raw",
        ),
    ),
    "descriptor": Target(parse_descriptor, (_XML,)),
    "feedback": Target(
        parse_feedback,
        (
            d1.SUCCESS * 2,
            d1.HELLO_REPLY + d1.SUCCESS * 2,
            d1.HELLO_REPLY + (d1.HELLO_2_REPLY + bytes(56)) + (d1.SUCCESS + bytes(56)),
            d1.FAILURE,
            d1.SUCCESS + d1.FAILURE,
        ),
    ),
    "times": Target(
        parse_times,
        (d1.Times(1, 2, 3, 4, 5, 6, 7).pack() * 2, d1.Times(*[1 << 63] * 7).pack(), bytes(112)),
    ),
    "place": Target(
        parse_place,
        (
            d1.Place(bytes(16), 5, ((7, 1, 0), (8, 2, 77))).pack(),
            d1.Place(b"b" * 16, d1.UNKNOWN_ROOM, ()).pack(),
            bytes(24) + b"\xff" * 4,
        ),
    ),
    "features": Target(
        parse_features,
        (
            d1.SUCCESS + bytes(56),
            *(d1.FEATURES_REPLY + d1.ACCEPTED.pack(bits, 0) for bits in (0, 5, 1 << 63)),
        ),
    ),
    "handshake": Target(
        parse_handshake, tuple(struct.pack("<QiII", n, -n, n, n) for n in (0, 1, 3, 1 << 30))
    ),
    "mux": Target(
        parse_mux,
        (mux.hello("0.1.0"), mux.encode({"op": [1, "x", None]}), mux.frame(mux.CREDIT, 1, 4)),
    ),
    "vzconf": Target(
        parse_vzconf,
        (b"VE_ROOT=\"/vz/root/$VEID\"\nA='b'c\\\nd # x\nexport B=${A}$A\n", b"C=$(ls)\nC=1\n"),
    ),
}


def main() -> None:
    import atheris

    target = TARGETS[sys.argv.pop(1)]
    corpus = Path(os.environ.get("PYPLOOP_FUZZ_DIR", "fuzz-corpus"))
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    atheris.instrument_all()
    atheris.Setup([*sys.argv, str(corpus)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
