# SPDX-License-Identifier: Apache-2.0
"""`pyploop trust`: who may send running containers to this host."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from pyploop.cli import trust
from pyploop.errors import MigrateError
from pyploop.runtimes import config, trust_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir(mode=0o755)
    return tmp_path / "etc" / "migrate.toml"


def said(file: Path, *words: str) -> int:
    return trust.run([*words, "--config", str(file)], 3)


def test_a_source_is_added_once_and_removed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert said(file, "10.0.0.1", "--places", "/srv") == 0
    assert "root here" in capsys.readouterr().out
    host = config.load(str(file))
    assert (host.trusted_live, host.trusted_places) == (("10.0.0.1",), ("/srv",))
    assert file.stat().st_mode & 0o777 == 0o644
    assert said(file, "hosta", "--key") == 0
    assert said(file) == 0
    listed = capsys.readouterr().out
    assert "10.0.0.1 may send" in listed and "hosta (name of an ssh key) may send" in listed
    assert said(file, "--remove", "10.0.0.1") == said(file, "--remove", "hosta") == 0
    assert config.load(str(file)).trusted_live == ()
    assert said(file) == 0
    assert "No host is trusted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 'live = ["::1"]'),
        ("# mine\nmigrations = 3", 'live = ["::1"]'),
        ("[trust]\n[policy]\ncapabilities = []\n", 'live = ["::1"]'),
        ('[policy]\n[trust] # who\nlive = ["a"] # see [1]\n', 'live = ["a", "::1"] # see [1]'),
        ('[trust]\nplaces = ["/srv"]\n  live=[]\n', '  live = ["::1"]'),
    ],
)
def test_only_its_own_line_is_changed(file: Path, text: str, line: str) -> None:
    file.write_text(text)
    file.chmod(0o600)
    assert said(file, "::1") == 0
    made = file.read_text().splitlines()
    assert line in made
    kept = [one for one in text.splitlines() if "live" not in one]
    assert [one for one in made if one in kept] == kept
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    [
        'trust = { live = ["a"] }\n',
        'trust.live = ["a"]\n',
        '[trust]\nlive = [\n  "a", # the old one\n]\n',
        "[\"trust\"]\nlive = ['a']\n",
    ],
)
def test_a_file_that_one_line_cannot_change_stays_as_it_is(
    file: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    assert said(file, "10.0.0.1") == 1
    assert "stays as it is" in capsys.readouterr().err
    assert file.read_text() == text


def test_text_that_looks_like_the_key_is_not_changed() -> None:
    text = '[container.web]\nbundle = """\n[trust]\nlive = []\n"""\n'
    with pytest.raises(ValueError, match="one line"):
        trust_file.edited(text, "live", ["10.0.0.1"])
    assert tomllib.loads(text)


def test_a_file_that_others_can_write_to_is_not_changed(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("")
    file.chmod(0o666)
    assert said(file, "10.0.0.1") == 1
    assert "others can write to it" in capsys.readouterr().err
    assert file.read_text() == ""


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("hosta",), "not an address"),
        (("10.0.0.1", "--key"), "leave out --key"),
        (("10.0.0.0/33",), "not an address"),
        (("--places", "/srv"), "give SOURCE"),
        (("--remove", "10.0.0.1", "--places", "/srv"), "exclude each other"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    file: Path, words: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        said(file, *words)
    assert ended.value.code == 1
    assert why in capsys.readouterr().err
    assert not file.exists()


def test_a_place_must_be_an_absolute_path(file: Path) -> None:
    with pytest.raises(MigrateError, match="absolute paths"):
        trust_file.change(str(file), {"places": lambda old: ["srv"]})
    assert not file.exists()
