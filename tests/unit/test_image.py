# SPDX-License-Identifier: Apache-2.0
"""Image files against qemu-img's parallels driver, against damage, and fuzzed."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import pytest
import support
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyploop.disks import image
from pyploop.errors import DeviceError, FormatError, OpenError, PyploopError

MIB = 1 << 20
V1, V2 = b"WithoutFreeSpace", b"WithouFreSpacExt"
NOTHING: dict[int, int] = {}


def make(  # noqa: PLR0917
    version: int = 2,
    sectors: int = 8,
    clusters: int = 10,
    size: int | None = None,
    bat: dict[int, int] = NOTHING,
    first: int = 8,
    in_use: int = 0,
    kind: int = 2,
    flags: int = 0,
    extension: int = 0,
    file_size: int = 16 * 4096,
) -> bytes:
    """An image written by the facts' table, not with the code under test."""
    out = bytearray(file_size)
    out[:16] = V1 if version == 1 else V2
    struct.pack_into("<IIIII", out, 16, kind, 16, 1, sectors, clusters)
    struct.pack_into("<Q", out, 36, clusters * sectors if size is None else size)
    struct.pack_into("<III", out, 44, in_use, first, flags)
    struct.pack_into("<Q", out, 56, extension)
    for i, entry in bat.items():
        struct.pack_into("<I", out, 64 + 4 * i, entry)
    return bytes(out)


@pytest.fixture
def img(tmp_path: Path) -> Path:
    return tmp_path / "disk.hds"


def inspect(path: Path, data: bytes, claimed: image.Format | None = None) -> image.Image:
    path.write_bytes(data)
    return image.inspect(str(path), claimed)


# ---- qemu-img as witness


def qemu(*command: object) -> Any:
    support.needs("qemu-img")
    text = support.run("qemu-img", *command)
    return json.loads(text) if "--output=json" in command else text


def random_disk(path: Path, size: int, share: float, step: int, seed: int) -> None:
    rng = random.Random(seed)
    with path.open("wb") as f:
        f.truncate(size)
        for at in range(0, size, step):
            if rng.random() < share:
                f.seek(at)
                f.write(rng.randbytes(min(512, size - at)))


def agree(path: Path) -> image.Image:
    """Size, cluster by cluster allocation and in-use flag as qemu-img has them."""
    mine = image.inspect(str(path))
    info = qemu("info", "--output=json", "-f", "parallels", path)
    assert mine.header is not None
    assert mine.size == info["virtual-size"]
    cluster = mine.header.cluster
    if mine.size >= 1 << 40:
        return mine  # qemu-img 7.2 fails an assertion in map
    extents = qemu("map", "--output=json", "-f", "parallels", path)
    present = sum(e["length"] for e in extents if e["data"])
    # The last cluster may be cut by the end of the disk.
    assert present <= mine.allocated < present + cluster
    assert sum(e["length"] for e in extents) == mine.size
    return mine


@pytest.mark.parametrize("size", ["0", "512", "1M", "10M", "10485249", "10G", "1T", "16T"])
def test_created_by_qemu(img: Path, size: str) -> None:
    qemu("create", "-q", "-f", "parallels", img, size)
    mine = agree(img)
    assert mine.format == "ploop1" and mine.allocated == 0 and mine.in_use is False


@pytest.mark.parametrize(
    "cluster", ["1K", "4K", "64K", "252K", "256K", "1000K", "1536K", "4M", "64M"]
)
def test_cluster_sizes_of_qemu(img: Path, cluster: str) -> None:
    qemu("create", "-q", "-f", "parallels", "-o", f"cluster_size={cluster}", img, "100M")
    mine = agree(img)
    assert mine.header is not None and mine.header.cluster == int(cluster[:-1]) * (
        1024 if cluster.endswith("K") else MIB
    )


@pytest.mark.parametrize("cluster", ["4K", "64K", "1000K", "1M"])
@pytest.mark.parametrize(("size", "share"), [
    (20 * MIB, 0.0), (20 * MIB, 0.1), (20 * MIB, 1.0), (20000256, 0.3), (512, 1.0),
    (5 * MIB + 4608, 0.5),
])  # fmt: skip
def test_converted_by_qemu(
    tmp_path: Path, img: Path, cluster: str, size: int, share: float
) -> None:
    raw = tmp_path / "raw"
    random_disk(raw, size, share, 64 << 10, size)
    qemu("convert", "-O", "parallels", "-o", f"cluster_size={cluster}", raw, img)
    agree(img)


@pytest.mark.parametrize("data_off", [True, False])
def test_version_1_means_the_same_to_qemu(tmp_path: Path, img: Path, data_off: bool) -> None:
    """qemu-img cannot make version 1: rewrite an image, entries in sectors."""
    raw = tmp_path / "raw"
    random_disk(raw, 20 * MIB, 0.2, MIB, 3)
    qemu("convert", "-O", "parallels", "-o", "cluster_size=128K", raw, img)
    before = agree(img)
    assert before.header is not None
    data = bytearray(img.read_bytes())
    data[:16] = V1
    for i in range(before.header.entries):
        (entry,) = struct.unpack_from("<I", data, 64 + 4 * i)
        struct.pack_into("<I", data, 64 + 4 * i, entry * 256)
    struct.pack_into("<I", data, 40, 7)  # the unused upper half is ignored
    if not data_off:
        struct.pack_into("<I", data, 48, 0)
    img.write_bytes(data)
    after = agree(img)
    assert after.header is not None and after.header.version == 1
    assert (after.size, after.allocated) == (before.size, before.allocated)
    assert qemu("compare", "-f", "raw", "-F", "parallels", raw, img)


def test_what_qemu_opened_for_writing_is_in_use(img: Path) -> None:
    """qemu-img check calls the same value "not closed correctly"."""
    qemu("create", "-q", "-f", "parallels", img, "1M")
    data = bytearray(img.read_bytes())
    struct.pack_into("<I", data, 44, 0x746F6E59)
    mine = inspect(img, bytes(data))
    assert mine.in_use is True
    assert "not closed correctly" in support.run(
        "sh", "-c", f"qemu-img check {img} 2>&1", check=False
    )
    closed = image.clear_in_use(bytes(data[:512])) + bytes(data[512:])
    assert inspect(img, closed).in_use is False
    assert "No errors" in qemu("check", "-f", "parallels", img)


# ---- ploop1 by the table


@pytest.mark.parametrize(("version", "bat"), [(1, {0: 8, 9: 120, 4: 64}), (2, {0: 1, 9: 15, 4: 8})])
def test_allocated_clusters(img: Path, version: int, bat: dict[int, int]) -> None:
    mine = inspect(img, make(version, bat=bat, in_use=image.IN_USE, flags=5))
    assert mine.header == image.Header(version, 4096, 10, 40960, 0x746F6E59, 4096, 5, 0)
    assert (mine.size, mine.file_size, mine.allocated, mine.in_use) == (
        40960,
        65536,
        3 * 4096,
        True,
    )


def test_full_and_larger_than_a_piece(img: Path) -> None:
    n = image.PIECE // 4 * 2 + 77
    sectors = 2
    first = -(-(64 + 4 * n) // 1024)
    size = (first + n) * 1024
    data = make(
        2,
        sectors,
        n,
        first=first * sectors,
        file_size=size,
        bat={i: first + n - 1 - i for i in range(n)},
    )
    assert inspect(img, data).allocated == n * 1024
    broken = bytearray(data)
    struct.pack_into("<I", broken, 64 + 4 * (n - 1), first + 5)
    with pytest.raises(FormatError, match=f"offset {64 + 4 * (n - 1)}: .*used twice"):
        inspect(img, bytes(broken))


def test_last_cluster_is_cut_by_the_disk(img: Path) -> None:
    assert inspect(img, make(size=73, bat={9: 1})).size == 73 * 512


def test_version_1_without_first_block_follows_its_first_entry(img: Path) -> None:
    data = make(1, first=0, bat={0: 63, 1: 63 + 8, 2: 63 + 24})
    assert inspect(img, data).allocated == 3 * 4096
    with pytest.raises(FormatError, match=r"offset 72: .*whole number"):
        inspect(img, make(1, first=0, bat={0: 63, 1: 63 + 8, 2: 63 + 12}))


def test_the_extension_is_a_cluster_too(img: Path) -> None:
    closed = image.CLOSED_EXTENDED
    assert inspect(img, make(bat={0: 1}, extension=16, in_use=closed)).allocated == 4096
    with pytest.raises(FormatError, match=r"offset 64: .*used twice"):
        inspect(img, make(bat={0: 2}, extension=16, in_use=closed))
    with pytest.raises(FormatError, match=r"offset 56: "):
        inspect(img, make(extension=17, in_use=closed))
    # 64 bits wide, unlike an entry.
    for far in (8 << 32, 1 << 63):
        with pytest.raises(FormatError, match=r"offset 56: .*past the end"):
            inspect(img, make(extension=far, in_use=closed))
    # Closed by software that does not know it: what stands there is stale.
    assert inspect(img, make(bat={0: 2}, extension=16)).allocated == 4096


@pytest.mark.parametrize(
    ("damage", "offset", "what"),
    [
        ({"kind": 3}, 16, "type is 3"),
        ({"sectors": 0, "size": 80}, 28, "0 sectors"),
        ({"sectors": 63}, 28, "63 sectors"),
        ({"size": 81}, 32, "do not make 81"),
        ({"size": 72}, 32, "do not make 72"),
        ({"clusters": 0, "size": 80}, 32, "0 clusters"),
        (
            {"sectors": 1 << 31, "clusters": 0xFFFFFFFF, "size": 0xFFFFFFFF << 31},
            36,
            "more than a file can hold",
        ),
        ({"clusters": 20000, "first": 160}, 32, "past the end"),
        ({"clusters": 0xFFFFFFFF}, 48, "inside the BAT"),
        ({"first": 0}, 48, "first block"),
        ({"first": 12}, 48, "first block"),
        ({"clusters": 2000, "first": 8}, 48, "inside the BAT"),
        ({"version": 1, "first": 8, "clusters": 2000}, 48, "inside the BAT"),
        ({"first": 800}, 48, "past the end"),
        ({"bat": {3: 16}}, 76, "past the end"),
        ({"bat": {3: 0xFFFFFFFF}}, 76, "past the end"),
        ({"version": 1, "bat": {3: 121}}, 76, "past the end"),
        ({"version": 1, "bat": {3: 7}}, 76, "before the first block"),
        ({"first": 16, "bat": {3: 1}}, 76, "before the first block"),
        ({"version": 1, "bat": {3: 12}}, 76, "whole number"),
        ({"bat": {3: 5, 7: 5}}, 92, "used twice"),
        ({"version": 1, "bat": {3: 40, 7: 40}}, 92, "used twice"),
        ({"bat": {3: 15}, "file_size": 65535}, 76, "past the end"),
    ],
)
def test_damage_names_file_and_offset(
    img: Path, damage: dict[str, Any], offset: int, what: str
) -> None:
    with pytest.raises(FormatError) as e:
        inspect(img, make(**damage))
    text = str(e.value)
    assert text.startswith(f"{img}: offset {offset}: ") and what in text and "\n" not in text
    assert e.value.exit_code == 11


@pytest.mark.parametrize("length", [16, 40, 63, 64, 80, 103, 4095])
def test_truncated(img: Path, length: int) -> None:
    with pytest.raises(FormatError, match=r"past the end|ends in the header"):
        inspect(img, make()[:length])


def test_a_claim_decides_between_raw_and_ploop1(img: Path) -> None:
    guest = make(kind=77)
    mine = inspect(img, guest, "raw")
    assert mine.format == "raw" and mine.size == len(guest) and mine.signed
    with pytest.raises(FormatError, match=r"offset 0: no ploop1 signature"):
        inspect(img, b"x" * 4096, "ploop1")
    with pytest.raises(FormatError, match="offset 0"):
        inspect(img, b"x", "ploop1")


def test_growing_while_it_is_read(img: Path) -> None:
    """An image in use: the file grows, then the BAT names the new cluster."""
    img.write_bytes(make(bat={0: 1}, file_size=2 * 4096))
    fd = os.open(img, os.O_RDWR)
    try:
        header = image.parse_header(os.pread(fd, 64, 0), "x")
        used = image._Used(fd, header, "x")
        os.ftruncate(fd, 3 * 4096)
        assert used.add(64, array("I", [1, 2])) == 2
    finally:
        os.close(fd)


# ---- raw, and what is no image


def test_raw(img: Path) -> None:
    with img.open("wb") as f:
        f.truncate(8 * MIB)
        f.seek(MIB)
        f.write(b"x" * MIB)
    mine = image.inspect(str(img))
    assert (mine.format, mine.size, mine.header, mine.in_use) == ("raw", 8 * MIB, None, None)
    assert mine.allocated == os.stat(img).st_blocks * 512
    assert mine.data == MIB


def test_huge_and_sparse(img: Path) -> None:
    with img.open("wb") as f:
        f.truncate(1 << 43)
    mine = image.inspect(str(img))
    assert (mine.size, mine.data) == (1 << 43, 0)


def test_bat_of_a_huge_sparse_file_is_read_in_pieces(img: Path) -> None:
    n = 1 << 24
    cluster = 64 << 10
    first = 64 * MIB // cluster + 1
    bat = {0: first, 5: first + n - 1}
    img.write_bytes(
        make(2, cluster // 512, n, first=first * cluster // 512, file_size=4096, bat=bat)
    )
    os.truncate(img, (first + n) * cluster)
    tracemalloc.start()
    try:
        assert image.inspect(str(img)).allocated == 2 * cluster
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


def test_holes_of_a_bat_are_not_read(img: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of some kilobytes may have a BAT of a gigabyte, and a descriptor names
    thousands of them."""
    n, read = 1 << 24, []
    img.write_bytes(make(2, 128, n, first=(64 * MIB // 65536 + 1) * 128, file_size=4096))
    os.truncate(img, 128 * MIB)

    def pread(fd: int, size: int, at: int) -> bytes:
        read.append(size)
        return real(fd, size, at)

    real = os.pread
    monkeypatch.setattr(os, "pread", pread)
    assert image.inspect(str(img)).allocated == 0
    assert sum(read) < MIB


@pytest.mark.invariant(number=5)
def test_too_many_entries_and_clusters_are_refused(img: Path) -> None:
    n = image.MAX_ENTRIES + 1
    head = make(2, 2, n, first=2 * (n // 128), file_size=4096)
    img.write_bytes(head)
    os.truncate(img, 1 << 40)
    with pytest.raises(FormatError, match=r"offset 32: .*at most"):
        image.inspect(str(img))
    img.write_bytes(make(2, 2, 10, first=2, file_size=4096, bat={2: image.MAX_CLUSTERS + 1}))
    os.truncate(img, 1 << 42)
    with pytest.raises(FormatError, match=r"offset 72: .*clusters into the file"):
        image.inspect(str(img))


def test_not_an_image(tmp_path: Path, img: Path) -> None:
    with pytest.raises(FormatError, match="empty"):
        inspect(img, b"")
    with pytest.raises(DeviceError, match="a directory"):
        image.inspect(str(tmp_path))
    with pytest.raises(OpenError, match="No such file"):
        image.inspect(str(tmp_path / "none"), error=OpenError)
    with pytest.raises(DeviceError, match="null"):
        image.inspect("a\0b")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DeviceError, match="not a regular file"):
        image.inspect(str(tmp_path / "fifo"))


# ---- clear_in_use


def test_clear_in_use() -> None:
    header = make(in_use=image.IN_USE, flags=9)[:512]
    clear = image.clear_in_use(header)
    assert len(clear) == 512
    assert [i for i in range(512) if clear[i] != header[i]] == [44, 45, 46, 47]
    assert clear == make(flags=9)[:512]
    assert image.clear_in_use(clear) == clear
    for wrong in (b"", header[:47]):
        with pytest.raises(FormatError):
            image.clear_in_use(wrong)


# ---- fuzz

SMALL = st.integers(0, 40) | st.integers(0, 0xFFFFFFFF)


EDITS = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 255)), max_size=2)
"""Where a byte is another one."""


def test_any_header() -> None:
    good = 0

    @given(
        version=st.sampled_from([1, 2]),
        sectors=st.sampled_from([2, 8, 2048]),
        clusters=st.integers(0, 300),
        less=st.integers(0, 1),
        first=st.integers(0, 4),
        edits=EDITS,
        length=st.just(80) | st.integers(0, 80),
    )
    @settings(max_examples=400, deadline=None)
    def damaged(
        *,
        version: int,
        sectors: int,
        clusters: int,
        less: int,
        first: int,
        edits: list[tuple[int, int]],
        length: int,
    ) -> None:
        nonlocal good
        size = max(clusters * sectors - less, 0)
        made = bytearray(make(version, sectors, clusters, size, first=first * sectors))
        for at, value in edits:
            made[at] = value
        try:
            header = image.parse_header(bytes(made[:length]), "x")
        except FormatError as e:
            assert "\n" not in str(e)
            return
        good += 1
        assert header.cluster and -(-header.size // header.cluster) == header.entries
        assert header.data_start >= header.bat_end

    damaged()
    assert good > 40


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """Those of an image for `make`, of which up to two are not what they should be."""
    version, sectors = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 8, 2048]))
    clusters = draw(st.integers(1, 40))
    unit = sectors if version == 1 else 1
    places = draw(st.lists(st.integers(1, 99), max_size=12, unique=True))
    numbers = draw(st.permutations(range(clusters)))
    made: dict[str, Any] = {
        "version": version,
        "sectors": sectors,
        "clusters": clusters,
        "size": clusters * sectors - draw(st.integers(0, 1)),
        "first": sectors,
        "in_use": draw(st.sampled_from([0, image.IN_USE, image.CLOSED_EXTENDED])),
        "extension": 0,
        "bat": {n: place * unit for n, place in zip(numbers, places, strict=False)},
    }
    for name in draw(st.lists(st.sampled_from(sorted(made)), max_size=2)):
        if name == "bat":
            made["bat"] = draw(st.dictionaries(st.integers(0, 40), SMALL, max_size=12))
        elif name == "version":
            made["version"] = 3 - version
        else:
            made[name] = draw(SMALL)
    return made


TAILS = st.sampled_from([1 << 33, 1 << 42]) | st.integers(1, 1 << 43)
FAR = {
    "version": 2, "sectors": 2, "clusters": 1, "size": 2, "first": 2, "in_use": 0, "extension": 0,
    "bat": {0: 1 << 29},
}  # fmt: skip


def test_any_image(tmp_path: Path) -> None:
    good = 0

    @given(fields(), TAILS)
    @example(FAR, 1 << 42)
    @settings(max_examples=400, deadline=None)
    def damaged(made: dict[str, Any], tail: int) -> None:
        nonlocal good
        good += _is_image(tmp_path / "fuzz.hds", made, tail)

    damaged()
    assert good > 40


def _is_image(path: Path, made: dict[str, Any], tail: int) -> bool:
    """It is taken for one, and the result holds; or FormatError.  Memory within the bound."""
    path.write_bytes(make(file_size=4096, **made))
    os.truncate(path, tail)
    taken = False
    tracemalloc.start()
    try:
        mine = image.inspect(str(path))
    except PyploopError as e:
        assert isinstance(e, FormatError) and "\n" not in str(e)
    else:
        if mine.header is not None:
            taken = True
            assert mine.allocated <= min(mine.file_size, mine.size + mine.header.cluster)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 * MIB
    return taken
