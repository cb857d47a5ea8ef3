# SPDX-License-Identifier: Apache-2.0
"""The command line of `pyploop migrate`."""

from __future__ import annotations

import pytest

from pyploop.cli.migrate_options import NODEPS, parse
from pyploop.migration.source.request import Request


def test_vzmigrate_s_command_line_is_taken_as_it_is() -> None:
    o = parse(
        [
            "-r",
            "no",
            "-c",
            "-s",
            "--online",
            "-t",
            "-vv",
            "--ssh=-p22",
            "--keep-dst",
            "-f",
            "dst",
            "101",
        ]
    )
    assert (o.host, o.container) == ("dst", "101")
    assert o.live and o.times and o.keep_dst and not o.remove_area
    assert o.verbose == 2
    assert o.ssh == ("-p22",)
    assert o.nodeps == frozenset(NODEPS)


@pytest.mark.parametrize(
    ("given", "named"), [("--nodeps=cpu", {"cpu"}), ("--nodeps=cpu,ipv6", {"cpu", "ipv6"})]
)
def test_nodeps_takes_names_only_behind_an_equals_sign(given: str, named: set[str]) -> None:
    assert parse([given, "dst", "101"]).nodeps == named


def test_options_for_ssh_are_words_as_a_shell_splits_them() -> None:
    o = parse(["--ssh", "-o 'User=some one' -F /etc/x", "--ssh=-4", "h", "1"])
    assert o.ssh == ("-o", "User=some one", "-F", "/etc/x", "-4")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["dst"],
        ["-x", "dst", "1"],
        ["--nodeps=gpu", "dst", "1"],
        ["--nodeps=", "dst", "1"],
        ["--ssh='", "dst", "1"],
        ["--recover", "--live", "dst", "1"],
        ["--", "-oProxyCommand=true", "1"],
        ["-r", "maybe"],
        ["--pre-dumps", "21", "dst", "1"],
        ["--pre-dumps", "-1", "dst", "1"],
        ["--timeout", "0", "dst", "1"],
        ["--suspend-limit", "0.5", "dst", "1"],
        ["--suspend-limit", "-1", "dst", "1"],
        ["--rsync=--", "dst", "1"],
    ],
)
def test_a_wrong_command_line_exits_with_vzmigrate_s_code(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(args)
    assert end.value.code == 1
    assert "usage" in capsys.readouterr().err.lower()


def test_memory_is_copied_ahead_in_so_many_rounds_or_not_at_all() -> None:
    assert parse(["dst", "1"]).pre_dumps == 5
    assert parse(["--pre-dumps", "20", "dst", "1"]).pre_dumps == 20
    assert parse(["--no-pre-dump", "dst", "1"]).pre_dumps == 0


def test_a_container_is_suspended_for_a_minute_or_what_the_user_says() -> None:
    assert parse(["dst", "1"]).suspend_limit is None
    assert Request("dst", live=True).suspend_limit == 60
    assert parse(["--suspend-limit", "5", "dst", "1"]).suspend_limit == 5
    assert parse(["--suspend-limit", "0", "dst", "1"]).suspend_limit == 0


def test_recovering_needs_no_names() -> None:
    assert parse(["--recover"]).recover
