# SPDX-License-Identifier: Apache-2.0
"""The reference has every key, option and code that the program has."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields

import pytest
from support import ROOT

import pyploop
from pyploop import errors
from pyploop.cli import main
from pyploop.runtimes import config
from pyploop.runtimes.policy import Policy

REFERENCE = ROOT / "docs" / "reference"
TOML = (REFERENCE / "migrate-toml.md").read_text()


def keys() -> list[str]:
    """Every key of migrate.toml, as its tables write it."""
    found = [*config._TOP, *config._CONTAINER, *config._DISK, *config.COMMANDS]
    for section, table in config._SECTIONS.items():
        found += [key if section == "remote" else f"{section}.{key}" for key in table]
    return found + ["live", "path"] + [f.name for f in fields(Policy)]


@pytest.mark.parametrize("key", keys())
def test_every_key_of_migrate_toml_has_a_row_in_the_reference(key: str) -> None:
    first_cells = re.findall(r"^\| ([^|]*) \|", TOML, re.MULTILINE)
    assert any(f"`{key}`" in cell for cell in first_cells)


def test_the_example_of_migrate_toml_is_one_that_pyploop_takes() -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```$", TOML, re.MULTILINE | re.DOTALL)
    host = config.parse(tomllib.loads(example), "migrate.toml")
    assert host.container("web").disks[0].mount == "/srv/web/rootfs"


def test_the_defaults_in_the_reference_are_those_of_the_program() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `?\"?([^|`\"]*)\"?`? \|", TOML, re.MULTILINE))
    host = config.HostConfig()
    said = {key: rows[key] for key in config._TOP}
    assert said == {key: str(getattr(host, key)).removesuffix(".0") for key in config._TOP}


def test_every_command_is_on_the_page_of_the_command_line() -> None:
    page = (REFERENCE / "cli.md").read_text()
    assert [c for c in main.COMMANDS if f":prog: pyploop {c}\n" not in page] == []


def test_every_exit_code_of_an_error_has_a_row() -> None:
    page = (REFERENCE / "exit-codes.md").read_text()
    rows = set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE))
    todo: list[type[BaseException]] = [errors.PyploopError]
    codes: set[str] = set()
    while todo:
        found = todo.pop()
        todo += found.__subclasses__()
        if isinstance(code := getattr(found, "exit_code", None), int):
            codes.add(str(int(code)))
    assert len(codes) > 10
    assert codes <= rows


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (REFERENCE / "api.md").read_text()
    shown = set(re.findall(r"^\.\. auto(?:function|class):: pyploop\.(\w+)$", page, re.MULTILINE))
    by_module = {n for n in pyploop.__all__ if hasattr(errors, n)} | {"events", "__version__"}
    assert shown | by_module == set(pyploop.__all__)
