# SPDX-License-Identifier: Apache-2.0
"""What is believed of CRIU's tracking of memory, and of its statistics."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from lab import criu
from support import needs

from pyploop.runtimes.runc import memory_tracking

_FAKE = """#!/bin/sh
case $1 in
check) exit 0 ;;
pre-dump) while [ "$1" != -D ]; do shift; done
  [ {code} = 0 ] || {{ echo 'Error: no' >&2; exit {code}; }}
  head -c {first} /dev/zero >"$2/pages-1.img"
  case $2 in */2) head -c {second} /dev/zero >"$2/pages-1.img" ;; esac ;;
esac
"""


@pytest.mark.parametrize(
    ("first", "second", "code", "why"),
    [
        (9, 4, 0, ""),
        (9, 9, 0, "9 bytes, the first 9"),
        (0, 0, 0, "0 bytes, the first 0"),
        (9, 4, 1, "Error: no"),
    ],
)
def test_tracking_is_believed_only_when_a_second_pre_dump_holds_less(
    tmp_path: Path, first: int, second: int, code: int, why: str
) -> None:
    fake = tmp_path / "criu"
    fake.write_text(_FAKE.format(first=first, second=second, code=code))
    fake.chmod(0o755)
    said = memory_tracking.problem(str(fake))
    assert why in said and bool(why) == bool(said)


def test_without_a_criu_there_is_no_pre_dump() -> None:
    assert "No such file" in memory_tracking.problem("/nonexistent/criu")


def test_the_standstill_is_the_freezing_and_what_followed_in_seconds(tmp_path: Path) -> None:
    dump = bytes([1 << 3, 100, 2 << 3, 120, 3 << 3, 7])  # microseconds
    message = bytes([1 << 3 | 2, len(dump)]) + dump
    (tmp_path / "stats-dump").write_bytes(struct.pack("<III", 1, 2, len(message)) + message + b"\0")
    assert memory_tracking.frozen_seconds(tmp_path) == pytest.approx(220e-6)


def real() -> str:
    needs("root")
    program = criu.program()
    if program is None:
        needs("criu")
    return str(program)


def test_the_kernel_and_criu_agree_on_what_the_probe_says() -> None:
    """Soft-dirty bits are all that CRIU 4.2 tracks memory by."""
    data = bytearray(4096 * 2)
    address = ctypes.addressof(ctypes.c_char.from_buffer(data)) + 4096
    Path("/proc/self/clear_refs").write_text("4")
    data[4096] = 1
    with Path("/proc/self/pagemap").open("rb") as f:
        f.seek(address // 4096 * 8)
        dirty = int.from_bytes(f.read(8), "little") >> 55 & 1
    assert (memory_tracking.problem(real()) == "") == bool(dirty)


def test_criu_s_own_word_for_the_standstill_is_read(tmp_path: Path) -> None:
    program = real()
    images, work = tmp_path / "images", tmp_path / "work"
    images.mkdir()
    work.mkdir()
    with subprocess.Popen(
        [shutil.which("sleep") or "sleep", "60"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as sleeper:
        command = [program, "dump", "-t", str(sleeper.pid), "-D", str(images), "-W", str(work)]
        subprocess.run([*command, "--leave-running"], check=True, capture_output=True, timeout=60)
        sleeper.kill()
    seconds = memory_tracking.frozen_seconds(work)
    assert seconds is not None and 0 < seconds < 60
    stats = work / "stats-dump"
    whole = stats.read_bytes()
    length = int.from_bytes(whole[8:12], "little")
    for size in range(12 + length):
        stats.write_bytes(whole[:size])
        assert memory_tracking.frozen_seconds(work) is None, f"{size} of {12 + length} bytes"
    stats.write_bytes(whole[: 12 + length])
    assert memory_tracking.frozen_seconds(work) == seconds
    stats.unlink()
    assert memory_tracking.frozen_seconds(work) is None
