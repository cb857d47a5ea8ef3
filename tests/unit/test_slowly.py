# SPDX-License-Identifier: Apache-2.0
"""`tests/lab/slowly.py` knows every constant that is a time."""

from __future__ import annotations

import ast
import subprocess
import sys

from lab import slowly
from support import ROOT, pyploop_env

PACKAGE = ROOT / "pyploop"


def constants() -> set[tuple[str, str]]:
    """(module, name) of what a module calls by capitals and computes from a float."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AnnAssign):
                targets = [node.target]
            else:
                continue
            value = node.value
            if not isinstance(value, ast.Constant | ast.BinOp):
                continue
            if any(isinstance(n, ast.Constant) and type(n.value) is float for n in ast.walk(value)):
                found |= {(module, t.id) for t in targets if isinstance(t, ast.Name)}
    return found


def named(table: dict[str, str]) -> set[tuple[str, str]]:
    return {(module, name) for module, names in table.items() for name in names.split()}


def test_every_time_of_the_product_is_in_one_of_the_tables() -> None:
    longer, as_it_is = named(slowly.LONGER), named(slowly.AS_IT_IS)
    assert len(longer) > 30 and not longer & as_it_is
    assert constants() == longer | as_it_is


def test_a_slow_machine_has_longer_deadlines_wherever_they_are_used() -> None:
    """Also those that were imported by their names."""
    code = """\
import pyploop.freeze.vzctl as vzctl, pyploop.undo.ledger as ledger
from pyploop.migration import deadlines
before = deadlines.REQUEST, deadlines.RETRY, ledger.UNDO_TIMEOUT
from lab import slowly
slowly.slow_down(3.0)
after = deadlines.REQUEST, deadlines.RETRY, ledger.UNDO_TIMEOUT
assert after == (3 * before[0], before[1], 3 * before[2]), (before, after)
assert vzctl.UNDO_TIMEOUT == ledger.UNDO_TIMEOUT
"""
    env = pyploop_env({"PYTHONPATH": str(ROOT / "tests")})
    subprocess.run([sys.executable, "-c", code], env=env, timeout=60, check=True)
