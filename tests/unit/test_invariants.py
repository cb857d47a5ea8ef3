# SPDX-License-Identifier: Apache-2.0
"""Which test shows which invariant: the markers of the tests against the table of
docs/internals/design.md.

    python tests/unit/test_invariants.py

prints the table as the page has it.  `pytest -m 'invariant(number=3)'` runs the tests of one.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "internals" / "design.md"
FEWEST = 3
"""Tests of each invariant."""
HEAD = "| | tests (below `tests/`) |\n| --- | --- |\n"


def numbers(test: ast.FunctionDef) -> list[int]:
    """Those of the invariants that a test is marked with.  ValueError: another form."""
    marks = [m for m in test.decorator_list if "mark.invariant" in ast.unparse(m)]
    found = []
    for mark in marks:
        match = re.fullmatch(r"pytest\.mark\.invariant\(number=(\d+)\)", ast.unparse(mark))
        if match is None:
            raise ValueError(f"{test.name}: write @pytest.mark.invariant(number=N)")
        found.append(int(match[1]))
    return found


def marked() -> dict[int, list[str]]:
    """Invariant -> its tests, as FILE::TEST."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in numbers(node):
                    name = f"{path.relative_to(TESTS)}::{node.name}"
                    found.setdefault(number, []).append(name)
    return found


def listed() -> list[int]:
    """The numbers of the page's list."""
    section = PAGE.read_text().split("\n## Invariants\n")[1].split("\n## ")[0]
    return [int(n) for n in re.findall(r"^(\d+)\. ", section, re.MULTILINE)]


def table() -> str:
    """The same tests, one row for each invariant; those of one file share its name."""
    rows = []
    for number, tests in sorted(marked().items()):
        files: dict[str, list[str]] = {}
        for test in tests:
            file, name = test.split("::")
            files.setdefault(file, []).append(f"`{name}`")
        cell = "; ".join(f"{file}: {', '.join(names)}" for file, names in files.items())
        rows.append(f"| {number} | {cell} |\n")
    return HEAD + "".join(rows)


def test_every_invariant_of_the_page_has_tests_that_show_it() -> None:
    found = marked()
    few = {number: found.get(number, []) for number in listed()}
    assert not {number: tests for number, tests in few.items() if len(tests) < FEWEST}


def test_every_marker_names_an_invariant_of_the_page() -> None:
    numbers = listed()
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) == 9
    assert not {n: tests for n, tests in marked().items() if n not in numbers}


def test_the_table_of_the_page_is_that_of_the_markers() -> None:
    assert table() in PAGE.read_text(), "print it: python tests/unit/test_invariants.py"


if __name__ == "__main__":
    print(table(), end="")
