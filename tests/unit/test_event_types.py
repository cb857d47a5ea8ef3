# SPDX-License-Identifier: Apache-2.0
"""The published schema of `--json` is that of the types, and what runs emit fits both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import support
from schema_check import check_lines

from pyploop.report import event_types, schema

FILE = Path(schema.__file__).with_name("events.schema.json")


def test_the_published_schema_is_made_from_the_types() -> None:
    assert FILE.read_text() == schema.text(), (
        f"make it anew: python -m pyploop.report.schema > {FILE.relative_to(support.ROOT)}"
    )


def test_the_schema_is_one() -> None:
    support.needs("module:jsonschema")
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(schema.of_events())


def test_every_event_stands_in_the_document() -> None:
    page = (support.ROOT / "docs/reference/events.md").read_text()
    for kind in event_types.IN_JSON:
        assert f"| `{kind.EVENT}` |" in page, kind


@pytest.mark.parametrize(
    "wrong",
    [
        {"event": "sending"},
        {"event": "sending", "image": 1, "size": 1, "clock": 1.0},
        {"event": "error", "message": None},
        {"event": "pre-dump", "works": "yes", "why": ""},
    ],
)
def test_a_line_that_does_not_fit_is_seen(wrong: dict[str, object]) -> None:
    line = json.dumps({"schema": "pyploop.events/1", "time": 0.5, **wrong})
    with pytest.raises((TypeError, AssertionError)):
        check_lines(line)


def test_what_a_sender_and_a_receiver_emit_fits(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(1 << 20))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [*support.pyploop_cmd(), "copy"]
        receiver = subprocess.Popen(
            [*command, "-d", tmp_path / "copy", "-i", str(theirs.fileno()), "--json"],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            text=True,
            env=support.pyploop_env(),
        )
        sent = support.run(
            *command, "-s", disk, "-o", ours.fileno(), "--json",
            pass_fds=[ours.fileno()], env=support.pyploop_env(),
        )  # fmt: skip
        received, _ = receiver.communicate(timeout=60)
    assert {"sending", "phase", "round", "frozen", "summary"} <= check_lines(sent)
    assert check_lines(received) == {"received"}


def test_what_a_failed_copy_emits_fits(tmp_path: Path) -> None:
    done = subprocess.run(
        [*support.pyploop_cmd(), "copy", "-s", tmp_path / "absent", "-d", tmp_path / "x", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=support.pyploop_env(),
    )
    assert done.returncode == 2
    assert check_lines(done.stdout) == {"error"}


def test_the_schema_is_printed_by_its_module() -> None:
    assert support.run(
        sys.executable, "-m", "pyploop.report.schema", env=support.pyploop_env()
    ) == (FILE.read_text())
