# SPDX-License-Identifier: Apache-2.0
"""A full images_dir amid a migration: it is reported as what it is, and undone."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from anypair import Pair, any_pair


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with any_pair(tmp_path) as made:
        yield made


@contextlib.contextmanager
def small(folder: Path) -> Iterator[None]:
    support.run("mount", "-t", "tmpfs", "-o", "size=4m", "none", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_a_target_without_room_for_the_images_says_so(pair: Pair) -> None:
    """The source reported a broken pipe, and nobody knew why."""
    (pair.a / "pages").write_bytes(os.urandom(16 << 20))
    with small(pair.b / "images"):
        done = pair.migrate(pair.a, "--live")
        assert done.returncode == 6
        assert "other: " in done.stderr
        assert "pages-1.img" in done.stderr
        assert "No space left on device" in done.stderr
        (pair.a / "pages").unlink()
        pair.runs_only_on(pair.a)
    # What is sent arrives where there is room for it.
    assert pair.migrate(pair.a, "--live").returncode == 0
    pair.runs_only_on(pair.b)
