# SPDX-License-Identifier: Apache-2.0
"""Which module may know which: docs/design.md, read from the import statements."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pyploop"
OF_MIGRATE = ("migrate", "agent", "copying", "landing", "remote", "recover", "runtimes", "verdict")
WITHOUT_IO = (
    "wire.d1",
    "wire.d2",
    "wire.d3",
    "wire.messages",
    "wire.protobuf",
    "wire.criu",
    "policy",
    "rounds",
    "memory_rounds",
    "compat",
)
IO = {"io", "socket", "subprocess", "select", "selectors", "fcntl", "time", "threading"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


def exists(module: str) -> bool:
    path = PACKAGE.joinpath(*module.split("."))
    return any(path.with_suffix(s).exists() for s in (".py", ".pyi")) or path.is_dir()


def imports(path: Path) -> set[str]:
    """What a module imports, wherever in it: `.x` for pyploop.x, else the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix("pyploop.")
                ours = module.split(".")[0] == "pyploop"
                found.add(f"pyploop.{inner}" if ours and exists(inner) else module)
    return {
        f".{m.removeprefix('pyploop.')}" if m.startswith("pyploop.") else m.split(".")[0]
        for m in found
        if m not in ("pyploop", "__future__")
    }


GRAPH = {name_of(p): imports(p) for p in PACKAGE.rglob("*.py") if name_of(p)}


def ours(name: str) -> set[str]:
    return {m[1:] for m in GRAPH.get(name, set()) if m.startswith(".")}


def below(name: str, *parents: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in parents)


def all_of(name: str) -> set[str]:
    """What a module imports, and what that imports, and so on."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        for m in ours(todo.pop()) - seen:
            seen.add(m)
            todo.append(m)
    return seen


def test_the_imports_are_read_at_all() -> None:
    assert "_core" in ours("sender")
    assert "freeze.hold" in ours("sender")
    assert "time" in GRAPH["sender"]
    assert "kernel" in all_of("sender")


def test_no_module_imports_itself_by_others() -> None:
    assert [name for name in GRAPH if name in all_of(name)] == []


def test_only_kernel_knows_the_cffi_module() -> None:
    assert [name for name in GRAPH if "_kernel" in ours(name)] == ["kernel"]


def test_nothing_imports_the_command_line_but_itself() -> None:
    assert [
        name
        for name in GRAPH
        if not below(name, "cli") and any(below(m, "cli") for m in ours(name))
    ] == []


@pytest.mark.parametrize("name", ["sender", "receiver", "libploop", "cli.copy", "demo"])
def test_a_copy_knows_nothing_of_migrations(name: str) -> None:
    assert [m for m in all_of(name) if below(m, *OF_MIGRATE)] == []


def test_runtimes_do_not_know_who_drives_them() -> None:
    drivers = [d for d in OF_MIGRATE if d != "runtimes"]
    assert [
        (name, m)
        for name in GRAPH
        if below(name, "runtimes")
        for m in ours(name)
        if below(m, *drivers)
    ] == []


@pytest.mark.parametrize("name", WITHOUT_IO)
def test_what_decides_or_formats_does_no_io(name: str) -> None:
    assert GRAPH[name] & IO == set()
    tree = ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    }
    assert used <= {"strerror"}
