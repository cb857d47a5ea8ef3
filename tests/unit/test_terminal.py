# SPDX-License-Identifier: Apache-2.0
"""Nothing that comes from a peer, a name or a command acts on the terminal that
shows it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import pyploop_env

from pyploop.errors import MigrateError, one_line
from pyploop.report.events import JsonRenderer, Reporter, TextRenderer
from pyploop.undo import journal

HOSTILE = {
    "escape": "\x1b]0;title\x07",
    "newline": "\nforged line",
    "C1 CSI": "\x9b31m",
    "C1 next line": "\x85forged",
    "bidi override": "\u202ecod.exe",
    "bidi isolate": "\u2066x\u2069",
    "marks": "\u200e\u200f\u061c",
    "separators": "\u2028\u2029",
    "not UTF-8": "\udcff\udc9b",
    "not seen": "\u200b\u2060\ufeff\u00ad",
    "tags": "\U000e0041",
    "delete": "\x7f",
}


each = pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())


def harmless(text: str) -> bool:
    return text.removesuffix("\n").isprintable()


@each
def test_every_text_that_is_told_is_escaped(hostile: str) -> None:
    assert harmless(one_line(hostile))
    assert one_line(hostile) == "".join(c if c.isprintable() else ascii(c)[1:-1] for c in hostile)
    assert harmless(str(MigrateError(6, f"b: {hostile}")))
    out, errors, ndjson = io.StringIO(), io.StringIO(), io.StringIO()
    report = Reporter()
    report.add(TextRenderer(9, out, errors))
    report.add(JsonRenderer(ndjson))
    report.event("sending", image=f"/vz/{hostile}")
    report.error(hostile)
    report.note(hostile)
    lines = (out.getvalue() + errors.getvalue()).split("\n")
    assert len(lines) == 4
    assert all(harmless(line) for line in lines)
    assert all(line.isascii() and harmless(line) for line in ndjson.getvalue().splitlines())
    assert json.loads(ndjson.getvalue().splitlines()[0])["image"] == f"/vz/{hostile}"


def test_ordinary_text_of_any_language_stays_as_it_is() -> None:
    for text in ("Größe: 5 MiB", "容器 101", "контейнер", "a\\x1b", "e\u0301"):
        assert one_line(text) == text


@each
def test_info_shows_no_name_as_it_is(hostile: str, tmp_path: Path) -> None:
    name = (tmp_path / f"x{hostile}").with_suffix(".img")
    name.write_bytes(bytes(1 << 20))
    done = subprocess.run(
        [sys.executable, "-m", "pyploop.cli.main", "info", name],
        env=pyploop_env(),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert all(harmless(line) for line in done.stdout.decode().split("\n"))
    assert one_line(str(name)) in done.stdout.decode()


@each
@pytest.mark.parametrize("words", [["--list"], ["--all"]])
def test_thaw_shows_no_journal_as_it_is(hostile: str, tmp_path: Path, words: list[str]) -> None:
    fields = {"schema": journal.SCHEMA, "what": f"copy of {hostile}", "boot": "x", "owners": []}
    entry = {"kind": "run", "what": f"run {hostile}", "error": hostile, "argv": []}
    tmp_path.chmod(0o700)
    record = {**fields, "started": 1, "entries": [entry]}
    (tmp_path / "1.json").write_text(json.dumps(record))
    done = subprocess.run(
        [sys.executable, "-m", "pyploop.cli.main", "thaw", *words],
        env={**pyploop_env(), journal.ENVIRONMENT: str(tmp_path)},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    text = (done.stdout + done.stderr).decode()
    assert all(harmless(line) for line in text.split("\n"))
    assert one_line(hostile) in text


@each
def test_a_wrong_option_is_not_shown_as_it_is(hostile: str) -> None:
    for words in (["thaw", f"--{hostile}"], ["sync", "-s", f"/none{hostile}"], [hostile]):
        done = subprocess.run(
            [sys.executable, "-m", "pyploop.cli.main", *map(os.fsencode, words)],
            env=pyploop_env(),
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert done.returncode in (1, 2, 4, 38)
        first = done.stderr.decode().split("\n")[0]
        assert harmless(first), first
        assert one_line(hostile).replace("\\", "") in first.replace("\\", "")
