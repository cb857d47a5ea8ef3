# SPDX-License-Identifier: Apache-2.0
"""Whether the fields of an event or a result of another host have the types of ours."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def checked(kind: type[Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Those of `fields`, as JSON has them, that the dataclass `kind` has.  Others are left
    out: a newer version may have more.  ValueError when one is missing or of another type."""
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name = field.name
        if name in fields:
            if not _is(fields[name], hints[name]):
                raise ValueError(f"{kind.__name__}.{name} is {fields[name]!r:.40}")
            found[name] = fields[name]
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{kind.__name__} without its field {name!r}")
    return found


def _is(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (bool, int, str, type(None)):
        return type(value) is hint
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, list) and all(_is(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(v, args[1]) for v in value.values())
    try:
        return isinstance(value, dict) and bool(checked(hint, value))
    except ValueError:
        return False
