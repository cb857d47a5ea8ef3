# SPDX-License-Identifier: Apache-2.0
"""What became of disturbed migrations, as the Markdown tables of docs/internals/testing.md:
printed at the end of the run (tests/conftest.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ALL = bool(os.environ.get("PYPLOOP_MATRIX"))
"""Every cell, not only the ordinary ones."""
LOG = os.environ.get("PYPLOOP_MATRIX_LOG")
"""File that gets the tables too."""

ORDER = ("fails", "done, but fails", "hangs", "killed")
"""Columns that come first."""
_tables: dict[str, dict[str, dict[str, str]]] = {}


def note(table: str, row: str, column: str, ended: str) -> None:
    """One cell."""
    _tables.setdefault(table, {}).setdefault(row, {})[column] = ended


def tell(reporter: pytest.TerminalReporter) -> None:
    """On the terminal and into the file, if there is something and it was asked for."""
    text = markdown()
    if ALL and text:
        reporter.section("disturbed migrations")
        reporter.write(text)
    if LOG is not None and text:
        Path(LOG).write_text(text)


def markdown() -> str:
    """All tables; a cell that was not run is empty."""
    text = ""
    for name, rows in _tables.items():
        seen = dict.fromkeys(c for row in rows.values() for c in row)
        columns = [*(c for c in ORDER if c in seen), *(c for c in seen if c not in ORDER)]
        lines = [[name, *columns], ["---"] * (len(columns) + 1)]
        lines += [[row, *(cells.get(c, "") for c in columns)] for row, cells in rows.items()]
        text += "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    return text
