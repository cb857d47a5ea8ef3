# SPDX-License-Identifier: Apache-2.0
"""What the documents name is there, and what names the documents finds them."""

from __future__ import annotations

import filecmp
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import ROOT

DOCS = ROOT / "docs"
OTHERS = [ROOT / f"{n}.md" for n in ("README", "SECURITY", "CHANGELOG", "CONTRIBUTING")]
TESTS = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
NAMED = re.compile(r"(?:(?P<folder>\w+)/)?(?P<file>test_\w+\.py)(?:::(?P<test>test_\w+))?")
PAGE = re.compile(r"\bdocs/[\w/-]+\.md\b")
TOCTREE = re.compile(r"^```\{toctree\}\n(?::.*\n)*((?:.*\n)*?)```$", re.MULTILINE)
FENCED = re.compile(r"^( *)(`{3,}).*?^\1\2$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def prose(page: Path) -> str:
    """The page with its code blocks blanked, line by line."""
    return FENCED.sub(lambda m: "\n" * m[0].count("\n"), page.read_text())


def links(page: Path) -> list[str]:
    """Targets of the page's links to files, without anchors; what it includes, and
    the entries of its tables of contents, too."""
    text = page.read_text()
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCED.sub("", text))
    found += re.findall(r"^```\{include\} (\S+)$", text, re.MULTILINE)
    for block in TOCTREE.findall(text):
        found += [f"{entry}.md" for entry in block.split()]
    return found


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


def test_the_pictures_are_drawn_from_the_data_that_is_there(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(DOCS / "figures.py"), str(tmp_path)], check=True)
    drawn = sorted(p.name for p in tmp_path.glob("*.svg"))
    assert drawn == sorted(p.name for p in (DOCS / "figures").glob("*.svg"))
    _, differ, wrong = filecmp.cmpfiles(tmp_path, DOCS / "figures", drawn, shallow=False)
    assert not differ + wrong, "run: python docs/figures.py"


def test_the_picture_of_the_architecture_names_packages_that_exist() -> None:
    table = tomllib.loads((DOCS / "figures" / "architecture.toml").read_text())
    named = {box["package"] for box in table["box"] if "package" in box}
    assert len(named) > 5
    assert not [n for n in named if not (ROOT / "pyploop" / n.replace(".", "/")).is_dir()]


@pytest.mark.parametrize("folder", ["tutorial", "how-to", "reference", "internals", "."])
def test_lines_have_at_most_120_characters_but_for_tables_and_commands(folder: str) -> None:
    pages = list(OTHERS) if folder == "." else []
    pages += sorted((DOCS / folder).glob("*.md"))
    long = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in pages
        for number, line in enumerate(prose(page).splitlines(), 1)
        if len(line) > 120 and not line.startswith("|")
    ]
    assert not long


def test_the_readme_is_short_and_its_commands_are_one_line_each() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 90
    assert "tests/run" in lines, "what .ci/run calls"
    assert [line for line in lines if line.startswith("sh -c ") and line.endswith("pyploop demo'")]
