# SPDX-License-Identifier: Apache-2.0
"""The manual pages and completions that a build makes (man/generate.py)."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import ROOT, needs, pyploop_cmd, pyploop_env, run

from pyploop.cli.main import COMMANDS

EXAMPLE = re.compile(r"^\.EX\n(.*?)^\.EE$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("module:shtab", "module:argparse_manpage")
    folder = tmp_path_factory.mktemp("manual")
    run(sys.executable, ROOT / "man/generate.py", folder)
    return folder / "share"


def plain(text: str) -> str:
    """What roff shows of a line."""
    text = re.sub(r"\\f[BIR]|\\,|\\/|\\&", "", text)
    return text.replace("\\-", "-").replace("\\(dq", '"').replace("\\e", "\\")


def page_of(name: str) -> str:
    """The text of the document with this name."""
    (found,) = (ROOT / "docs").rglob(name)
    return found.read_text()


def helped(command: str) -> str:
    return run(*pyploop_cmd(), command, "--help", env=pyploop_env())


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_page_with_all_its_options_and_examples(
    made: Path, command: str
) -> None:
    page = (made / f"man/man1/pyploop-{command}.1").read_text()
    found = re.findall(r"^\.SH (.*)$", page, re.MULTILINE)
    assert found[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]
    assert {"EXAMPLES", "EXIT STATUS", "SEE ALSO"} <= set(found)
    options = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", helped(command))) - {"-h", "--help"}
    assert {o for o in options if o not in plain(page)} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_example_is_accepted_by_the_command(
    made: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (made / f"man/man1/pyploop-{command}.1").read_text()
    text = "\n".join(plain(example) for example in EXAMPLE.findall(page))
    calls = [shlex.split(x) for x in re.findall(r"(?<=pyploop )[a-z]+\b[^|\"\n]*", text)]
    assert calls and all(call[0] == command for call in calls)
    monkeypatch.syspath_prepend(ROOT / "man")
    import generate

    for call in calls:
        generate.parser_of(command).parse_args(call[1:])  # SystemExit for what is wrong


def test_the_overview_names_every_command(made: Path) -> None:
    page = plain((made / "man/man1/pyploop.1").read_text())
    assert [c for c in COMMANDS if f".BR pyploop-{c} (1)" not in page] == []


@pytest.mark.parametrize("command", ["copy", "migrate"])
def test_the_exit_statuses_of_the_manual_are_those_of_the_documents(
    made: Path, command: str
) -> None:
    page = (made / f"man/man1/pyploop-{command}.1").read_text()
    section = page.partition(".SH EXIT STATUS")[2].partition(".SH")[0]
    table = page_of("exit-codes.md").partition(f"## `pyploop {command}`")[2].partition("\n#")[0]
    documented = re.findall(r"(?<=\| )(\d+) (?=\|)", table)
    assert sorted(re.findall(r"^\.B (\d+)$", section, re.MULTILINE)) == sorted(documented)


def test_the_manual_has_every_key_of_migrate_toml() -> None:
    page = plain((ROOT / "man/migrate.toml.5").read_text())
    rows = re.findall(r"^\| (`.*?) \|", page_of("migrate-toml.md"), re.MULTILINE)
    keys = {k for row in rows for k in re.findall(r"`(\w+)`", row)}
    assert {"state_dir", "external", "seccomp", "vz_parameters"} <= keys
    shown = set(re.findall(r"\w+", "\n".join(re.findall(r"^\.BR? (.*)$", page, re.MULTILINE))))
    assert keys <= shown, keys - shown


def test_the_example_of_migrate_toml_is_a_configuration(tmp_path: Path) -> None:
    page = (ROOT / "man/migrate.toml.5").read_text()
    text = "\n".join(plain(x) for x in EXAMPLE.findall(page))
    assert set(tomllib.loads(text)["container"]) == {"web", "box"}
    config = tmp_path / "migrate.toml"
    config.write_text(f'state_dir = "{tmp_path}/state"\nlock_dir = "{tmp_path}/lock"\n{text}')
    for folder in (tmp_path, config):
        folder.chmod(0o700 if folder.is_dir() else 0o600)
    command = [*pyploop_cmd(), "migrate", "--recover", "--config", str(config)]
    done = subprocess.run(command, env=pyploop_env(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_pages_are_clean_roff(made: Path) -> None:
    needs("man", "groff")
    pages = sorted(made.glob("man/man*/*"))
    assert len(pages) > len(COMMANDS)
    for page in pages:
        words = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(page)]
        done = subprocess.run(
            words,
            env={**pyploop_env(), "MANWIDTH": "80"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), page.name


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["pyploop", "mi"], ["migrate"]),
        (["pyploop", "copy", "--on-dead"], ["--on-deadline"]),
        (["pyploop", "copy", "--tracker", ""], ["auto", "bpf", "ploop", "dm", "scan"]),
        (["pyploop", "migrate", "--keep"], ["--keep-dst"]),
    ],
)
def test_bash_completes_commands_options_and_choices(
    made: Path, words: list[str], some: list[str]
) -> None:
    script = made / "bash-completion/completions/pyploop"
    quoted = " ".join(map(shlex.quote, words))
    code = (
        f"source {shlex.quote(str(script))}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
        "[[ $(complete -p pyploop) =~ -F\\ ([a-z_]+) ]] && ${BASH_REMATCH[1]}; "
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    assert run("bash", "-c", code).split() == some


def test_the_same_time_makes_the_same_files(made: Path, tmp_path: Path) -> None:
    for zone in ("UTC", "Pacific/Apia"):
        env = pyploop_env({"SOURCE_DATE_EPOCH": "1764500000", "TZ": zone})
        run(sys.executable, ROOT / "man/generate.py", tmp_path / zone, env=env)
    files = sorted(p.relative_to(made.parent) for p in made.rglob("*") if p.is_file())
    assert len(files) == len(COMMANDS) + 5
    for name in files:
        one, other = (tmp_path / z / name for z in ("UTC", "Pacific/Apia"))
        assert one.read_bytes() == other.read_bytes()
