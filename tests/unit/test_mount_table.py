# SPDX-License-Identifier: Apache-2.0
"""What mountinfo shows, read from lines as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyploop.system import mount_table

TABLE = rb"""22 1 0:21 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / /m rw shared:1 - overlay overlay rw,lowerdir=/l,upperdir=%s,workdir=/w
31 22 8:1 /sub /m/deep\040er ro - ext4 /dev/sda1 ro,errors=remount-ro
a line of another format
"""


def table(folder: Path, upper: bytes = b"/u") -> list[mount_table.Entry]:
    (folder / "mountinfo").write_bytes(TABLE % upper)
    return mount_table.read(folder / "mountinfo")


@pytest.mark.parametrize("shown", [rb"\054", rb"\134\054"], ids=["new kernels", "old kernels"])
def test_the_upper_folder_of_an_overlay_is_found_with_a_comma_in_its_name(
    tmp_path: Path, shown: bytes
) -> None:
    upper = tmp_path / "a,b"
    upper.mkdir()
    root, overlay, _ = table(tmp_path, bytes(upper).replace(b",", shown))
    assert overlay.upper_folder() == str(upper)
    assert overlay.option("workdir") == "/w" and root.upper_folder() is None


def test_a_file_system_is_read_only_by_its_own_option_not_by_one_like_it(tmp_path: Path) -> None:
    root, overlay, deep = table(tmp_path)
    assert [e.read_only for e in (root, overlay, deep)] == [False, False, True]
    assert deep.option("errors") == "remount-ro" and deep.root == "/sub"


def test_the_longest_mount_point_holds_a_path_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = table(tmp_path)
    monkeypatch.setattr(mount_table, "read", lambda: entries)
    paths = ("/m/deep er/file", "/m/deeper", "/m", "/mm")
    found = [mount_table.holding_by_name(path) for path in paths]
    assert [e and e.point for e in found] == ["/m/deep er", "/m", "/m", "/"]
