# SPDX-License-Identifier: Apache-2.0
"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import ROOT

TESTS = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
NAMED = re.compile(r"(?:(?P<folder>\w+)/)?(?P<file>test_\w+\.py)(?:::(?P<test>test_\w+))?")


def is_there(folder: str | None, file: str, test: str | None) -> bool:
    for path, text in TESTS.items():
        if path.name == file and folder in (None, path.parent.name):
            return test is None or f"def {test}(" in text
    return False


@pytest.mark.parametrize("page", ["safety.md", "trust.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    found = [m.groups() for m in NAMED.finditer(text)]
    assert len(found) > 50, "the page names tests"
    assert not [name for name in found if not is_there(*name)]
    functions = set(re.findall(r"\btest_\w+\b(?!\.py)", text))
    defined = {name for t in TESTS.values() for name in re.findall(r"def (test_\w+)\(", t)}
    assert functions <= defined, functions - defined


def test_every_link_between_the_documents_leads_somewhere() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_the_readme_leads_to_every_page() -> None:
    """Directly, or by a page that it leads to."""
    reached: set[Path] = set()
    to_read = [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text()):
            found = (page.parent / target).resolve()
            if found not in reached and found.exists():
                reached.add(found)
                to_read.append(found)
    assert {p.resolve() for p in (ROOT / "docs").glob("*.md")} <= reached
