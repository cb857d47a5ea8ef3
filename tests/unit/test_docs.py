# SPDX-License-Identifier: Apache-2.0
"""What the documents name is there, and what names the documents finds them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support import ROOT

DOCS = ROOT / "docs"
OTHERS = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
TESTS = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
NAMED = re.compile(r"(?:(?P<folder>\w+)/)?(?P<file>test_\w+\.py)(?:::(?P<test>test_\w+))?")
PAGE = re.compile(r"\bdocs/[\w/-]+\.md\b")
FENCED = re.compile(r"^( *)(`{3,}).*?^\1\2$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def links(page: Path) -> list[str]:
    """Targets of the page's links to files, without anchors."""
    return re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCED.sub("", page.read_text()))


def is_there(folder: str | None, file: str, test: str | None) -> bool:
    for path, text in TESTS.items():
        if path.name == file and folder in (None, path.parent.name):
            return test is None or f"def {test}(" in text
    return False


@pytest.mark.parametrize("page", ["safety.md", "trust.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    text = (DOCS / "internals" / page).read_text()
    found = [m.groups() for m in NAMED.finditer(text)]
    assert len(found) > 50, "the page names tests"
    assert not [name for name in found if not is_there(*name)]
    functions = set(re.findall(r"\btest_\w+\b(?!\.py)", text))
    defined = {name for t in TESTS.values() for name in re.findall(r"def (test_\w+)\(", t)}
    assert functions <= defined, functions - defined


def test_every_link_between_the_documents_leads_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in [*OTHERS, *pages()]
        for target in links(page)
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


def test_every_page_that_a_file_of_the_repository_names_exists() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so its files are not known")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    missing = []
    for file in files:
        if file.is_symlink() or not file.is_file() or file.suffix in (".corpus", ".svg"):
            continue
        for name in PAGE.findall(file.read_text(errors="replace")):
            if not (ROOT / name).exists():
                missing.append(f"{file.relative_to(ROOT)}: {name}")
    assert not missing


def test_the_readme_leads_to_every_page() -> None:
    """Directly, or by a page that it leads to."""
    reached: set[Path] = set()
    to_read = [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        for target in links(page):
            found = (page.parent / target).resolve()
            if found.suffix == ".md" and found not in reached and found.exists():
                reached.add(found)
                to_read.append(found)
    assert {p.resolve() for p in pages()} <= reached
