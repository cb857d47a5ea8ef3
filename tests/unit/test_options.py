# SPDX-License-Identifier: Apache-2.0
"""An option that is given twice adds up or is refused: no value is dropped
without a word."""

from __future__ import annotations

import argparse
import importlib

import pytest

from pyploop.cli.arguments import Parser
from pyploop.cli.main import COMMANDS

AS_THE_C_TOOL = {"-o", "-i", "-f"}
"""Of these descriptors `ploop copy` takes the last."""
ADDS_UP = {
    "--mount",
    "--freeze",
    "-F",
    "--undo",
    "--nodeps",
    "--ssh",
    "--rsync",
    "--network",
    "--publish",
    "-v",
    "--read",
    "--write",
    "--places",
}
VALUES = ("1", "1M", "auto")


def parser_of(command: str) -> Parser:
    command = command.replace("-", "_")
    options = f"{command}_options"
    try:
        module = importlib.import_module(f"pyploop.cli.{options}")
    except ModuleNotFoundError:
        module = importlib.import_module(f"pyploop.cli.{command}")
    made: Parser = module.parser()
    return made


def words_of(action: argparse.Action) -> list[str]:
    """The option with a value that it takes."""
    option = action.option_strings[0]
    if action.nargs == 0:
        return [option]
    if action.choices is not None:
        return [option, str(next(iter(action.choices)))]
    for value in VALUES:
        try:
            if callable(action.type):
                action.type(value)
            return [option, value]
        except (argparse.ArgumentTypeError, ValueError):
            continue
    raise AssertionError(f"no value for {option}")


NO_VALUE = (argparse._StoreTrueAction, argparse._HelpAction, argparse.BooleanOptionalAction)


def single(command: str) -> list[list[str]]:
    """The options of a command that set one value."""
    return [
        words_of(a)
        for a in parser_of(command)._actions
        if (
            a.option_strings
            and not isinstance(a, NO_VALUE)
            and not {*AS_THE_C_TOOL, *ADDS_UP} & set(a.option_strings)
        )
        or (command == "migrate" and "-r" in a.option_strings)
    ]


CASES = [(command, words) for command in COMMANDS for words in single(command)]


def test_there_are_options_of_one_value_in_every_command_that_has_any() -> None:
    assert len(CASES) > 25
    assert {c for c, _ in CASES} == {
        "copy",
        "migrate",
        "agent",
        "bench",
        "demo",
        "status",
        "trust",
        "verify",
    }


@pytest.mark.parametrize(("command", "words"), CASES, ids=lambda x: " ".join([*x]) if x else "")
def test_an_option_of_one_value_is_refused_the_second_time(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    p = parser_of(command)
    with pytest.raises(SystemExit) as e:
        p.parse_args([*words, *words])
    assert e.value.code == p.exit_status
    assert f"{words[0]} is given twice" in capsys.readouterr().err


def test_the_same_parser_reads_two_command_lines() -> None:
    p = parser_of("copy")
    for name in ("a", "b"):
        assert p.parse_args(["-s", name]).source == name


def test_options_that_contradict_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser_of("migrate").parse_args(["--pre-dumps", "2", "--no-pre-dump", "host", "ct"])
    assert "--pre-dumps and --no-pre-dump exclude each other" in capsys.readouterr().err


def test_mount_points_and_stops_add_up() -> None:
    o = parser_of("copy").parse_args(["--mount", "a", "--mount=b", "-F", "x", "-F", "y"])
    assert o.mounts == ["a", "b"]
    assert [s.argument for s in o.stops] == ["x", "y"]


def test_of_descriptors_the_last_one_counts_as_in_the_c_tool() -> None:
    o = parser_of("copy").parse_args(
        ["-o", "3", "-o", "4", "-i", "5", "-i", "6", "-f", "7", "-f", "8"]
    )
    assert (o.out, o.inp, o.feedback) == (4, 6, 8)
