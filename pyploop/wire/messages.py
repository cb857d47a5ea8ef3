# SPDX-License-Identifier: Apache-2.0
"""Checks of the agent's requests and answers (docs/internals/agent-protocol.md): names, types and
bounds.  No I/O.

Invariant: no value from the peer is used before it was checked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pyploop.errors import ProtocolError
from pyploop.units import MIB
from pyploop.wire import channels

LARGEST = 1 << 50
"""Bytes: of a file, of a memory image, of a host's memory."""
LONGEST_TIME = 86400.0
"""Seconds: the longest wait that a peer may ask for."""
LONGEST_TEXT = 4096
"""Characters of a text from the peer that is shown or stored."""
MOST = 4096
"""Values in a list: CPU flags, addresses, links, resumable files."""

Check = Callable[[Any], Any]
Answers = Mapping[str, tuple[dict[str, Check], tuple[str, ...]]]
"""Request -> (the checks of its answer's fields, the fields that must be there)."""


def clipped(text: object, most: int = LONGEST_TEXT) -> str:
    """A text from the peer, cut to `most` characters, for a message."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}…"


def _is(value: Any, kind: type) -> Any:
    # Not isinstance: True is an int for Python.
    if type(value) is not kind:
        raise ValueError(f"{clipped(repr(value), 40)} is not {_NAMES[kind]}")
    return value


_NAMES = {str: "a string", bool: "true or false", list: "a list", dict: "an object"}


def text(value: Any) -> str:
    if len(_is(value, str)) > LONGEST_TEXT or "\0" in value:
        raise ValueError(f"{clipped(repr(value), 40)} is too long, or contains a NUL")
    return str(value)


def flag(value: Any) -> bool:
    return bool(_is(value, bool))


def whole(least: int, most: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{clipped(repr(value), 40)} is not a number from {least} to {most}")
        return value

    return check


def number(least: float, most: float) -> Check:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise ValueError(f"{clipped(repr(value), 40)} is not a number from {least} to {most}")
        return float(value)

    return check


def list_of(check: Check, most: int = MOST) -> Check:
    def all_of(value: Any) -> list[Any]:
        if len(_is(value, list)) > most:
            raise ValueError(f"a list of {len(value)} values, {most} at most")
        return [check(one) for one in value]

    return all_of


def or_none(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def table(check: Check, most: int = MOST) -> Check:
    def all_of(value: Any) -> dict[str, Any]:
        if len(_is(value, dict)) > most:
            raise ValueError(f"an object with {len(value)} names, {most} at most")
        return {text(name): check(one) for name, one in value.items()}

    return all_of


def _any(value: Any) -> Any:
    return value


def known(checks: dict[str, Check]) -> Check:
    """An object.  Fields with other names, from a newer peer, are not checked."""

    def check(value: Any) -> dict[str, Any]:
        _is(value, dict)
        checked = dict(value)
        for name, one in checks.items():
            if name in value:
                checked[name] = _named(name, one, value[name])
        return checked

    return check


def exactly(checks: dict[str, Check]) -> Check:
    """The same, and other names are refused."""

    def check(value: Any) -> dict[str, Any]:
        if unknown := _is(value, dict).keys() - checks.keys():
            raise ValueError(f"{clipped(sorted(unknown)[0], 40)!r} is not known here")
        checked: dict[str, Any] = known(checks)(value)
        return checked

    return check


def complete(checks: dict[str, Check]) -> Check:
    """The same, and none may be missing."""

    def check(value: Any) -> dict[str, Any]:
        checked: dict[str, Any] = exactly(checks)(value)
        if missing := checks.keys() - checked.keys():
            raise ValueError(f"{sorted(missing)[0]!r} is missing")
        return checked

    return check


def one_of(*words: str) -> Check:
    def check(value: Any) -> str:
        if value not in words:
            raise ValueError(f"{clipped(repr(value), 40)} is none of {', '.join(words)}")
        return str(value)

    return check


def _file(value: Any) -> list[Any]:
    if len(_is(value, list)) != 2:
        raise ValueError(f"{clipped(repr(value), 40)} is not a name and a size")
    return [text(value[0]), SIZE(value[1])]


def _kind(value: Any) -> list[int]:
    """Of an external path: its mode's file type, and a device's number."""
    if len(_is(value, list)) not in (1, 2):
        raise ValueError(f"{clipped(repr(value), 40)} is no kind of a file")
    return [whole(0, 1 << 64)(part) for part in value]


def _named(name: str, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None


SIZE = whole(0, LARGEST)
TIME = number(0.0, LONGEST_TIME)
_CHANNEL = whole(1, channels.LAST)
_CHANNEL_OR_LANE = whole(0, channels.LAST)
"""0: it comes by a lane instead."""
_LANE = whole(1, channels.LANES)
_WINDOW = whole(2 * MIB, 32 * MIB)
_INDEX = whole(0, 1023)
_MOMENT = number(0.0, 2.0**53)
_FACTS = known(
    {
        "machine": text,
        "cpu": list_of(text),
        "source": known({"id": text, "name": text}),
        "trees": list_of(SIZE, channels.AT_ONCE),
        "images": list_of(SIZE, channels.AT_ONCE),
        "mounts": list_of(text, channels.AT_ONCE),
        "paths": table(text),
        "external": list_of(text),
        "kinds": list_of(_kind),
        "scripts": list_of(text, 64),
        "criu": list_of(whole(0, 1 << 20), 8),
        "memory": SIZE,
        "lazy": known(
            {"want": text, "private": SIZE, "forked": SIZE, "whole": SIZE},
        ),
        "simfs": flag,
        "ips": list_of(text),
        "checkpoint": or_none(whole(0, 1 << 31)),
        "links": table(_any),
        "criu_options": list_of(text, 16),
        "found": table(_any),
        "cgroups": list_of(text, 64),
        "labels": list_of(text, 64),
        "filtered": flag,
    }
)
_REQUESTS: dict[str, dict[str, Check]] = {
    "clock": {},
    "check": {
        "container": text,
        "runtime": text,
        "live": flag,
        "facts": _FACTS,
        "sizes": list_of(SIZE, channels.AT_ONCE),
        "nodeps": list_of(text, 16),
    },
    "busy": {},
    "probe": {
        "channel": _CHANNEL,
        "size": whole(1, channels.PROBE),
        "window": _WINDOW,
        "bulk": flag,
    },
    "probed": {},
    "begin": {"migration": text, "stall": number(0.0, 2.0**53), "keep": flag},
    "items": {"channel": _CHANNEL},
    "digests": {"channel": _CHANNEL, "files": list_of(_file)},
    "disk": {"index": _INDEX, "channel": _CHANNEL_OR_LANE, "reuse": flag, "lane": _LANE},
    "lane": {"number": _LANE},
    "use": {"number": _LANE, "disk": or_none(_INDEX)},
    "tree": {"index": _INDEX, "channel": _CHANNEL, "last": flag, "bulk": flag},
    "dump": {
        "channel": _CHANNEL,
        "number": whole(0, 1023),
        "parent": whole(0, 1023),
        "room": SIZE,
        "window": _WINDOW,
        "post_copy": number(1.0, LONGEST_TIME),
        "bulk": flag,
    },
    "join": {"name": text, "timeout": number(0.0, 2.0**53)},
    "restore": {"timeout": TIME},
    "start": {"timeout": TIME, "run": flag},
    "finish": {},
    "undo": {},
    "settle": {"migration": text},
    "forget": {"migration": text},
}
_OPTIONAL = {"bulk", "lane", "reuse", "number", "parent", "room", "window", "post_copy"}
_VERDICT = re.compile("committed|aborted")
_TOKEN = re.compile("[0-9a-f]{32}")


def request(
    op: Any,
    args: Any,
    requests: Mapping[str, dict[str, Check]] = _REQUESTS,
    optional: Collection[str] = _OPTIONAL,
) -> dict[str, Any]:
    """The checked arguments of a request; ProtocolError names what is wrong.  requests: those
    of a migration, or others.  optional: arguments that may be missing."""
    checks = requests.get(op) if isinstance(op, str) else None
    if checks is None or not isinstance(args, dict):
        raise ProtocolError(f"agent protocol: unknown request {clipped(repr(op), 80)}")
    if unknown := args.keys() - checks.keys():
        name = clipped(sorted(unknown)[0], 40)
        raise ProtocolError(f"agent protocol: {op!r} with wrong arguments (unknown: {name})")
    if missing := checks.keys() - args.keys() - set(optional):
        name = sorted(missing)[0]
        raise ProtocolError(f"agent protocol: {op!r} with wrong arguments (missing: {name})")
    try:
        return {name: _named(name, checks[name], value) for name, value in args.items()}
    except ValueError as e:
        raise ProtocolError(f"agent protocol: {op!r} with wrong arguments ({e})") from None


def _verdict(value: Any) -> str:
    if not _VERDICT.fullmatch(text(value)):
        raise ValueError(f"{clipped(value, 40)!r} is not a verdict (committed, aborted)")
    return str(value)


def token(value: Any) -> str:
    """Of a lane: 32 hex digits."""
    if not _TOKEN.fullmatch(text(value)):
        raise ValueError(f"{clipped(value, 40)!r} is not a token")
    return str(value)


_LAZY = known({"lazy": flag, "why": lambda value: clipped(_is(value, str))})
_POST_COPY = known({"why": lambda value: clipped(_is(value, str))})
_FAILED = list_of(lambda value: clipped(_is(value, str)))
_ANSWERS: Answers = {
    "clock": ({"monotonic": _MOMENT}, ("monotonic",)),
    "check": (
        {
            "takes": list_of(text),
            "wants": list_of(text),
            "lazy": _LAZY,
            "post_copy": _POST_COPY,
        },
        (),
    ),
    "busy": ({"busy": number(1.0, 1e6)}, ("busy",)),
    "begin": ({"kept": list_of(text)}, ()),
    "lane": ({"token": token}, ("token",)),
    "tree": ({"name": text}, ("name",)),
    "join": ({"ended": _MOMENT}, ()),
    "restore": ({"moments": table(_MOMENT), "lazy": _LAZY}, ("moments",)),
    "finish": ({"failed": _FAILED}, ()),
    "undo": ({"failed": _FAILED}, ()),
    "settle": ({"verdict": _verdict, "failed": _FAILED}, ("verdict",)),
}
MOMENTS = ("restore", "running", "dump ended")
"""The moments that the answer to `restore` must have."""


def answer(op: str, value: Any, answers: Answers = _ANSWERS) -> dict[str, Any]:
    """The checked answer to a request; ProtocolError names what is wrong.  answers: those of
    a migration, or others."""
    checks, needed = answers.get(op, ({}, ()))
    try:
        checked: dict[str, Any] = known(checks)(value)
        missing = [name for name in needed if name not in checked]
        if op == "restore":
            missing += [name for name in MOMENTS if name not in checked.get("moments", {})]
        if missing:
            raise ValueError(f"missing: {missing[0]}")
    except ValueError as e:
        raise ProtocolError(f"agent protocol: a wrong answer to {op!r} ({e})") from None
    return checked


def event(message: dict[str, Any]) -> tuple[str, float, dict[str, Any]]:
    """(name, moment, fields) of an event that the agent sends; ProtocolError."""
    try:
        name, at = text(message.get("event")), _MOMENT(message.get("at"))
        return name, at, _is(message.get("fields"), dict)
    except ValueError as e:
        raise ProtocolError(f"agent protocol: a wrong event ({e})") from None


def values(value: Any) -> int:
    """The number of values in a JSON value, itself included."""
    if not isinstance(value, (dict, list)):
        return 1
    return 1 + sum(map(values, value.values() if isinstance(value, dict) else value))


def failure(error: Any) -> tuple[int, str]:
    """(exit code, text) of an answer that reports a failure.  The codes about where the
    container is (4, 8) are replaced, as only the source knows that."""
    code = error.get("code") if isinstance(error, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    known = code if type(code) is int else 0
    return _CODES.get(known, 1), clipped(text)


MOST_FAILED = 64
"""Failed checks of the target that are shown."""


def failed_checks(error: Any) -> list[tuple[str, int, str, str]]:
    """(name, exit code, message, hint) of each check that has failed on the target.  Empty:
    the answer reports another failure, or comes of an older agent."""
    listed = error.get("failed") if isinstance(error, dict) else None
    found = []
    for one in listed[:MOST_FAILED] if isinstance(listed, list) else ():
        code, message = failure(one)
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or not _CHECK.fullmatch(name):
            return []
        hint = one.get("hint") or ""
        found.append((name, code, message, clipped(hint)))
    return found


_CHECK = re.compile(r"[a-z0-9-]{1,40}")
_CODES = {code: code for code in (1, 2, 6, 7, *range(9, 21))} | {4: 6, 8: 7}
"""The target's exit codes -> ours (docs/internals/migrate.md)."""


def finite(text: str) -> float:
    """A JSON number with a fraction or exponent; ValueError when it is too large."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {clipped(text, 40)} is too large")
    return value


def integer(text: str) -> int:
    """A JSON number without either; ValueError when it does not fit into 64 bits."""
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 64:
        raise ValueError(f"the number {clipped(text, 40)} is too large")
    return value
