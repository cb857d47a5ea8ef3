# SPDX-License-Identifier: Apache-2.0
"""`pyploop sync` keeps the contract of vzfsync."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import support


def sync(*args: object) -> tuple[int, str]:
    done = subprocess.run(
        [*support.pyploop_cmd(), "sync", *map(str, args)],
        capture_output=True, text=True, env=support.pyploop_env(), timeout=30, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "how",
    [["-s"], ["--sync"], ["-d"], ["--datasync"], ["-n"], ["--dontneed"], ["-s", "-n"], ["-dn"],
     ["--datasync", "--dontneed"]],
)  # fmt: skip
def test_each_way_to_sync_succeeds(tmp_path: Path, how: list[str]) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert sync(*how, tmp_path / "a", tmp_path) == (0, "")


@pytest.mark.parametrize("args", [[], ["-s"], ["FILE"], ["-s", "-d", "FILE"], ["-x", "FILE"]])
def test_wrong_usage_ends_with_1(tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "a").touch()
    code, err = sync(*[tmp_path / "a" if a == "FILE" else a for a in args])
    assert code == 1
    assert err


def test_it_goes_on_after_a_file_that_fails_and_ends_with_2(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    code, err = sync("-s", tmp_path / "gone", tmp_path / "a", tmp_path / "gone too")
    assert code == 2
    assert [line.rsplit(": ", 1)[1] for line in err.splitlines()] == [
        "No such file or directory"
    ] * 2  # fmt: skip
