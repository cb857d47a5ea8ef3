# SPDX-License-Identifier: Apache-2.0
"""JSON of another host, taken apart by its known keys and written anew.

A shape is a function of a value and of where it stands.  It returns what may be
passed on, made of nothing but what it knows, or raises MigrateError(15), which
names the place.  Nothing unknown is passed on: readers of JSON differ in what they
do with keys in another case, with two of the same, and with odd numbers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

from pyploop.errors import MigrateError, VzExitCode

Shape = Callable[[Any, str], Any]

LONGEST_PATH = 4096
"""With the NUL at its end (PATH_MAX)."""
_DIGITS = 20
"""Of the largest unsigned number of 64 bits."""


def refuse(where: str, why: str) -> NoReturn:
    raise MigrateError(VzExitCode.BAD_CONFIG, f"config.json: {where or 'it'} {why}")


def loads(data: bytes) -> Any:
    """JSON, as strictly as it is written down: UTF-8, no key twice in one object, no
    NaN, no number that does not fit 64 bits.  ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice!r} comes twice")
        return made

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is no number")

    def integer(text: str) -> int:
        if len(text) > _DIGITS:
            raise ValueError(f"the number {text[:24]}… is too large")
        return int(text)

    try:
        return json.loads(
            data.decode(), object_pairs_hook=once, parse_constant=constant, parse_int=integer
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def table(**known: Shape) -> Shape:
    """An object with these keys at most.  A null counts as absent, as in Go."""

    def shape(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            refuse(where, "must be an object")
        made = {}
        for key, inner in value.items():
            place = f"{where}.{key}".lstrip(".")
            if key not in known:
                refuse(place, "is not known here, and nothing that is not known is taken over")
            if inner is not None:
                made[key] = known[key](inner, place)
        return made

    return shape


def listing(item: Shape, most: int = 4096) -> Shape:
    def shape(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            refuse(where, f"must be a list of {most} at most")
        return [item(v, f"{where}[{n}]") for n, v in enumerate(value)]

    return shape


def number(low: int, high: int) -> Shape:
    def shape(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            refuse(where, f"must be a number from {low} to {high}, not {str(value)[:40]}")
        return value

    return shape


UINT32 = number(0, (1 << 32) - 1)
UINT64 = number(0, (1 << 64) - 1)
INT64 = number(-(1 << 63), (1 << 63) - 1)


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        refuse(where, "must be true or false")
    return value


def text(value: Any, where: str) -> str:
    """Any string that a C string and UTF-8 can hold."""
    if not isinstance(value, str) or "\0" in value or re.search("[\ud800-\udfff]", value):
        refuse(where, "must be a string, without a NUL")
    return value


def matching(pattern: str, what: str) -> Shape:
    form = re.compile(pattern)

    def shape(value: Any, where: str) -> str:
        if not form.fullmatch(text(value, where)):
            refuse(where, f"must be {what}, not {value[:80]!r}")
        return str(value)

    return shape


def one_of(*words: str) -> Shape:
    def shape(value: Any, where: str) -> str:
        if text(value, where) not in words:
            refuse(where, f"is {value[:80]!r}, which is not taken over")
        return str(value)

    return shape


def never(why: str) -> Shape:
    """Nothing but an empty value, which is dropped with what is null."""

    def shape(value: Any, where: str) -> Any:
        if value and not (isinstance(value, dict) and not any(value.values())):
            refuse(where, why)
        return type(value)()

    return shape


def path(value: Any, where: str) -> str:
    """An absolute path as the kernel would write it: no .., no . and no empty part."""
    if len(text(value, where)) >= LONGEST_PATH:
        refuse(where, f"has {len(value)} characters, more than the kernel takes")
    parts = value.split("/")
    if parts[0] or len(parts) < 2 or {".", ".."} & {*parts} or re.search(r"[\x00-\x1f]", value):
        refuse(where, f"must be an absolute path without . and .., not {value[:80]!r}")
    return "/" + "/".join(p for p in parts if p)


def mapping(value: Any, where: str) -> dict[str, str]:
    """An object of strings, with any keys."""
    if not isinstance(value, dict):
        refuse(where, "must be an object")
    return {text(k, where): text(v, f"{where}.{k}") for k, v in value.items()}
