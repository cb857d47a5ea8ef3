# SPDX-License-Identifier: Apache-2.0
"""What the hostile end of a fuzzed conversation says: scripts, a line for each step,
and the honest ones that a campaign begins with.

    C JSON      a control message; of a source: its answer is waited for
    A JSON      of an agent: a control message, after the next request came
    D N TEXT    data on channel N (bytes as \\xNN)
    E N, R N    the end, a reset of channel N
    K N AMOUNT  credit on channel N
    P           a ping
    W           wait until what was sent last has had an effect
    ---         of an agent: what follows is for the next connection
    any other   these bytes as they are
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from pyploop.wire import messages
from pyploop.wire import mux as wire

MACHINE = os.uname().machine


def unescaped(text: bytes) -> bytes:
    return re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), text)


def escaped(data: bytes) -> str:
    return "".join(chr(c) if 32 <= c < 127 and c != ord("\\") else f"\\x{c:02x}" for c in data)


def frame_of(line: bytes) -> bytes:
    """The bytes that a line of a script sends."""
    word, _, rest = line.partition(b" ")
    number, _, text = rest.partition(b" ")
    channel = int(number) if number.isdigit() and len(number) < 5 else 0
    if word in (b"C", b"A"):
        return wire.frame(wire.CONTROL, 0, len(rest)) + rest
    if word == b"D":
        data = unescaped(text)
        return wire.frame(wire.DATA, channel, len(data)) + data
    if word in (b"E", b"R"):
        return wire.frame(wire.END if word == b"E" else wire.RESET, channel, 0)
    if word == b"K":
        amount = int(text) if text.isdigit() and len(text) < 10 else 0
        return wire.frame(wire.CREDIT, channel, 4) + amount.to_bytes(4, "little")
    if word == b"P":
        return wire.frame(wire.PING, 0, 0)
    return b"" if line == b"W" else unescaped(line)


def request(op: str, number: int = 1, /, **args: Any) -> str:
    return f"C {json.dumps({'id': number, 'op': op, 'args': args})}"


# ---- seeds

HEX = "0123456789abcdef"
_FACTS = {"machine": MACHINE, "cpu": [], "memory": 4096, "images": [8192], "trees": []}
CHECK = {"container": "box", "runtime": "command", "live": True, "sizes": [4096], "nodeps": []}


def _piece(name: bytes, data: bytes, pos: int = 0) -> bytes:
    return (
        len(name).to_bytes(2, "little")
        + b"\x80\x01"
        + len(data).to_bytes(4, "little")
        + (pos.to_bytes(8, "little") + name + data)
    )


def _file(name: bytes, data: bytes) -> bytes:
    return _piece(name, data) + _piece(name, b"", len(data))


def _whole_migration(last: list[str]) -> bytes:
    d1 = (0x4CC0AC3D).to_bytes(4, "little")
    disk = d1 + (8).to_bytes(4, "little") + bytes(8) + b"contents" + d1 + bytes(12)
    items = _file(b"conf", b"made up") + bytes(16)
    dump = _piece(b"pages-1.img", b"p" * 40) + _file(b"core-1.img", b"core")
    dump += _piece(b"pages-1.img", b"", 40) + bytes(16)
    lines = [
        request("clock", 1),
        request("check", 2, facts=_FACTS, **CHECK),
        request("begin", 3, migration=HEX, stall=5, keep=False),
        request("items", 4, channel=1),
        f"D 1 {escaped(items)}",
        "E 1",
        request("join", 5, name="items", timeout=5),
        request("disk", 6, index=0, channel=2),
        f"D 2 {escaped(disk)}",
        request("dump", 7, channel=3, number=0, parent=0, room=0, window=4 << 20),
        f"D 3 {escaped(dump)}",
        *last,
    ]
    return "\n".join(lines).encode()


def agent_seeds() -> list[bytes]:
    forget = [request("finish", 9), request("forget", 10, migration=HEX)]
    begin = [
        request("check", 1, facts=_FACTS, **CHECK),
        request("begin", 2, migration=HEX, stall=5, keep=True),
    ]
    return [
        _whole_migration([request("restore", 8, timeout=5), *forget]),
        _whole_migration([request("start", 8, timeout=5, run=True), *forget]),
        _whole_migration([request("undo", 8)]),
        _whole_migration(["E 3", request("settle", 8, migration=HEX)]),
        "\n".join(
            [
                begin[0],
                request("busy", 2),
                request("probe", 3, channel=1, size=9),
                f"D 1 {escaped(_file(b'probe', b'nine byte') + bytes(16))}",
                request("probed", 4),
                request("probe", 5, channel=2, size=9, window=1 << 21),
                *begin[1:],
            ]
        ).encode(),
        "\n".join([*begin, request("settle", 3, migration=HEX)]).encode(),
        "\n".join([*begin, request("forget", 3, migration=HEX), request("undo", 4)]).encode(),
        "\n".join([*begin, request("digests", 3, channel=1, files=[["conf", 7]])]).encode(),
        "\n".join([*begin, request("tree", 3, channel=1, index=0, last=True)]).encode(),
        "\n".join(
            [*begin, *(request("dump", n, channel=n, number=n, parent=n - 1) for n in (1, 2))]
        ).encode(),
        request("check", 1, facts={"cpu": 5}, **CHECK).encode(),
    ]


def _answers(*answers: Any) -> list[str]:
    return [f"A {json.dumps({'id': n, 'ok': ok})}" for n, ok in enumerate(answers, 1)]


def source_seeds() -> list[bytes]:
    clock = {"monotonic": 5.0}
    moments = {"restore": 6.0, "dump ended": 5.5, "committed": 6.5, "running": 7.0}
    before = [{"disks": [], "takes": ["memory", "tree"]}, {"kept": []}, {}, {}, {}, *[clock] * 5]
    event = 'C {"event": "line", "at": 1.0, "fields": {"level": 3, "text": "made up"}}'
    restored = [*before, {"moments": moments}, {"failed": []}, {}]
    refused = _answers(*before)
    refused.append('A {"id": 11, "error": {"code": 7, "message": "cannot restore"}}')
    undone = 'A {"id": 12, "ok": {"failed": []}}'
    lines = [
        [event, *_answers(*restored)],
        [*refused, undone],
        [*refused, "---", *_answers({"verdict": "aborted", "failed": []})],
        [*_answers(*before), "A {}", "---", *_answers({"verdict": "committed", "failed": []})],
        _answers(*before),
        _answers({"takes": []}, {"kept": ["conf"]}, {}),
        ['A {"id": 1, "error": {"code": 9, "message": "exists"}}'],
    ]
    return ["\n".join(one).encode() for one in lines]


def message_seeds() -> list[bytes]:
    """The messages of these, without more; answers with the request's name."""
    lines = [line for seed in agent_seeds() for line in seed.split(b"\n") if line[:2] == b"C "]
    moments = {"restore": 6.0, "dump ended": 5.5, "running": 7.0}
    answers: dict[str, dict[str, Any]] = {
        "restore": {"moments": moments},
        "settle": {"verdict": "aborted", "failed": ["x"]},
        "check": {"takes": ["tree"]},
        "begin": {"kept": ["conf"]},
        "tree": {"name": "tree 0.1"},
    }
    told = [json.dumps({"op": op, "ok": ok}).encode() for op, ok in answers.items()]
    told.append(b'{"event": "x", "at": 1.5, "fields": {"level": 3}}')
    told.append(b'{"error": {"code": 7, "message": "x"}}')
    return [line[2:] for line in lines] + told


WORDS = [
    "null", "true", "false", "[]", "{}", '""', "NaN", "1e999", "-1", "0", "1.5", "1" * 30,
    '"\\ud800"', '"\\u0000"', '"id": ', '"op": ', '"args": ', '"ok": ', '"error": ',
    '"event": ', '"channel": ', '"timeout": ', '"moments": ', '"verdict": ', '"aborted"',
    '"committed"', '"failed": ', "C ", "A ", "D 1 ", "E 1", "R 1", "K 1 9", "---", "W",
    *(f'"{op}"' for op in messages._REQUESTS),
]  # fmt: skip
"""What a campaign puts together."""
