# SPDX-License-Identifier: Apache-2.0
"""Stop specs and vzctl's words, without anything to stop."""

from __future__ import annotations

import pytest

from pyploop.cli.copy_options import parser
from pyploop.errors import CommandError
from pyploop.freeze.deadline import Limits
from pyploop.freeze.stoppers import Spec, parse_spec
from pyploop.freeze.vzctl import Status, explain, parse_status


@pytest.mark.parametrize(
    ("code", "words", "status"),
    [
        (3, "a system error", 12),
        (5, "not an OpenVZ kernel", 12),
        (9, "locked by another", 17),
        (16, "the checkpoint failed", 12),
        (17, "the restore failed", 12),
        (20, "a bad parameter", 12),
        (21, "a bad value", 12),
        (31, "is not running", 12),
        (32, "is running", 12),
        (40, "is not mounted", 12),
        (99, "see vzctl(8)", 12),
    ],
)
def test_each_exit_code_of_vzctl_has_words_and_a_status(code: int, words: str, status: int) -> None:
    error = explain("cannot suspend container 101", code)
    assert str(error).startswith("cannot suspend container 101: ")
    assert words in str(error) and f"(vzctl exited with {code})" in str(error)
    assert error.exit_code == status


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("CTID 101 exist mounted running\n", Status(True, True, False, True)),
        ("CTID 101 exist mounted running suspended", Status(True, True, True, True)),
        ("CTID 101 exist unmounted down suspended", Status(True, False, True, False)),
        ("CTID 101 deleted unmounted down\n", Status(False, False, False, False)),
    ],
)
def test_a_status_is_read(text: str, status: Status) -> None:
    assert parse_status(text, "101") == status


@pytest.mark.parametrize(
    "text",
    ["", "CTID", "CTID 101 exist mounted", "CTID 101 exist mounted running what",
     "VEID 101 exist mounted running", "CTID 101 exists mounted running", "\0\xff" * 999],
)  # fmt: skip
def test_what_is_no_status_is_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(CommandError, match="not with a status") as e:
        parse_status(text, "101")
    assert len(str(e.value)) < 500


@pytest.mark.parametrize(
    ("text", "kind", "argument"),
    [
        ("fs", "fs", ""),
        ("fs:/m:x", "fs", "/m:x"),
        ("cgroup:/a/b", "cgroup", "/a/b"),
        ("vzctl:101", "vzctl", "101"),
        ("cmd:a: b", "cmd", "a: b"),
    ],
)
def test_a_spec_is_a_kind_and_an_argument(text: str, kind: str, argument: str) -> None:
    spec = parse_spec(text)
    assert (spec.kind, spec.argument) == (kind, argument)


@pytest.mark.parametrize("text", ["", "fs:", "cgroup", "cmd:", "vz:1", "FS"])
def test_what_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a stop spec"):
        parse_spec(text)


def test_stops_keep_their_order_and_undo_belongs_to_the_one_before() -> None:
    line = ["--freeze", "cgroup:a", "-F", "old", "--undo", "x", "--freeze", "cmd:b", "--undo=-b"]
    stops = parser().parse_args(["-s", "d", *line, "-F", "new"]).stops
    assert [(s.kind, s.argument, s.undo) for s in stops] == [
        ("cgroup", "a", None), ("cmd", "old", "x"), ("cmd", "b", "-b"), ("cmd", "new", None),
    ]  # fmt: skip
    assert stops[-1].name == Spec("cmd", "").name
    for bad in (["--undo", "x"], ["--freeze", "cgroup:a", "--undo", "x"], ["--freeze", "x"]):
        with pytest.raises(SystemExit) as e:
            parser().parse_args(["-s", "d", *bad])
        assert e.value.code == 38


@pytest.mark.parametrize("hard", [0.2, 1.4, 3.0, 60.0, 600.0])
def test_this_process_gives_up_before_the_watchdog_and_that_before_the_limit(hard: float) -> None:
    limits = Limits.of(hard)
    assert 0.7 * hard < limits.own < limits.watchdog < limits.last < limits.hard == hard
