# SPDX-License-Identifier: Apache-2.0
"""The requests of a remote copy and their answers (docs/internals/remote-copy.md): names,
types and bounds.  No I/O.

The options of a copy that belong to the other host are in two tables, and only there: an
option that is added to one of them goes over.
"""

from __future__ import annotations

import base64
from typing import Any

from pyploop.units import KIB
from pyploop.wire import messages
from pyploop.wire.messages import (
    SIZE,
    TIME,
    Answers,
    Check,
    clipped,
    complete,
    exactly,
    flag,
    known,
    list_of,
    one_of,
    or_none,
    text,
    token,
    whole,
)

FOREVER = 2.0**53
"""Seconds: the largest of a time that the user chooses."""
_MOST_STOPS = 64
_LONG = messages.number(0.0, FOREVER)
_STOP = complete({"kind": text, "argument": text, "undo": or_none(text), "name": text})

SOURCE_OPTIONS: dict[str, Check] = {
    "tracker": one_of("auto", "bpf", "ploop", "dm", "scan"),
    "read": one_of("auto", "device", "backing"),
    "mounts": list_of(text, _MOST_STOPS),
    "unsafe_in_use": flag,
    "stops": list_of(_STOP, _MOST_STOPS),
    "resume": flag,
    "before_thaw": text,
    "max_freeze": _LONG,
    "deadline": _LONG,
    "on_deadline": one_of("freeze", "abort"),
    "freeze_limit": _LONG,
    "throttle_rate": SIZE,
    "throttle_cgroup": text,
    "bandwidth": SIZE,
    "compress": text,
    "proof": one_of("auto", "always", "never"),
    "reserve": SIZE,
    "cluster": SIZE,
    "readers": whole(0, 64),
    "update": flag,
    "keep_partial": flag,
    "timeout": _LONG,
}
"""Fields of CopyOptions that the source's host needs when that is the other one."""
TARGET_OPTIONS: dict[str, Check] = {
    "to_device": flag,
    "update": flag,
    "inplace": flag,
    "keep_partial": flag,
    "write": one_of("auto", "direct", "buffered"),
    "timeout": _LONG,
}
"""The same of the target's host."""
LANES = 4096
"""Lanes of a copy, in its whole time.  Number 0 is the stream with its answers, until it
fails."""
_END = complete({"lane": whole(0, LANES - 1), "received": SIZE})
_ENDS = list_of(_END, 64)
LANES_AT_ONCE = 16
"""Lanes that one request asks for, at most."""

MOST_NODES = 32
"""Nodes of a proof whose children are asked for at a time: 128 KiB of hashes."""
LONGEST_RECEIPT = 128 * KIB
"""Bytes of one that goes over: it is in one message."""

_REQUESTS: dict[str, dict[str, Check]] = {
    "check": {},
    "target": {"path": text, "options": exactly(TARGET_OPTIONS)},
    "lane": {"number": whole(0, LANES - 1)},
    "lanes": {"number": whole(1, LANES - 1), "count": whole(1, LANES_AT_ONCE)},
    "receive": {},
    "source": {"path": text, "options": exactly(SOURCE_OPTIONS)},
    "join": {"timeout": TIME},
    "stay": {"retry": _LONG},
    "leave": {},
    "broken": {
        "timeout": TIME,
        "number": whole(0, LANES - 1),
        "ends": _ENDS,
        "committed": flag,
    },
    "again": {"number": whole(0, LANES - 1)},
    "resume": {"number": whole(0, LANES - 1)},
    "undo": {},
    "look": {"path": text},
    "digest": {"size": whole(0, (1 << 63) - 1)},
    "hashes": {"level": whole(0, 15), "nodes": list_of(whole(0, 1 << 63), MOST_NODES)},
}


def _bytes(most: int) -> Check:
    def check(value: Any) -> bytes:
        try:
            found = base64.b64decode(_of_text(value), validate=True)
        except ValueError as e:
            raise ValueError(f"not base64 ({e})") from e
        if len(found) > most:
            raise ValueError(f"{len(found)} bytes, {most} at most")
        return found

    return check


def _of_text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{clipped(repr(value), 40)} is not a string")
    return value


_ANSWERS: Answers = {
    "check": (
        {
            "version": text,
            "aes": flag,
            "source_options": list_of(text),
            "target_options": list_of(text),
        },
        ("version", "aes", "source_options", "target_options"),
    ),
    "lane": ({"token": token}, ("token",)),
    "lanes": ({"tokens": list_of(token, LANES_AT_ONCE)}, ("tokens",)),
    "source": ({"size": SIZE}, ()),
    "join": ({"done": flag, "result": known({}), "waits": flag}, ("done",)),
    "stay": ({"token": token}, ("token",)),
    "broken": (
        {"ready": flag, "committed": flag, "ends": _ENDS},
        ("ready", "committed", "ends"),
    ),
    "again": ({"token": token}, ("token",)),
    "look": (
        {
            "size": whole(0, (1 << 63) - 1),
            "device": flag,
            "receipt": or_none(_bytes(LONGEST_RECEIPT)),
        },
        ("size", "device", "receipt"),
    ),
    "hashes": ({"hashes": _bytes(MOST_NODES * 4096)}, ("hashes",)),
}


def request(op: Any, args: Any) -> dict[str, Any]:
    """As messages.request."""
    return messages.request(op, args, _REQUESTS, ())


def answer(op: str, value: Any) -> dict[str, Any]:
    """As messages.answer."""
    return messages.answer(op, value, _ANSWERS)


def failure(error: Any) -> tuple[int, str, bool]:
    """(exit code, text, whether the peer had failed before) of an answer that reports a
    failure."""
    fields = error if isinstance(error, dict) else {}
    code = fields.get("code")
    shown = clipped(fields.get("message", error))
    return (code if type(code) is int else 0), shown, fields.get("peer_failed") is True
