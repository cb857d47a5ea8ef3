# SPDX-License-Identifier: Apache-2.0
"""`pyploop info`, as a process: what it prints, and one line for what fails."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import support

from pyploop.api import inspecting
from pyploop.cli.info import as_text
from pyploop.disks.source import Source
from pyploop.system.mount_table import Mount

MIB = 1 << 20
KEYS = {
    "schema", "path", "kind", "format", "version", "size", "file_size", "cluster", "allocated",
    "data", "in_use", "chain", "device", "mounts", "users", "tracker", "notes",
}  # fmt: skip
BASE, TOP = (f"{{0000000{i}-0000-4000-8000-0123456789ab}}" for i in (1, 2))
NONE = "{00000000-0000-0000-0000-000000000000}"


def info(*args: object, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*prefix, *support.pyploop_cmd(), "info", *map(str, args)],
        capture_output=True,
        text=True,
        env=support.pyploop_env(),
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


def as_json(*args: object, prefix: Sequence[str] = ()) -> dict[str, Any]:
    done = info("--json", *args, prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    report: dict[str, Any] = json.loads(done.stdout)
    assert set(report) == KEYS
    return report


def fails(code: int, what: str, *args: object, prefix: Sequence[str] = ()) -> None:
    done = info(*args, prefix=prefix)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("pyploop: ")
    assert what in done.stderr


def raw(path: Path, size: int = 8 * MIB) -> Path:
    with path.open("wb") as f:
        f.truncate(size)
        f.write(b"x" * MIB)
    return path


def ploop1(path: Path, in_use: bool = False, damage: bool = False) -> Path:
    """8 clusters of 1 MiB, two of them allocated."""
    header = struct.pack(
        "<16sIIIIIQIIIQ", b"WithouFreSpacExt", 2, 16, 1, 2048, 8, 8 * 2048,
        0x746F6E59 if in_use else 0, 2048, 0, 0,
    )  # fmt: skip
    path.write_bytes(header + struct.pack("<8I", 0, 2, 0, 2 if damage else 1, 0, 0, 0, 0))
    os.truncate(path, 3 * MIB)
    return path


def private_area(folder: Path) -> Path:
    raw(folder / "root.hdd")
    ploop1(folder / "root.hdd.top", in_use=True)
    image = "<Image><GUID>%s</GUID><Type>%s</Type><File>%s</File></Image>"
    shot = "<Shot><GUID>%s</GUID><ParentGUID>%s</ParentGUID></Shot>"
    path = folder / "DiskDescriptor.xml"
    path.write_text(
        "<Parallels_disk_image><Disk_Parameters><Disk_size>16384</Disk_size></Disk_Parameters>"
        "<StorageData><Storage><Start>0</Start><End>16384</End><Blocksize>2048</Blocksize>"
        + image % (TOP, "Compressed", "root.hdd.top")
        + image % (BASE, "Plain", "root.hdd")
        + f"</Storage></StorageData><Snapshots><TopGUID>{TOP}</TopGUID>"
        + shot % (BASE, NONE)
        + shot % (TOP, BASE)
        + "</Snapshots></Parallels_disk_image>"
    )
    return path


def test_raw_image(tmp_path: Path) -> None:
    path = raw(tmp_path / "disk")
    report = as_json(path)
    assert report["schema"] == "pyploop.info/1"
    assert (report["kind"], report["format"], report["version"]) == ("image", "raw", None)
    assert (report["size"], report["data"], report["in_use"]) == (8 * MIB, MIB, None)
    assert report["allocated"] == os.stat(path).st_blocks * 512
    assert report["tracker"]["name"] == "scan" and "plain file" in report["tracker"]["why"]
    assert report["device"] is None and report["mounts"] == [] and report["chain"] == []


def test_ploop1_image(tmp_path: Path) -> None:
    report = as_json(ploop1(tmp_path / "disk", in_use=True))
    assert (report["format"], report["version"], report["cluster"]) == ("ploop1", 2, MIB)
    assert (report["size"], report["file_size"], report["allocated"]) == (8 * MIB, 3 * MIB, 2 * MIB)
    assert report["in_use"] is True and report["notes"] == []


def test_descriptor(tmp_path: Path) -> None:
    path = private_area(tmp_path)
    report = as_json(path)
    assert (report["kind"], report["format"], report["size"]) == ("descriptor", "ploop1", 8 * MIB)
    assert [(d["guid"], d["parent"], d["format"], d["version"]) for d in report["chain"]] == [
        (BASE, None, "raw", None),
        (TOP, BASE, "ploop1", 2),
    ]
    assert [d["path"] for d in report["chain"]] == [
        str(tmp_path / n) for n in ("root.hdd", "root.hdd.top")
    ]
    assert [d["in_use"] for d in report["chain"]] == [None, True]
    assert report["allocated"] == sum(d["allocated"] for d in report["chain"])
    assert report["notes"] == []


def test_descriptor_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_area(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert as_json("DiskDescriptor.xml")["chain"][0]["path"] == "root.hdd"


def test_descriptor_disagrees_with_its_deltas(tmp_path: Path) -> None:
    path = private_area(tmp_path)
    path.write_text(path.read_text().replace("16384", "16385").replace("2048", "4096"))
    notes = as_json(path)["notes"]
    assert len(notes) == 2 and "8389120 bytes" in notes[0] and "2097152" in notes[1]


def test_text(tmp_path: Path) -> None:
    done = info(private_area(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    columns = {len(x) - len(x.split(":", 1)[1].lstrip()) for x in lines if not x.startswith(" ")}
    assert len(columns) == 1, lines
    got = dict(x.split(":", 1) for x in lines if not x.startswith(" "))
    assert got["format"].strip() == "ploop1 v2"
    assert got["size"].strip() == "8.0 MiB (8388608 bytes)"
    assert got["in use"].strip() == "yes"
    at = next(i for i, x in enumerate(lines) if x.startswith("chain:"))
    assert BASE in lines[at] and TOP in lines[at + 1] and lines[at + 1].endswith("(top)")
    assert lines[at].index("{") == lines[at + 1].index("{")


def test_a_name_cannot_forge_a_line(tmp_path: Path) -> None:
    path = raw(tmp_path / "a\nin use: no\x1b[2J")
    lines = info(path).stdout.splitlines()
    assert not any(x.startswith("in use") for x in lines)
    assert r"a\nin use: no\x1b[2J" in lines[0]
    assert as_json(path)["path"] == str(path)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = raw(tmp_path / os.fsdecode(b"disk\xff"))
    assert r"disk\udcff" in info(path).stdout
    assert os.fsencode(as_json(path)["path"]).endswith(b"disk\xff")


def test_what_fails(tmp_path: Path) -> None:
    fails(2, "No such file", tmp_path / "none")
    fails(2, "a directory", tmp_path)
    fails(2, "not a regular file", "/dev/null")
    (tmp_path / "empty").touch()
    fails(11, "empty", tmp_path / "empty")
    fails(11, "offset 76: ", ploop1(tmp_path / "bad", damage=True))
    (tmp_path / "bad.xml").write_text("<!DOCTYPE x><x/>")
    fails(39, "DOCTYPE", tmp_path / "bad.xml")
    path = private_area(tmp_path)
    fails(2, f"name {path}", tmp_path)
    (tmp_path / "root.hdd").unlink()
    fails(4, "root.hdd: No such file", path)
    raw(tmp_path / "root.hdd.top")
    raw(tmp_path / "root.hdd")
    fails(11, "no ploop1 signature", path)


def test_usage() -> None:
    for args in ([], ["a", "b"], ["--jso", "a"]):
        assert info(*args).returncode == 38
    assert info("--help").returncode == 0
    listed = subprocess.run(
        [*support.pyploop_cmd(), "--help"],
        capture_output=True,
        text=True,
        env=support.pyploop_env(),
        check=True,
    )
    assert " info " in listed.stdout


@pytest.mark.parametrize("size", [1 << 43])
def test_huge(tmp_path: Path, size: int) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as f:
        f.truncate(size)
    assert as_json(path)["size"] == size


# ---- devices


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may enter (pytest's own is private)."""
    with tempfile.TemporaryDirectory(prefix="pyploop-info-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.root
def test_loop_device_and_its_image(tmp_path: Path) -> None:
    support.needs("loop", "mkfs.ext4")
    image = raw(tmp_path / "disk", 64 * MIB)
    support.run("mkfs.ext4", "-q", "-F", image)
    with support.loop_device(image) as device, support.mounted(device, tmp_path / "mnt") as point:
        of_device, of_image = as_json(device), as_json(image)
        assert of_device["kind"] == "device" and of_image["kind"] == "image"
        for report in (of_device, of_image):
            assert report["size"] == 64 * MIB
            assert report["device"] == {
                "path": device,
                "kind": "block",
                "size": 64 * MIB,
                "disk": device.removeprefix("/dev/"),
                "partition_offset": None,
                "backing_file": str(image),
                "io_mode": f"backing file {image}, buffered",
            }
            assert report["mounts"] == [{"point": str(point), "fstype": "ext4", "source": device}]
            assert report["tracker"]["name"] in ("bpf", "scan") and report["tracker"]["why"]
        text = info(device).stdout
        assert f"{point} (ext4 on {device})" in text
        with support.loop_device(image) as second:
            report = as_json(image)
            assert report["device"] is None and report["tracker"]["name"] is None
            assert any(device in n and second in n for n in report["notes"])


@pytest.mark.root
def test_partition(tmp_path: Path) -> None:
    support.needs("loop")
    image = raw(tmp_path / "disk", 16 * MIB)
    with support.loop_device(image) as device:
        disk = device.removeprefix("/dev/")
        with support.partition(device, 1, MIB, 4 * MIB):
            number = Path(f"/sys/block/{disk}/{disk}p1/dev").read_text()
            # A name of our own: not every container or udev makes one.
            node = tmp_path / "part"
            os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(*map(int, number.split(":"))))
            report = as_json(node)
    assert (report["size"], report["data"]) == (4 * MIB, 0)
    assert report["device"]["partition_offset"] == MIB
    assert report["device"]["disk"] == disk
    assert report["device"]["backing_file"] == str(image)


def test_ploop_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stock kernel has one: the source is made up, the image is not."""
    image = ploop1(tmp_path / "top", in_use=True)
    source = Source(
        "/dev/ploop7", "ploop", 3 * MIB, -1, cluster=MIB, image=str(image), image_format="ploop1",
        io_mode="delta", mounts=[Mount("/vz/root/7", "ext4", "/dev/ploop7p1")],
    )  # fmt: skip
    monkeypatch.setattr(inspecting, "open_source", lambda path: source)
    report = inspecting._of_device("/dev/ploop7")
    assert (report["format"], report["version"], report["size"]) == ("ploop1", 2, 8 * MIB)
    assert (report["cluster"], report["allocated"], report["in_use"]) == (MIB, 2 * MIB, True)
    assert report["device"]["backing_file"] == str(image)
    assert report["mounts"][0]["point"] == "/vz/root/7"
    assert report["tracker"] == {"name": "ploop", "why": "a ploop device has its own tracking"}
    assert as_text(report)[0].endswith("/dev/ploop7")


@pytest.mark.root
def test_ploop1_on_a_loop_device_is_not_the_disk(tmp_path: Path) -> None:
    support.needs("loop")
    image = ploop1(tmp_path / "disk")
    with support.loop_device(image):
        report = as_json(image)
        assert report["size"] == 8 * MIB and report["device"]["size"] == 3 * MIB
        assert any("not of the disk in it" in n for n in report["notes"])


@pytest.mark.root
def test_without_privileges(public: Path) -> None:
    """What sysfs tells anybody, and why the rest is not known."""
    support.needs("loop")
    nobody = support.as_nobody()
    image = raw(public / "disk")
    image.chmod(0o644)
    with support.loop_device(image) as device:
        for path in (device, image):
            report = as_json(path, prefix=nobody)
            assert report["size"] == 8 * MIB
            assert report["device"]["backing_file"] == str(image)
            assert report["tracker"]["name"] is None
            assert "Permission denied" in report["tracker"]["why"]
            assert "Permission denied" in info(path, prefix=nobody).stdout
    assert as_json(image, prefix=nobody)["tracker"]["name"] == "scan"
    image.chmod(0o600)
    fails(2, "Permission denied", image, prefix=nobody)


@pytest.mark.root
def test_mounted_in_another_namespace(tmp_path: Path) -> None:
    """Not an error here: the note says what a copy would need."""
    support.needs("loop", "mkfs.ext4", "unshare")
    image = raw(tmp_path / "disk", 16 * MIB)
    support.run("mkfs.ext4", "-q", "-F", image)
    (tmp_path / "mnt").mkdir()
    with support.loop_device(image) as device:
        script = f"mount {device} {tmp_path}/mnt && echo ready && read x"
        other = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with other:
            assert other.stdout and other.stdout.readline() == "ready\n"
            report = as_json(device)
            assert other.stdin
            other.stdin.write("\n")
            other.stdin.close()
    assert report["mounts"] == [] and report["size"] == 16 * MIB
    assert any("another mount namespace" in n for n in report["notes"])


@pytest.mark.root
def test_who_uses_a_device_is_told_as_a_copy_would(tmp_path: Path) -> None:
    support.needs("loop", "mkfs.ext4")
    image = raw(tmp_path / "disk", 16 * MIB)
    support.run("mkfs.ext4", "-q", "-F", image)
    with support.loop_device(image) as device, support.loop_device(image) as other:
        with support.mounted(other, tmp_path / "mnt") as point:
            (user,) = as_json(device)["users"]
            assert (user["device"], user["state"]) == (other, "unknown")
            assert str(point) in user["what"] and f"copy {other}" in user["advice"]
            assert f"used by:      {other} is mounted at {point}" in info(device).stdout
            (user,) = as_json(other)["users"]
            assert (user["device"], user["state"], user["advice"]) == (other, "frozen", None)
            assert "used by" not in info(other).stdout
        with image.open("r+b"):
            (user,) = as_json(device)["users"]
            assert user["device"].startswith(f"process {os.getpid()} (")
        assert as_json(device)["users"] == []
