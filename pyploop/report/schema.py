# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of `--json`, from the types of the events.

python -m pyploop.report.schema     prints it
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pyploop.report import event_types, results
from pyploop.report.events import SCHEMA

_SIMPLE: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    type(None): {"type": "null"},
    Any: {},
}


def of_events() -> dict[str, Any]:
    """The schema of one line.  A field or event that is not in it is allowed: a later
    version of the same number may have it."""
    docs = _descriptions()
    names = {c.EVENT: c for c in event_types.IN_JSON}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA.replace('/', ':')}",
        "title": "A line of `pyploop --json`.  Sizes are bytes, times are seconds.",
        "type": "object",
        "required": ["schema", "event", "time"],
        "properties": {
            "schema": {"const": SCHEMA},
            "event": {"type": "string"},
            "time": {"type": "number", "description": docs["Event", "time"]},
        },
        "allOf": [
            {
                "if": {"properties": {"event": {"const": name}}},
                "then": {"$ref": f"#/$defs/{kind.__name__}"},
            }
            for name, kind in names.items()
        ],
        "$defs": {
            kind.__name__: _object(kind, docs)
            for kind in (
                *names.values(),
                results.RoundFigures,
                event_types.MemoryRoundFigures,
            )
        },
    }


def _object(kind: type[Any], docs: dict[tuple[str, str], str]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    properties = {}
    required = []
    for f in dataclasses.fields(kind):
        if f.name == "time" and issubclass(kind, event_types.Event):
            continue
        owner = next(c.__name__ for c in kind.__mro__ if f.name in inspect.get_annotations(c))
        said = docs.get((owner, f.name))
        properties[f.name] = _of(hints[f.name]) | ({"description": said} if said else {})
        if f.default is dataclasses.MISSING:
            required.append(f.name)
    return {
        "description": inspect.cleandoc(kind.__doc__ or ""),
        "type": "object",
        "required": required,
        "properties": properties,
    }


def _of(hint: Any) -> dict[str, Any]:
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(a) for a in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        return {"type": "array", "items": _of(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(args[1])}
    return {"$ref": f"#/$defs/{hint.__name__}"}


def _descriptions() -> dict[tuple[str, str], str]:
    """(class, field) -> the docstring below the field."""
    found = {}
    for node in (*_tree(results), *_tree(event_types)):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                said = inspect.cleandoc(str(text.value.value))
                found[node.name, field.target.id] = " ".join(said.split())
    return found


def _tree(module: types.ModuleType) -> list[ast.stmt]:
    return ast.parse(inspect.getsource(module)).body


def text() -> str:
    """What `events.schema.json` holds."""
    return json.dumps(of_events(), indent=1) + "\n"


if __name__ == "__main__":
    print(text(), end="")
