# SPDX-License-Identifier: Apache-2.0
"""What the user is told of a container's tmpfs, and how it is packed for which target."""

from __future__ import annotations

import gzip
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import MIB

from pyploop.migration.source import tmpfs_images
from pyploop.migration.target import checks
from pyploop.runtimes.runc import tmpfs
from pyploop.system import helpers


@pytest.mark.parametrize(
    ("takes", "namespaces", "packing"),
    [
        (["memory", "tmpfs"], [{"type": "network"}], "plain"),
        (["memory", "tmpfs"], None, "plain"),
        (["memory"], [{"type": "network"}], "wrapped"),
        ([], None, "wrapped"),
        (["tmpfs"], [{"type": "network"}, {"type": "user"}], "wrapped"),
    ],
)
def test_only_a_target_that_can_read_it_gets_it_plain(
    takes: list[str], namespaces: list[dict[str, str]] | None, packing: str
) -> None:
    config: dict[str, Any] = {"linux": {"namespaces": namespaces}} if namespaces else {}
    assert tmpfs.packing(takes, tmpfs.has_own_users(config)) == packing


def test_the_target_takes_it_when_it_has_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert helpers.has_tar() and "tmpfs" in checks.capabilities()
    monkeypatch.setattr(helpers, "FOLDER", tmp_path)
    assert "tmpfs" not in checks.capabilities()


def test_criu_finds_the_program_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/a:/b")
    made = tmpfs.environment("wrapped")
    assert (made["PATH"], made["PYPLOOP_TMPFS"]) == (f"{helpers.FOLDER}:/a:/b", "wrapped")
    assert os.listdir(helpers.FOLDER) == ["tar"], "anything else there would be found, too"


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "a folder"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_the_size_of_each_tmpfs_is_known(mounted: Path) -> None:
    (mounted / "data").write_bytes(bytes(20 * MIB))
    (found,) = (t for t in tmpfs.used_by(os.getpid()) if t.point == str(mounted))
    assert 20 * MIB <= found.size < 21 * MIB
    assert tmpfs.in_words([found]) == [
        f"Moves while the container is suspended: tmpfs {mounted} (20.0 MiB)"
    ]
    assert tmpfs.in_words([tmpfs.Used("/dev", 4096)]) == []


@pytest.mark.root
def test_a_link_in_its_way_leads_nowhere(mounted: Path) -> None:
    """A container may swap a folder for a link to another tmpfs."""
    link = mounted.with_name("link")
    link.symlink_to(mounted)
    st = mounted.stat()
    dev = os.major(st.st_dev), os.minor(st.st_dev)
    with pytest.raises(OSError):
        tmpfs._size(f"{link}/.", link.parent, dev)
    assert tmpfs._size(str(link), link.parent, dev) == 0


def test_a_process_that_has_ended_has_none() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert tmpfs.used_by(ended.pid) == []


def test_the_images_say_how_they_were_packed(tmp_path: Path) -> None:
    plain = bytes(257) + b"ustar  \0" + bytes(247)
    wrapped = b"\x1f\x8b\x08" + bytes(5) + b"\x04\x03" + plain
    images = {"1": plain, "2": wrapped, "3": gzip.compress(plain), "4": b""}
    for name, data in images.items():
        (tmp_path / f"tmpfs-dev-{name}.tar.gz.img").write_bytes(data)
    (tmp_path / "pages-1.img").write_bytes(plain)
    packings = [one.packing for one in tmpfs_images.packed(tmp_path)]
    assert packings == ["plain", "wrapped", "compressed", "compressed"]
