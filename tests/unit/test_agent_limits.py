# SPDX-License-Identifier: Apache-2.0
"""Limits on what a source may ask an agent for: each is the attack, against a real
agent whose container is made up (tests/fuzz/made_up.py)."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up import SOURCE, Box, World
from scripts import CHECK, HEX, MACHINE

from pyploop.errors import MigrateError, PyploopError
from pyploop.migration import commit_record, deadlines, undo_kinds
from pyploop.migration.target import agent, incoming, incoming_files
from pyploop.runtimes import State, config, memory_in_use
from pyploop.runtimes.config import HostConfig
from pyploop.system import jobs
from pyploop.transport import agent_events
from pyploop.transport.mux import Mux
from pyploop.wire import mux as wire

FACTS: dict[str, Any] = {
    "machine": MACHINE,
    "cpu": [],
    "memory": 4096,
    "images": [8192],
    "trees": [],
    "mounts": ["/srv/r"],
    "paths": {"r": "/srv/r"},
    "external": ["/x"],
    "kinds": [[0o040000]],
    "scripts": ["mount"],
}


class Source:
    """One connection to an agent in a thread."""

    def __init__(self, world: World, box: Box) -> None:
        ours, self._theirs = socket.socketpair()
        self._ours = ours
        self._thread = threading.Thread(target=self._serve, args=(world.host(),))
        self._thread.start()
        ours.sendall(wire.hello("0.1.0"))
        data = b""
        while not data.endswith(b"\n"):
            data += ours.recv(1)
        self.mux = Mux(ours.fileno(), ours.fileno())
        self._number = 0

    def _serve(self, host: HostConfig) -> None:
        end = self._theirs.fileno()
        agent.Agent(host, end, end, SOURCE).serve()
        self._theirs.close()

    def ask(self, op: Any, args: Any) -> dict[str, Any]:
        self._number += 1
        self.mux.send({"id": self._number, "op": op, "args": args})
        while (answer := self.mux.receive(20)).get("id") != self._number:
            assert "event" in answer, answer
        return answer

    def call(self, op: str, **args: Any) -> dict[str, Any]:
        answer = self.ask(op, args)
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["ok"]
        return found

    def refused(self, op: Any, args: Any) -> str:
        error = self.ask(op, args)["error"]
        assert error["code"] in range(1, 21)
        return str(error["message"])

    def begin(self, **facts: Any) -> None:
        self.call("check", facts={**FACTS, **facts}, **CHECK)
        self.call("begin", migration=HEX, stall=20, keep=False)

    def send(self, op: str, data: bytes, **args: Any) -> None:
        """The request, and data in its channel."""
        channel = self.mux.open(args["channel"])
        with socket.socket(fileno=channel) as s:
            self.call(op, **args)
            s.sendall(data)

    def ended(self) -> bool:
        """The agent has ended the connection."""
        self._thread.join(20)
        return not self._thread.is_alive()

    def close(self) -> None:
        self.mux.close()
        self._ours.close()
        assert self.ended()


Connect = Callable[[], Source]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


@pytest.fixture
def box(world: World) -> Box:
    return Box(world.folder, State(False), has_disk=True)


@pytest.fixture
def connect(world: World, box: Box, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Connections to agents of one host; nothing may be left when they have ended."""

    def runtime(host: HostConfig, name: object, container: str) -> Box:
        if (name, container) != ("command", "box"):
            raise MigrateError(10, "no such container")
        return box

    monkeypatch.setattr(agent, "make_runtime", runtime)
    monkeypatch.setattr(undo_kinds, "make_runtime", runtime)
    monkeypatch.setattr(config, "load", lambda _: world.host())
    with contextlib.ExitStack() as stack:

        def one() -> Source:
            source = Source(world, box)
            stack.callback(source.close)
            return source

        yield one
    left = world.files()
    assert not left, left


ODD: list[Any] = [
    None,
    True,
    -1,
    1.5,
    1e300,
    1 << 63,
    "",
    "x",
    "\0",
    "é" * 5000,
    [],
    [[]],
    {},
    {"a": {}},
]
REQUESTS: dict[str, dict[str, Any]] = {
    "check": {**CHECK, "facts": FACTS},
    "begin": {"migration": HEX, "stall": 5, "keep": False},
    "items": {"channel": 1},
    "digests": {"channel": 1, "files": [["conf", 5]]},
    "disk": {"index": 0, "channel": 1, "reuse": False},
    "lane": {"number": 1},
    "use": {"number": 1, "disk": 0},
    "tree": {"index": 0, "channel": 1, "last": True},
    "dump": {"channel": 1, "number": 0, "parent": 0, "room": 0},
    "join": {"name": "items", "timeout": 1},
    "restore": {"timeout": 1},
    "start": {"timeout": 1, "run": True},
    "settle": {"migration": HEX},
    "forget": {"migration": HEX},
}


@pytest.mark.parametrize("op", list(REQUESTS))
def test_no_type_of_an_argument_surprises_the_agent(connect: Connect, op: str) -> None:
    source = connect()
    known = REQUESTS[op]
    for name, right in known.items():
        for odd in ODD:
            if type(odd) is type(right) and not isinstance(odd, dict):
                continue  # may be right
            if isinstance(right, int | float) and type(odd) in (int, float):
                continue
            source.refused(op, {**known, name: odd})
        if name not in ("reuse", "number", "parent", "room"):
            source.refused(op, {k: v for k, v in known.items() if k != name})
    source.refused(op, {**known, "more": 1})
    for odd in (*ODD, "nothing"):
        if not isinstance(odd, dict):
            source.refused(op, odd)
        source.refused(odd, {})
    assert source.call("clock")


@pytest.mark.parametrize("name", list(FACTS))
def test_no_type_of_a_fact_surprises_the_agent(connect: Connect, name: str) -> None:
    source = connect()
    for odd in ODD:
        right = FACTS[name]
        if type(odd) is type(right) and odd not in ("\0", [[]], -1, 1 << 63, {"a": {}}):
            continue
        said = source.refused("check", {**CHECK, "facts": {**FACTS, name: odd}})
        assert name in said or odd in ("", "x"), said
    source.begin()


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "-Infinity",
        "1e999",
        "9" * 25,
        "-" + "9" * 19 + "9",
        '"\\ud800"',
        "[" * 70 + "]" * 70,
        '{"a":' * 70 + "1" + "}" * 70,
        "[" * 100_000,
        "1" * 5000,
    ],
)
def test_json_that_no_peer_writes_ends_the_connection(text: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        mux = Mux(ours.fileno(), ours.fileno())
        payload = b'{"id": 1, "op": "clock", "args": {"x": ' + text.encode() + b"}}"
        theirs.sendall(wire.frame(wire.CONTROL, 0, len(payload)) + payload)
        with pytest.raises(PyploopError, match="message is not JSON"):
            mux.receive(20)
        assert mux.failure is not None
        mux.close()


@pytest.mark.parametrize("what", ["images", "verdict", "trees", "journal"])
def test_a_begin_that_fails_leaves_no_file(
    connect: Connect, world: World, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    source = connect()
    source.call("check", facts=FACTS, **CHECK)
    state = world.folder / "state"
    if what == "images":
        (world.folder / "images").chmod(0o777)
    elif what == "verdict":
        state.mkdir(exist_ok=True)
        (state / f"{HEX}.target").write_text("another one's")
    elif what == "trees":
        monkeypatch.setattr(incoming, "IncomingTrees", _fails)
    else:
        monkeypatch.setattr(incoming_files.IncomingFiles, "__init__", _fails)
    source.refused("begin", {"migration": HEX, "stall": 5, "keep": True})
    if what == "verdict":
        assert (state / f"{HEX}.target").read_text() == "another one's"
        (state / f"{HEX}.target").unlink()
    assert world.files() <= {"lock/box.lck"}
    monkeypatch.undo()


def _fails(*_: object, **__: object) -> None:
    raise MigrateError(6, "no room")


def test_one_connection_takes_one_place(connect: Connect) -> None:
    source = connect()
    source.begin()
    assert "`check` came twice" in source.refused("check", {**CHECK, "facts": FACTS})


def test_a_check_that_fails_gives_its_place_back(connect: Connect, world: World) -> None:
    source = connect()
    source.refused("check", {**CHECK, "facts": {**FACTS, "machine": "pdp11"}})
    assert world.files() == set()
    source.begin()


@pytest.mark.parametrize("before", ["hello", "check", "begin"])
def test_a_connection_that_asks_for_nothing_loses_its_place(
    connect: Connect, world: World, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setattr(deadlines, "UNASKED", 0.3)
    monkeypatch.setattr(deadlines, "UNBEGUN", 0.3)
    source = connect()
    with contextlib.suppress(PyploopError):  # it may be so slow that it is ended before
        if before != "hello":
            source.call("check", facts=FACTS, **CHECK)
        if before == "begin":
            source.call("begin", migration=HEX, stall=20, keep=False)
    assert source.ended()
    assert world.files() == set()


@pytest.mark.parametrize("op", ["settle", "forget"])
def test_a_migration_under_way_is_neither_settled_nor_forgotten_by_itself(
    connect: Connect, world: World, op: str
) -> None:
    """Its own lock would have been waited for, for a minute."""
    source = connect()
    source.begin()
    assert "not over" in source.refused(op, {"migration": HEX})
    assert "not decided" in connect().refused("forget", {"migration": HEX}) or op == "settle"
    assert (world.folder / "state" / f"{HEX}.target").read_text().strip() == commit_record.PENDING
    source.call("undo")


def piece(name: bytes, data: bytes, pos: int = 0) -> bytes:
    return struct.pack("<HHIQ", len(name), 0o600, len(data), pos) + name + data


CORE = piece(b"core-1.img", b"x") + piece(b"core-1.img", b"", 1) + bytes(16)
"""A whole dump."""


@pytest.mark.parametrize("pos", [(1 << 17) + 1, 896 << 20, 1 << 40])
def test_a_small_file_that_says_it_is_large_is_refused(
    connect: Connect, world: World, pos: int
) -> None:
    """55 bytes, sparse, which would have been read as a whole."""
    source = connect()
    source.begin()
    source.send("items", piece(b"conf", b"{}") + piece(b"conf", b"", pos), channel=1)
    assert "larger than 131072 bytes" in source.refused("join", {"name": "items", "timeout": 20})
    assert (world.folder / "bundle/conf").stat().st_size <= 2


def test_a_disk_that_is_larger_than_announced_is_refused(connect: Connect, world: World) -> None:
    source = connect()
    source.begin(images=[8192])
    stream = struct.pack("<IIQ", 0x4CC0AC3D, 8, 8190) + b"too much"
    source.send("disk", stream, index=0, channel=1)
    assert "past the size" in source.refused("join", {"name": "disk 0", "timeout": 20})
    assert not (world.folder / "image").exists()


def test_memory_that_is_larger_than_announced_is_refused(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_in_use, "GIB", 0)
    source = connect()
    source.begin(memory=1000)
    stream = b"".join(piece(b"pages-1.img", bytes(1000), n * 1000) for n in range(9))
    source.send("dump", stream, channel=1)
    said = source.refused("join", {"name": "dump", "timeout": 20})
    assert re.search("8000 bytes", said), said


def test_nothing_is_received_beside_the_items(connect: Connect) -> None:
    """Both would write into the journal: either failed, or got lost on the disk."""
    source = connect()
    source.begin()
    with socket.socket(fileno=source.mux.open(1)) as stream:
        source.call("items", channel=1)
        for op in ("items", "digests", "disk", "tree", "dump", "restore", "start"):
            assert "not all there yet" in source.refused(op, REQUESTS[op])
        stream.sendall(bytes(16))
        source.ask("join", {"name": "items", "timeout": 20})
    source.send("disk", struct.pack("<IIQ", 0x4CC0AC3D, 0, 0), index=0, channel=2)


@pytest.mark.parametrize("end", ["undo", "finish"])
def test_one_migration_comes_by_a_connection(connect: Connect, box: Box, end: str) -> None:
    """What came before lay where a second one, which nobody had checked, came to: its
    undo removed a container that was committed."""
    source = connect()
    box.has_disk = False
    source.call("check", facts=FACTS, **{**CHECK, "sizes": []})
    source.call("begin", migration=HEX, stall=20, keep=False)
    if end == "finish":
        source.call("start", timeout=20, run=False)
    source.call(end)
    assert "once" in source.refused("begin", {"migration": HEX, "stall": 20, "keep": False})
    source.call("forget", migration=HEX)


def test_rounds_of_memory_come_one_after_the_other_and_are_bounded_together(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each had all that was announced, and one that failed was not counted."""
    monkeypatch.setattr(memory_in_use, "GIB", 0)
    source = connect()
    source.call("check", facts={**FACTS, "memory": 1000}, **CHECK)
    source.call("begin", migration=HEX, stall=0.3, keep=False)
    half = piece(b"pages-1.img", bytes(4000))
    source.send("dump", half, channel=1, number=1, parent=0)  # and its end is missing
    source.refused("join", {"name": "memory 1", "timeout": 20})
    source.send("dump", half + piece(b"a.img", b"x"), channel=2, number=2, parent=1)
    assert "8000 bytes" in source.refused("join", {"name": "memory 2", "timeout": 20})


def test_a_mount_that_takes_hours_is_interrupted_by_the_undo(
    connect: Connect, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of an ext4 with multi-mount protection, whose superblock says for how long:
    the agent stayed for ten minutes, with its place and its lock."""
    libc, mounting = ctypes.CDLL(None), threading.Event()

    def mount(_: object) -> None:
        mounting.set()
        libc.pause()
        raise MigrateError(7, "interrupted")

    monkeypatch.setattr(box, "mount", mount)
    monkeypatch.setattr(deadlines, "UNMOVED", 0.1)
    old = signal.signal(jobs.INTERRUPT, lambda *_: None)
    try:
        source = connect()
        source.begin()
        source.send("disk", struct.pack("<IIQ", 0x4CC0AC3D, 0, 0), index=0, channel=1)
        assert mounting.wait(20)
        assert source.call("undo") == {"failed": []}
    finally:
        signal.signal(jobs.INTERRUPT, old)


def test_a_round_of_memory_does_not_begin_beside_another_one(connect: Connect) -> None:
    source = connect()
    source.begin()
    with socket.socket(fileno=source.mux.open(1)) as stream:
        source.call("dump", channel=1, number=1, parent=0)
        threading.Timer(0.5, stream.sendall, [bytes(16)]).start()
        source.call("dump", channel=2, number=2, parent=1)
        source.call("join", name="memory 1", timeout=0)


def test_items_and_the_dump_come_once(connect: Connect) -> None:
    source = connect()
    source.begin()
    source.send("items", bytes(16), channel=1)
    source.ask("join", {"name": "items", "timeout": 20})
    assert "came twice" in source.refused("items", {"channel": 2})
    source.send("dump", bytes(16), channel=3)
    assert "no memory round 0" in source.refused("dump", {"channel": 4})


def test_a_channel_is_used_once(connect: Connect) -> None:
    source = connect()
    source.begin()
    source.send("items", bytes(16), channel=1)
    source.call("join", name="items", timeout=20)
    assert "opened before" in source.refused("dump", {"channel": 1})


def test_a_stream_that_goes_on_after_the_undo_makes_nothing(connect: Connect, world: World) -> None:
    source = connect()
    source.begin()
    with socket.socket(fileno=source.mux.open(1)) as stream:
        source.call("items", channel=1)
        stream.sendall(piece(b"conf", b"half"))
        source.call("undo")
        with contextlib.suppress(OSError):
            stream.sendall(piece(b"large", b"more") * 1000)
    assert world.files() == {"lock/box.lck"}


def test_nothing_is_received_after_the_commit(connect: Connect, world: World, box: Box) -> None:
    source = connect()
    box.has_disk = False
    source.call("check", facts=FACTS, **{**CHECK, "sizes": []})
    source.call("begin", migration=HEX, stall=20, keep=False)
    source.send("dump", CORE, channel=1)
    source.call("join", name="dump", timeout=20)
    source.call("restore", timeout=20)
    for op in ("items", "digests", "disk", "tree", "dump", "restore", "start"):
        assert "after the commit" in source.refused(op, REQUESTS[op])
    source.call("finish")
    source.call("forget", migration=HEX)
    assert box.told == ["check images", "release", "undump"]
    assert world.files() == {"lock/box.lck"}


def test_what_the_source_does_not_wait_for_any_more_is_not_committed(
    connect: Connect, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    undump = box.undump
    monkeypatch.setattr(box, "undump", lambda *a: (threading.Event().wait(0.3), undump(*a)))
    source = connect()
    box.has_disk = False
    source.call("check", facts=FACTS, **{**CHECK, "sizes": []})
    source.call("begin", migration=HEX, stall=20, keep=False)
    source.send("dump", CORE, channel=1)
    source.call("join", name="dump", timeout=20)
    assert "that the source allows" in source.refused("restore", {"timeout": 0.1})
    assert box.told == ["check images", "release", "abandon"]
    source.call("undo")


def test_messages_that_nobody_reads_are_left_out_and_counted(connect: Connect) -> None:
    source = connect()
    events: list[dict[str, Any]] = []

    class Reader:
        def send(self, message: dict[str, Any]) -> None:
            events.append(message)

    told = agent_events.Events(Reader())  # type: ignore[arg-type]
    for n in range(agent_events.MOST_EVENTS + 7):
        told.line(3, 0.0, f"{n}")
    assert len(events) == agent_events.MOST_EVENTS
    told.asked()
    assert events[-1]["fields"]["text"] == "7 messages were left out: too many at once"
    assert source.call("clock")


@pytest.mark.parametrize(
    "name", [b"../x", b"/x", b".x", b"a/b", b"parent", b"a\0b", b"\xff", b"x" * 200]
)
def test_images_have_plain_names(connect: Connect, name: bytes) -> None:
    source = connect()
    source.begin()
    source.send("dump", piece(name, b"x"), channel=1)
    said = source.refused("join", {"name": "dump", "timeout": 20})
    assert "not the name of a memory image" in said or "NUL" in said, said
