# SPDX-License-Identifier: Apache-2.0
"""Every error message of the product, in one table: tests/golden/messages.txt.

The table is there to be read: it holds the text of each error that the source can raise, as
it is written there, with `{…}` for what is put in.  Write it anew after a change, and read
what has changed:

    python tests/unit/test_messages.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests/golden/messages.txt"

# What takes the text of an error: a class of errors, its `of` (and the errno's words follow),
# and functions that make an error of a text.
MAKES_AN_ERROR = re.compile(
    r"(Error|Unusable|Malformed|FreezeGivenUp|UnreadableValue)$"
    r"|^_?(bad|refuse|fail|failure|explain|newer|no_agent|unreachable|not_a_host|not_ours|still_written|saying|add_hint)$"
)
WIDTH = 118


def name_of(call: ast.Call) -> tuple[str, str]:
    """`OpenError` for `errors.OpenError(…)`; for `OpenError.of(…)` too, with `: {errno}`."""
    func, after = call.func, ""
    if isinstance(func, ast.Attribute) and func.attr == "of":
        func, after = func.value, ": {errno}"
    name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
    return name, after


def template(node: ast.expr) -> str | None:
    """The text that an expression makes; None: it is not written here."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            v.value if isinstance(v, ast.Constant) else "{" + inner(v) + "}"  # type: ignore[misc]
            for v in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        if left is None and right is None:
            return None
        return (left or "{" + inner(node.left) + "}") + (right or "{" + inner(node.right) + "}")
    if isinstance(node, ast.IfExp):
        body, other = template(node.body), template(node.orelse)
        return None if body is None and other is None else f"{body or '…'} | {other or '…'}"
    return None


def inner(node: ast.AST) -> str:
    """What stands for a value: the last name in it, or the texts it chooses from."""
    if isinstance(node, ast.FormattedValue):
        return inner(node.value)
    if isinstance(node, ast.IfExp) and (text := template(node)) is not None:
        return text
    if isinstance(node, ast.Call):
        return inner(node.args[0]) if node.args else inner(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    return "…"


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """(class or function, and text) of each message that is written in a module, in its order."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name, after = name_of(node)
        if name in ("ValueError", "OSError", "RuntimeError", "TimeoutError", "OverflowError"):
            continue  # no message of ours: a wrong call, or a reason that others report
        if not MAKES_AN_ERROR.search(name):
            continue
        if name == "MigrateError" and node.args:
            name = f"MigrateError {inner(node.args[0])}"  # its exit code
        for argument in node.args:
            text = template(argument)
            if text:
                yield name, text + after
        for keyword in node.keywords:
            if keyword.arg == "hint" and (text := template(keyword.value)):
                yield f"{name} hint", text


def table() -> str:
    lines = []
    for path in sorted((ROOT / "pyploop").rglob("*.py")):
        found = list(dict.fromkeys(messages(path)))
        if found:
            lines += ["", f"## {path.relative_to(ROOT)}"]
        lines += [f"{name}: {text}" for name, text in found]
    return "\n".join(lines[1:]) + "\n"


def test_the_table_has_every_error_message_as_it_is() -> None:
    assert TABLE.read_text() == table()


def test_no_message_ends_like_a_sentence_or_breaks_a_line() -> None:
    for line in table().splitlines():
        assert "\n" not in line and not line.endswith((" ", ","))


if __name__ == "__main__":
    TABLE.write_text(table())
