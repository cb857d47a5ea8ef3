# SPDX-License-Identifier: Apache-2.0
"""What pyploop is made of, and what CI installs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import missing

ROOT = Path(__file__).resolve().parents[2]


def bill() -> dict[str, Any]:
    words = [sys.executable, str(ROOT / ".ci/sbom.py")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    return dict(json.loads(done.stdout))


def test_the_bill_of_materials_names_everything_that_is_needed_with_its_version() -> None:
    made = bill()
    assert (made["bomFormat"], made["specVersion"], made["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", made["serialNumber"])
    top = made["metadata"]["component"]
    assert (top["name"], top["type"], top["purl"]) == (
        *("pyploop", "application"),
        f"pkg:pypi/pyploop@{version('pyploop')}",
    )
    parts = {c["bom-ref"]: c for c in made["components"]}
    for name in ("cffi", "pycparser"):
        assert parts[f"pkg:pypi/{name}@{version(name)}"]["version"] == version(name)
    names = {c["name"] for c in made["components"]}
    assert {"libxxhash-dev", "libzstd1", "openssh-client", "rsync", "runc", "criu"} <= names
    assert not {"pytest", "mypy", "numpy", "rich"} & names
    refs = {top["bom-ref"], *parts}
    assert len(refs) == len(made["components"]) + 1
    assert all({d["ref"], *d["dependsOn"]} <= refs for d in made["dependencies"])
    assert bill() == made  # the same again


def locked() -> dict[str, list[str]]:
    """Name==version -> hashes."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / ".ci/requirements.txt").read_text().splitlines():
        if m := re.match(r"([a-z0-9-]+)==(\S+) \\$", line):
            found[m[1]] = hashes = []
        elif m := re.match(r" +--hash=sha256:([0-9a-f]{64})( \\)?$", line):
            hashes.append(m[1])
        else:
            assert not line or line.lstrip().startswith("#"), line
    return found


def test_what_ci_installs_is_pinned_by_hash_and_complete() -> None:
    lock = locked()
    assert all(lock.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = list(project["build-system"]["requires"]) + list(project["project"]["dependencies"])
    for name, more in project["project"]["optional-dependencies"].items():
        wanted += more if name != "coverage" else []  # that is measured by hand
    names = {re.split(r"[<>=!~ \[;]", w)[0].lower() for w in wanted}
    assert names <= set(lock)


@pytest.mark.parametrize("script", ["run", "package", "deb", "pythons"])
def test_ci_installs_nothing_but_what_is_pinned(script: str) -> None:
    text = (ROOT / ".ci" / script).read_text()
    lines = [x.strip() for x in text.splitlines() if re.search(r"\bpip\" (install|wheel)", x)]
    assert lines
    for line in lines:
        assert "--require-hashes" in line or ("--no-deps" in line and "--no-index" in line)
    run = (ROOT / "tests/run").read_text()
    assert run.index("PYPLOOP_READY") < run.index('bin/pip" install')


def test_a_wheel_installs_the_manual_and_the_completions() -> None:
    found = distribution("pyploop")
    if found.read_text("direct_url.json") and "editable" in str(found.read_text("direct_url.json")):
        missing("pyploop is installed as a link to a checkout: install the wheel")
    names = {str(f).partition("/share/")[2] for f in found.files or [] if "/share/" in str(f)}
    assert {"man/man1/pyploop.1", "man/man1/pyploop-copy.1", "man/man5/migrate.toml.5"} <= names
    assert {
        "bash-completion/completions/pyploop",
        "zsh/site-functions/_pyploop",
        "fish/vendor_completions.d/pyploop.fish",
    } <= names


def test_a_package_holds_every_module_and_type_of_the_source() -> None:
    package = Path(str(find_spec("pyploop").origin)).parent  # type: ignore[union-attr]
    wanted = {
        p.relative_to(ROOT)
        for p in (ROOT / "pyploop").rglob("*")
        if p.suffix in (".py", ".pyi", ".pyx", ".pxd", ".pxi", ".json") or p.name == "py.typed"
    }
    assert [p for p in wanted if not (package.parent / p).exists()] == []


def test_every_place_that_names_the_version_names_the_same() -> None:
    ours = version("pyploop")
    debian = (ROOT / "debian/changelog").read_text()
    assert debian.startswith(f"pyploop ({ours.replace('.dev', '~dev')}) ")
    headings = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ours.partition(".dev")[0]
