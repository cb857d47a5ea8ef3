# SPDX-License-Identifier: Apache-2.0
"""Which package may import which: the table of docs/internals/design.md, read from the
import statements.

    python tests/unit/test_layers.py

prints the floors, the number of imports between packages, and those that run back up.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pyploop"

FLOORS = (
    ("errors", "units", "_core", "_kernel", "_kernel_build"),
    ("wire",),
    ("report",),
    ("system",),
    ("undo",),
    ("freeze", "usage"),
    ("disks",),
    ("trackers",),
    ("diskcopy",),
    ("runtimes",),
    ("runtimes.oci",),
    ("runtimes.runc", "runtimes.vzctl"),
    ("runtimes.podman",),
    ("runtimes.registry",),
    ("transport",),
    ("migration",),
    ("migration.target",),
    ("migration.source",),
    ("api",),
    ("bench", "copyagent"),
    ("libploop", "cli"),
)
"""From the ground up.  A package, or a module of its own, imports only what is below
its floor, or is in itself.  The longest name that fits counts."""

PURE = (
    "wire.d1",
    "wire.d2",
    "wire.d3",
    "wire.messages",
    "wire.protobuf",
    "wire.criu",
    "freeze.deadline",
    "runtimes.policy",
    "runtimes.lazy_policy",
    "diskcopy.freeze_policy",
    "bench.forecast",
    "migration.memory_policy",
    "migration.source.suspend_forecast",
    "diskcopy.framing",
)
"""These decide or format.  They do no I/O and have no clock."""
IO = {"io", "socket", "subprocess", "select", "selectors", "fcntl", "time", "threading"}

STANDALONE = (
    *("undo.watchdog", "migration.relay", "system.enclosure"),
    *("runtimes.runc.criu_gate", "runtimes.podman.criu_stub", "runtimes.podman.interpose"),
)
"""These are started by their paths with `python -I -S`, without the package."""


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
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def ours(name: str) -> set[str]:
    return {m[1:] for m in GRAPH.get(name, set()) if m.startswith(".")}


def room_of(name: str) -> str | None:
    """The row of the table that a module belongs to."""
    parts = name.split(".")
    return next((r for n in range(len(parts), 0, -1) if (r := ".".join(parts[:n])) in ROOMS), None)


def crossings() -> list[tuple[str, str]]:
    """Imports between rooms."""
    return [(n, m) for n in sorted(GRAPH) for m in sorted(ours(n)) if room_of(n) != room_of(m)]


def back_up() -> list[tuple[str, str]]:
    """Those to the same floor, or to one above."""
    return [(n, m) for n, m in crossings() if ROOMS[room_of(n) or ""] <= ROOMS[room_of(m) or ""]]


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
    assert "_core" in ours("diskcopy.precopy")
    assert "freeze.session" in ours("diskcopy.freeze_stage")
    assert "time" in GRAPH["diskcopy.precopy"]
    assert "system.kernel" in all_of("diskcopy.sender")
    assert len(crossings()) > 300


def test_every_module_and_package_has_a_floor() -> None:
    assert [n for n in GRAPH if room_of(n) is None] == []
    packages = {name_of(p.parent / "x.py").removesuffix(".x") for p in PACKAGE.rglob("__init__.py")}
    assert packages - {"x"} <= set(ROOMS)


def test_every_row_of_the_table_is_there() -> None:
    assert [room for room in ROOMS if not exists(room)] == []


def test_no_import_runs_back_up() -> None:
    assert back_up() == []


def test_no_module_imports_itself_by_others() -> None:
    assert [name for name in GRAPH if name in all_of(name)] == []


def test_every_package_says_what_belongs_in_it() -> None:
    missing = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("__init__.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert missing == []


def test_libploop_needs_nothing_but_the_api() -> None:
    needed = {name for name in ours("libploop") if not name.startswith("api.")}
    assert needed == {"errors", "system.own_path"}


def test_the_commands_start_no_copy_or_migration_by_another_way_than_the_api() -> None:
    """What runs by itself on the target (agent), and what undoes (thaw), is no copy."""
    engines = {"diskcopy.sender", "diskcopy.receiver", "disks.opening", "trackers.registry"}
    found = {n for n in GRAPH if n.startswith("cli.") and ours(n) & engines}
    found |= {n for n in GRAPH if n.startswith("cli.") and "migration.source" in str(ours(n))}
    assert found == set()


def test_only_one_module_knows_the_cffi_module() -> None:
    assert [name for name in GRAPH if "_kernel" in ours(name)] == ["system.kernel"]


def test_only_their_own_packages_know_trackers_and_sources_by_name() -> None:
    asks = []
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("trackers", "disks"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute)):
                continue
            words = {c.value for c in node.comparators if isinstance(c, ast.Constant)}
            if node.left.attr in ("name", "kind") and words & {"bpf", "ploop", "dm", "scan"}:
                asks.append(f"{name_of(path)}:{node.lineno}")
    assert asks == []


@pytest.mark.parametrize("name", PURE)
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


@pytest.mark.parametrize("name", STANDALONE)
def test_what_runs_by_its_path_imports_nothing_of_ours(name: str) -> None:
    assert ours(name) == set()
    assert GRAPH[name] <= set(sys.stdlib_module_names)


if __name__ == "__main__":
    for floor, rooms in reversed(list(enumerate(FLOORS))):
        print(f"{floor:3d}  {'  '.join(rooms)}")
    sys.stdout.flush()
    print(f"{len(GRAPH)} modules, {len(crossings())} imports between rooms")
    print(f"{len(back_up())} run back up", *back_up(), sep="\n")
