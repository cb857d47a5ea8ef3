# SPDX-License-Identifier: Apache-2.0
"""A step that takes long says what it waits for, and is not held up by saying it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import wait_until

from pyploop.report import slow_steps
from pyploop.report.events import NOTE, Reporter
from pyploop.report.slow_steps import SlowSteps
from pyploop.report.timeline import Recorder


class Lines:
    """A renderer that remembers, or hangs as a log on a frozen file system does."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []
        self.hangs: threading.Event | None = None

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        pass

    def line(self, level: int, at: float, text: str) -> None:
        self.found.append((level, text))
        if self.hangs is not None:
            self.hangs.wait(20)

    def error(self, at: float, text: str, hint: str | None) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Recorder, Reporter, Lines]]:
    monkeypatch.setattr(slow_steps, "LONG", 0.2)
    monkeypatch.setattr(slow_steps, "LOOK", 0.02)
    recorder, report, lines = Recorder(), Reporter(), Lines()
    report.add(lines)
    watching = SlowSteps(recorder, report, "/dev/x")
    try:
        yield recorder, report, lines
    finally:
        watching.close()
        assert not watching._thread.is_alive()


def test_a_long_step_is_named_once_also_while_lines_are_kept_back(
    watched: tuple[Recorder, Reporter, Lines],
) -> None:
    recorder, report, lines = watched
    with report.deferred(), recorder.step("source sync"):
        report.note("kept back")
        wait_until(lambda: lines.found, "it is said")
        time.sleep(0.3)
        ((level, text),) = lines.found
    assert level == NOTE
    assert text.startswith("/dev/x: waiting for the source to write back what is dirty")
    assert [t for _, t in lines.found[1:]] == ["kept back"]


def test_each_step_counts_by_itself(watched: tuple[Recorder, Reporter, Lines]) -> None:
    recorder, _, lines = watched
    for _ in range(3):
        with recorder.step("prove"):
            time.sleep(0.1)
    with recorder.step("first pass"):
        time.sleep(0.3)
    assert lines.found == []
    for _ in range(2):
        with recorder.step("freeze"):
            before = len(lines.found)
            wait_until(lambda n=before: len(lines.found) > n, "it is said")  # type: ignore[misc]
    assert len(lines.found) == 2


def test_a_log_that_hangs_holds_up_nothing(watched: tuple[Recorder, Reporter, Lines]) -> None:
    recorder, _, lines = watched
    lines.hangs = threading.Event()
    try:
        with recorder.step("freeze"):
            wait_until(lambda: lines.found, "it is said")
        with recorder.step("last blocks"):
            pass
        assert [s.name for s in recorder.spans] == ["freeze", "last blocks"]
    finally:
        lines.hangs.set()
