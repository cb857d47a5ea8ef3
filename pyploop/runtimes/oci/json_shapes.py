# SPDX-License-Identifier: Apache-2.0
"""JSON of another host: only known keys are taken from it, and it is written anew.

A shape is a function of a value and of its place in the file.  It returns a copy that has
only what the shape knows, or raises MigrateError(15), which names the place.  Nothing
unknown is passed on: readers of JSON differ in what they do with keys in another case,
with two equal keys, and with odd numbers.
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
"""Bytes, the NUL at the end included (PATH_MAX)."""
_DIGITS = 20
"""Digits of the largest unsigned number of 64 bits."""


def refuse(where: str, why: str) -> NoReturn:
    raise MigrateError(VzExitCode.BAD_CONFIG, f"config.json: {where or 'the file'} {why}")


def loads(data: bytes) -> Any:
    """Parse JSON strictly: UTF-8, no key twice in one object, no NaN, no number that does not
    fit 64 bits.  ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice!r} comes twice")
        return made

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a number")

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
    """An object with no other keys than these.  A null counts as absent, as in Go."""

    def shape(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            refuse(where, "must be an object")
        made = {}
        for key, inner in value.items():
            place = f"{where}.{key}".lstrip(".")
            if key not in known:
                refuse(place, "is not known to this pyploop, and unknown keys are not accepted")
            if inner is not None:
                made[key] = known[key](inner, place)
        return made

    return shape


def listing(item: Shape, most: int = 4096) -> Shape:
    def shape(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            refuse(where, f"must be a list of at most {most} entries")
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
    """Any string that fits a C string and UTF-8."""
    if not isinstance(value, str) or "\0" in value or re.search("[\ud800-\udfff]", value):
        refuse(where, "must be a string of valid characters, without a NUL")
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
            refuse(where, f"is {value[:80]!r}, which is not accepted")
        return str(value)

    return shape


def never(why: str) -> Shape:
    """Only an empty value is accepted, and dropped like a null.  why: the message."""

    def shape(value: Any, where: str) -> Any:
        if value and not (isinstance(value, dict) and not any(value.values())):
            refuse(where, why)
        return type(value)()

    return shape


def path(value: Any, where: str) -> str:
    """An absolute path as the kernel writes it: without . and .. and empty parts."""
    if len(text(value, where)) >= LONGEST_PATH:
        refuse(where, f"has {len(value)} characters, more than the kernel takes in a path")
    parts = value.split("/")
    if parts[0] or len(parts) < 2 or {".", ".."} & {*parts} or re.search(r"[\x00-\x1f]", value):
        refuse(where, f"must be an absolute path without . and .., not {value[:80]!r}")
    return "/" + "/".join(p for p in parts if p)


def mapping(value: Any, where: str) -> dict[str, str]:
    """An object with any keys, whose values are strings."""
    if not isinstance(value, dict):
        refuse(where, "must be an object")
    return {text(k, where): text(v, f"{where}.{k}") for k, v in value.items()}
