# SPDX-License-Identifier: Apache-2.0
"""DiskDescriptor.xml: chains, damage, hostile XML."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st

from pyploop.disks import disk_descriptor
from pyploop.errors import DescriptorError, DeviceError, OpenError
from pyploop.system import sysblock

NONE = "{00000000-0000-0000-0000-000000000000}"
TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"


def guid(n: int) -> str:
    return f"{{{n:08x}-0000-4000-8000-0123456789ab}}"


def xml(  # noqa: PLR0917
    images: list[tuple[str, str, str]],
    shots: list[tuple[str, str]],
    top: str | None = None,
    size: str = "20480",
    end: str | None = None,
    block: str = "2048",
    head: str = '<?xml version="1.0"?>\n',
    more: str = "",
) -> bytes:
    """As ploop writes it.  images: (GUID, Type, File); shots: (GUID, ParentGUID)."""
    image = "".join(
        f"<Image><GUID>{g}</GUID><Type>{t}</Type><File>{f}</File></Image>\n" for g, t, f in images
    )
    shot = "".join(f"<Shot><GUID>{g}</GUID><ParentGUID>{p}</ParentGUID></Shot>\n" for g, p in shots)
    top_guid = f"<TopGUID>{top}</TopGUID>" if top is not None else ""
    return (
        f"""{head}<Parallels_disk_image Version="1.0">
    <Disk_Parameters>
        <Disk_size>{size}</Disk_size><Cylinders>20</Cylinders><Heads>16</Heads>
        <Sectors>63</Sectors><Padding>0</Padding>{more}
    </Disk_Parameters>
    <StorageData>
        <Storage>
            <Start>0</Start><End>{size if end is None else end}</End>
            <Blocksize>{block}</Blocksize>
            {image}
        </Storage>
    </StorageData>
    <Snapshots>{top_guid}{shot}</Snapshots>
</Parallels_disk_image>
"""
    ).encode()


ONE = [(TOP, "Compressed", "root.hdd")]
THREE = [
    (guid(3), "Compressed", "root.hdd.3"),
    (guid(1), "Plain", "root.hdd"),
    (guid(2), "Compressed", "/else/where/root.hdd.2"),
]
SHOTS = [(guid(2), guid(1)), (guid(3), guid(2)), (guid(1), NONE)]


def test_one_delta() -> None:
    d = disk_descriptor.parse(
        xml(ONE, [(TOP, NONE)], TOP), "/vz/private/1/root.hdd/DiskDescriptor.xml"
    )
    assert (d.size, d.cluster, d.others) == (20480 * 512, 1 << 20, 0)
    assert d.chain == (
        disk_descriptor.Delta(TOP, None, "/vz/private/1/root.hdd/root.hdd", "ploop1"),
    )
    assert d.top is d.chain[0]


def test_chain_goes_from_base_to_top() -> None:
    d = disk_descriptor.parse(xml(THREE, SHOTS, guid(3)), "dir/DiskDescriptor.xml")
    assert [x.guid for x in d.chain] == [guid(1), guid(2), guid(3)]
    assert [x.parent for x in d.chain] == [None, guid(1), guid(2)]
    assert [x.path for x in d.chain] == ["dir/root.hdd", "/else/where/root.hdd.2", "dir/root.hdd.3"]
    assert [x.format for x in d.chain] == ["raw", "ploop1", "ploop1"]
    assert d.top.path == "dir/root.hdd.3"


def test_a_branch_is_not_in_the_chain() -> None:
    d = disk_descriptor.parse(
        xml(THREE, [*SHOTS[:1], (guid(3), guid(1)), *SHOTS[2:]], guid(3)), "x.xml"
    )
    assert [x.guid for x in d.chain] == [guid(1), guid(3)]
    assert d.others == 1


def test_guids_are_compared_without_case() -> None:
    d = disk_descriptor.parse(xml([(TOP.upper(), "Plain", "a")], [(TOP, NONE)], TOP), "x.xml")
    assert d.top.path == "a"


def test_without_top_or_snapshots() -> None:
    assert disk_descriptor.parse(xml(ONE, []), "x.xml").top.guid == TOP
    assert disk_descriptor.parse(xml(ONE, [(TOP, NONE)]), "x.xml").top.guid == TOP
    plain = xml(ONE, [])
    start, end = plain.index(b"<Snapshots>"), plain.index(b"</Parallels")
    assert disk_descriptor.parse(plain[:start] + plain[end:], "x.xml").top.guid == TOP


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (xml(THREE, [*SHOTS[:2], (guid(1), guid(3))], guid(3)), "its own ancestor"),
        (xml(ONE, [(TOP, TOP)], TOP), "its own ancestor"),
        (xml(THREE, SHOTS[:2], guid(3)), "which is missing"),
        (xml(THREE, SHOTS, guid(9)), "no Shot has the TopGUID"),
        (xml(ONE, [], guid(9)), "no Shot has the TopGUID"),
        (xml(THREE, SHOTS), "no TopGUID"),
        (xml(THREE[:2], SHOTS, guid(3)), f"Shot {guid(2)} has no Image"),
        (xml(THREE[1:], SHOTS, guid(3)), f"Shot {guid(3)} has no Image"),
        (xml(THREE, [*SHOTS, (guid(4), NONE)], guid(3)), "several Shots have no parent"),
        (xml(THREE, [*SHOTS, SHOTS[0]], guid(3)), "two Shots"),
        (xml([*ONE, *ONE], [(TOP, NONE)], TOP), "two Images"),
        (xml([], [(TOP, NONE)], TOP), "no Image"),
        (xml([(TOP, "Sparse", "x")], [(TOP, NONE)], TOP), "Type 'Sparse'"),
        (xml([(TOP, "Plain", " ")], [(TOP, NONE)], TOP), "File in Image is empty"),
        (xml([("5fbaabe3", "Plain", "x")], [], TOP), "not a GUID"),
        (xml([(guid(1), "Plain", "a"), (guid(2), "Plain", "b")],
             [(guid(1), NONE), (guid(2), guid(1))], guid(2)), "not the base"),
        (xml(ONE, [], size="-1"), "not a number"),
        (xml(ONE, [], size="1" * 17), "not a number"),
        (xml(ONE, [], size="\u0663"), "not a number"),  # an Arabic digit
        (xml(ONE, [], end="9"), "Storage goes from"),
        (xml(ONE, [], block="0"), "Blocksize is 0"),
        (xml(ONE, [], more="<Disk_size>1</Disk_size>"), "2 elements Disk_size"),
        (xml(ONE, []).replace(b"<Storage>", b"<Storage></Storage><Storage>"), "2 elements Storage"),
        (b"<a/>", "the root element is 'a'"),
        (b"", "not XML"),
        (b"x", "not XML"),
        (xml(ONE, [])[:200], "not XML"),
        (xml(ONE, [], head='<?xml version="1.0" encoding="nonsense"?>'), "not XML"),
        (xml(ONE, [], head='<?xml version="1.0" encoding="utf-32"?>'), "not XML"),
        (xml(ONE, [], head="<!DOCTYPE a>"), "DOCTYPE"),
        (xml(ONE, [], head='<!DOCTYPE a SYSTEM "file:///etc/passwd">'), "DOCTYPE"),
        (b"<a>" * 40 + b"</a>" * 40, "nested"),
        (b"<a>" * 300000, "nested"),
        (b" " * (disk_descriptor.MAX_SIZE + 1), "larger than"),
    ],
)  # fmt: skip
def test_damage(data: bytes, what: str) -> None:
    with pytest.raises(DescriptorError) as e:
        disk_descriptor.parse(data, "/x/DiskDescriptor.xml")
    text = str(e.value)
    assert text.startswith("/x/DiskDescriptor.xml: ") and what in text and "\n" not in text
    assert e.value.exit_code == 39


def test_no_entity_is_expanded() -> None:
    entities = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(10))
    bomb = xml([(TOP, "Plain", "&e10;")], [], head=f'<!DOCTYPE a [<!ENTITY e0 "ha">{entities}]>')
    tracemalloc.start()
    try:
        with pytest.raises(DescriptorError, match="DOCTYPE"):
            disk_descriptor.parse(bomb, "x.xml")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "DiskDescriptor.xml"
    with pytest.raises(OpenError, match="No such file"):
        disk_descriptor.read(str(path))
    with pytest.raises(OpenError, match="a directory"):
        disk_descriptor.read(str(tmp_path))
    path.write_bytes(xml(ONE, []))
    assert disk_descriptor.read(str(path)).top.path == str(tmp_path / "root.hdd")
    os.truncate(path, 1 << 40)  # sparse: never read to its end
    with pytest.raises(DescriptorError, match="larger than"):
        disk_descriptor.read(str(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OpenError, match="not a regular file"):
        disk_descriptor.read(str(path))


# ---- what serves the top delta


def test_serving_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "DiskDescriptor.xml"
    path.write_bytes(xml(ONE, []))
    with pytest.raises(OpenError, match="top delta"):
        disk_descriptor.serving_loop(str(path))
    (tmp_path / "root.hdd").write_bytes(b"x")
    assert disk_descriptor.serving_loop(str(path)) is None
    asked: list[str] = []
    loops = ["/dev/loop7"]

    def found(name: str) -> list[str]:
        asked.append(name)
        return loops

    monkeypatch.setattr(sysblock, "loop_device_of", found)
    assert disk_descriptor.serving_loop(str(path)) == "/dev/loop7"
    assert asked == [str(tmp_path / "root.hdd")]
    loops.append("/dev/loop8")
    with pytest.raises(DeviceError, match="/dev/loop7, /dev/loop8"):
        disk_descriptor.serving_loop(str(path))


@pytest.mark.root
def test_serving_loop_for_real(tmp_path: Path) -> None:
    support.needs("loop")
    path = tmp_path / "DiskDescriptor.xml"
    path.write_bytes(xml([(guid(1), "Plain", "root.hdd")], []))
    delta = tmp_path / "root.hdd"
    with delta.open("wb") as f:
        f.truncate(20480 * 512)
    with support.loop_device(delta) as device:
        assert disk_descriptor.serving_loop(str(path)) == device
    assert disk_descriptor.serving_loop(str(path)) is None


def test_serving_ploop(tmp_path: Path) -> None:
    delta, other = tmp_path / "root.hdd", tmp_path / "other"
    delta.write_bytes(b"x")
    other.write_bytes(b"x")
    for name, top in (("ploop1", other), ("ploop20", delta)):
        node = tmp_path / "block" / name
        (node / "pstate").mkdir(parents=True)
        (node / "pstate/top").write_text("1\n")
        for level, file in (("0", other), ("1", top)):
            (node / "pdelta" / level).mkdir(parents=True)
            (node / "pdelta" / level / "image").write_text(f"{file}\n")
    assert disk_descriptor.serving_ploop(str(delta), tmp_path / "block") == "/dev/ploop20"
    delta.rename(tmp_path / "moved")
    assert disk_descriptor.serving_ploop(str(tmp_path / "moved"), tmp_path / "block") is None
    with pytest.raises(OpenError):
        disk_descriptor.serving_ploop(str(delta), tmp_path / "block")


# ---- fuzz


@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda t: t.encode("utf-16", "replace")))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(DescriptorError):
        disk_descriptor.parse(data, "x.xml")


GOOD = xml(THREE, SHOTS, guid(3))


@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 40), st.binary(max_size=8)), max_size=4
    )
)
@settings(max_examples=600, deadline=None)
def test_damaged_bytes(cuts: list[tuple[int, int, bytes]]) -> None:
    data = GOOD
    for at, length, new in cuts:
        data = data[:at] + new + data[at + length :]
    try:
        d = disk_descriptor.parse(data, "x.xml")
    except DescriptorError as e:
        assert "\n" not in str(e)
    else:
        assert d.chain[0].parent is None


GUIDS = st.sampled_from([NONE, TOP, *(guid(i) for i in range(4))])


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]], str]:
    """(images, shots, top) of a chain, in which up to two things are not what they were."""
    chain = draw(st.permutations([TOP, *(guid(i) for i in range(4))]))[: draw(st.integers(1, 5))]
    images = [(g, "Compressed", f"{n}.hds") for n, g in enumerate(chain)]
    shots = list(zip(chain, [NONE, *chain], strict=False))
    top = chain[-1]
    for what in draw(st.lists(st.integers(0, 4), max_size=2)):
        at = draw(st.integers(0, len(chain) - 1))
        if what == 0:
            images[at] = (images[at][0], "Plain", images[at][2])
        elif what == 1:
            images[at] = (draw(GUIDS), *images[at][1:])
        elif what == 2:
            shots[at] = (shots[at][0], draw(GUIDS))
        elif what == 3:
            shots[at] = (draw(GUIDS), shots[at][1])
        else:
            top = draw(GUIDS)
    return images, draw(st.permutations(shots)), top


def test_any_tree() -> None:
    lengths: list[int] = []

    @given(trees())
    @settings(max_examples=600, deadline=None)
    def parsed(
        tree: tuple[list[tuple[str, str, str]], list[tuple[str, str]], str],
    ) -> None:
        images, shots, top = tree
        try:
            d = disk_descriptor.parse(xml(images, shots, top), "x.xml")
        except DescriptorError as e:
            assert "\n" not in str(e)
            return
        lengths.append(len(d.chain))
        assert d.chain[0].parent is None and d.top.guid == top
        assert all(b.parent == a.guid for a, b in zip(d.chain, d.chain[1:], strict=False))
        parents = dict(shots)
        assert all(parents[x.guid] == (x.parent or NONE) for x in d.chain)
        files = {g: file for g, _, file in images}
        assert all(x.path == files[x.guid] for x in d.chain)

    parsed()
    assert sum(n > 2 for n in lengths) > 40


def test_a_file_comes_once(tmp_path: Path) -> None:
    """What reads the chain would read it as often as it is named."""
    twice = [(guid(1), "Compressed", "root.hds"), (guid(2), "Compressed", "./root.hds")]
    made = xml(twice, [(guid(1), NONE), (guid(2), guid(1))], top=guid(2))
    with pytest.raises(DescriptorError, match=r"two Images have the File '.*root\.hds'"):
        disk_descriptor.parse(made, str(tmp_path / "DiskDescriptor.xml"))
