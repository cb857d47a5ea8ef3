# SPDX-License-Identifier: Apache-2.0
"""The mounts of a restored container are compared with those of its dump."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import needs

from pyploop.errors import MigrateError
from pyploop.runtimes.runc import restored_mounts
from pyploop.wire import criu

RO, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
RELATIME = 1 << 21


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def image(kind: str, *entries: bytes) -> bytes:
    head = struct.pack("<II", criu.COMMON, criu.MAGICS[kind])
    return head + b"".join(struct.pack("<I", len(e)) + e for e in entries)


def mount(number: int, parent: int, flags: int, point: str) -> bytes:
    fields = {criu.Mount.ID: number, criu.Mount.PARENT: parent, criu.Mount.FLAGS: flags}
    data = b"".join(bytes([key << 3]) + varint(value) for key, value in fields.items())
    name = point.encode()
    return data + bytes([criu.Mount.POINT << 3 | 2]) + varint(len(name)) + name


def dump(folder: Path, *mounts: bytes) -> None:
    """Of a container whose first process is in the mount namespace 7.  Another one is in 9."""
    ids = bytes([criu.NAMESPACES["mount"] << 3]) + varint(7)
    (folder / "ids-1.img").write_bytes(image("ids", ids))
    (folder / "mountpoints-7.img").write_bytes(image("mountpoints", *mounts))
    (folder / "mountpoints-9.img").write_bytes(image("mountpoints", mount(1, 0, RO, "./other")))


def test_the_dump_says_how_the_first_process_had_its_mounts(tmp_path: Path) -> None:
    dump(
        tmp_path,
        mount(5, 4, RO | NODEV | RELATIME, "./covered"),
        mount(4, 1, RELATIME, "./covered"),
        mount(1, 0, RELATIME, "./"),
        mount(2, 1, RO | RELATIME, "./usr/lib 64"),
        mount(3, 1, NOSUID | NODEV | NOEXEC, "/proc"),
    )
    assert restored_mounts.dumped(tmp_path) == {
        "/": 0,
        "/usr/lib 64": RO,
        "/proc": NOSUID | NODEV | NOEXEC,
        "/covered": RO | NODEV,
    }


def test_a_mount_may_be_restored_with_more_restrictions_only() -> None:
    wanted = {"/": 0, "/lib": RO, "/lib64": RO | NODEV, "/proc": NOSUID, "/gone": 0}
    there = {"/": RO, "/lib": RO, "/lib64": 0, "/proc": NOSUID | NOEXEC, "/new": 0}
    wrong = restored_mounts.lacking(wanted, there)
    assert wrong == {"/lib64": RO | NODEV, "/gone": -1}
    assert restored_mounts.described(wrong) == (
        "'/gone' (nothing is mounted on it), '/lib64' (it is not ro, nodev)"
    )


@pytest.fixture
def process(tmp_path: Path) -> Iterator[int]:
    """A process in a mount namespace of its own, with two mounts, of which the second is
    writable."""
    needs("root", "unshare")
    for name in ("one", "t w o"):
        (tmp_path / name).mkdir()
    script = (
        f"cd '{tmp_path}' && mount -t tmpfs -o ro,nosuid,nodev none one && "
        "mount -t tmpfs -o nosuid,noexec none 't w o' && echo && exec sleep 600"
    )
    unshare = shutil.which("unshare")
    assert unshare is not None
    argv = [unshare, "--mount", "--propagation=private", "sh", "-c", script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        if child.stdout.read(1) != b"\n":
            pytest.skip(f"no mount namespace: {child.stderr.read().decode()}")
        yield child.pid
        child.send_signal(signal.SIGKILL)


def test_a_mount_that_was_restored_writable_is_made_read_only(tmp_path: Path, process: int) -> None:
    ours, here = os.readlink("/proc/self/ns/mnt"), os.getcwd()
    one, two = f"{tmp_path}/one", f"{tmp_path}/t w o"
    dump(tmp_path, mount(2, 1, RO | NODEV, f".{one}"), mount(3, 1, RO | NOEXEC, f".{two}"))
    assert restored_mounts.mounted(process)[two] == NOSUID | NOEXEC
    restored_mounts.check(tmp_path, process)
    assert restored_mounts.mounted(process)[two] == RO | NOSUID | NOEXEC
    assert restored_mounts.mounted(process)[one] == RO | NOSUID | NODEV
    with pytest.raises(OSError, match="Read-only file system"):
        Path(f"/proc/{process}/root{two}/file").touch()
    assert (os.readlink("/proc/self/ns/mnt"), os.getcwd()) == (ours, here)


def test_a_container_without_one_of_its_mounts_is_not_restored(
    tmp_path: Path, process: int
) -> None:
    dump(tmp_path, mount(2, 1, RO, "./gone/too"))
    with pytest.raises(MigrateError, match=r"'/gone/too' \(nothing is mounted on it\)") as e:
        restored_mounts.check(tmp_path, process)
    assert e.value.exit_code == 7


def test_a_container_whose_mounts_cannot_be_seen_is_not_restored(tmp_path: Path) -> None:
    dump(tmp_path, mount(2, 1, RO, "./gone"))
    with pytest.raises(MigrateError, match="cannot compare the restored mounts") as e:
        restored_mounts.check(tmp_path, 0)
    assert e.value.exit_code == 7
