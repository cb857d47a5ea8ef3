# SPDX-License-Identifier: Apache-2.0
"""When a receiver answers, and what both ends say of what they chose."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from support import SUCCESS, d1_end, d1_frame, d1_sync, pyploop_cmd, pyploop_env, run

from pyploop import _core
from pyploop.diskcopy.receiver import receive
from pyploop.report.events import Reporter

HELLO, HELLO_REPLY = b"PYP\x01", b"PYPLOOP\x01"
FIRST, SECOND = b"a" * 4096, b"b" * 4096


@pytest.mark.invariant(number=2)
@pytest.mark.invariant(number=7)
def test_each_answer_comes_after_the_data_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "image"
    (in_r, in_w), (back_r, back_w) = os.pipe(), os.pipe()
    os.set_blocking(back_r, False)
    answered = b""
    at_each_sync = []

    def fdatasync(fd: int) -> None:
        nonlocal answered
        with contextlib.suppress(BlockingIOError):
            answered += os.read(back_r, 4096)
        at_each_sync.append((answered, os.pread(fd, 8192, 0), target.exists()))
        _core.fdatasync(fd)

    monkeypatch.setattr("pyploop.diskcopy.target_file.fdatasync", fdatasync)
    try:
        stream = d1_sync(HELLO) + d1_frame(0, FIRST) + d1_sync() + d1_frame(4096, SECOND)
        os.write(in_w, stream + d1_sync() + d1_end())
        receive(str(target), in_r, back_w, Reporter(), 20)
        answered += os.read(back_r, 4096)
    finally:
        for fd in (in_r, in_w, back_r, back_w):
            os.close(fd)
    assert at_each_sync == [
        (HELLO_REPLY, FIRST, False),
        (HELLO_REPLY + SUCCESS, FIRST + SECOND, False),
        (HELLO_REPLY + SUCCESS * 2, FIRST + SECOND, False),
    ]
    assert answered == HELLO_REPLY + SUCCESS * 3
    assert target.read_bytes() == FIRST + SECOND


@pytest.mark.invariant(number=8)
def test_what_was_chosen_is_in_the_log_and_in_the_summary(tmp_path: Path) -> None:
    source, target, events = (tmp_path / name for name in ("source", "target", "events"))
    source.write_bytes(FIRST)
    command = [*pyploop_cmd(), "-v4", "copy", "-s", source, "-d", target, "--json", events]
    log = run(*command, env=pyploop_env())
    records = map(json.loads, events.read_text().splitlines())
    (summary,) = (r for r in records if r["event"] == "summary")
    assert f"read by {summary['io_mode']}\n" in log
    assert f"Tracker: {summary['tracker']} (" in log
    assert f"Dialect: {summary['dialect']}\n" in log
    assert f"Hash code: {summary['hash_kernel']}\n" in log
