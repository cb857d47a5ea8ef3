# SPDX-License-Identifier: Apache-2.0
"""The source's end of the agent's protocol against an agent that floods, drips, talks
without end, or answers with something else."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyploop.diskcopy import digests
from pyploop.errors import (
    CancelledError,
    MigrateError,
    ProtocolError,
    PyploopError,
    ReadError,
)
from pyploop.migration import file_stream
from pyploop.migration.source import payload
from pyploop.migration.source.agent_client import Remote
from pyploop.system import stderr_tail
from pyploop.system.jobs import Job
from pyploop.transport import mux
from pyploop.transport.client import EVENT_BYTES
from pyploop.transport.mux import Mux
from pyploop.wire import channels
from pyploop.wire import mux as wire

AGENT = """
import json, os, struct, sys, threading, time

def ends():
    while os.read(0, 65536):
        pass
    os._exit(0)

def message(**values):
    text = json.dumps(values).encode()
    os.write(1, struct.pack("<BBHI", 1, 0, 0, len(text)) + text)

def event(text="x", name="line"):
    message(event=name, at=1, fields={{"level": 3, "text": text}})

os.write(1, b"PYPLOOP-AGENT 1 0.1.0\\n")
reader = threading.Thread(target=ends, daemon=True)
reader.start()
{body}
reader.join()
"""


def remote(body: str, events: list[Any] | None = None) -> Remote:
    """Connected to that agent; what comes before `--` is not looked at."""
    program = [sys.executable, "-c", AGENT.format(body=body), "--"]
    seen = events if events is not None else []
    return Remote("host", program, (), ("agent",), lambda *event: seen.append(event))


def test_an_older_agent_is_asked_for_no_channel_that_it_would_refuse() -> None:
    with remote("pass") as target:
        for number in range(1, channels.LAST_OLD + 1):
            opened, fd = target.open_channel()
            os.close(fd)
            assert opened == number
        with pytest.raises(MigrateError, match="no more than 63 channels"):
            target.open_channel()
        target.capabilities = ("channels",)
        opened, fd = target.open_channel()
        os.close(fd)
        assert opened == channels.LAST_OLD + 1
        with pytest.raises(MigrateError, match="too many for one migration"):
            payload.check_number(target, 200, 30, 0)


@pytest.mark.parametrize(("disks", "trees", "rounds"), [(60, 0, 0), (35, 1, 20), (0, 12, 0)])
def test_an_older_agent_takes_as_many_disks_and_trees_as_it_has_channels(
    disks: int, trees: int, rounds: int
) -> None:
    with remote("pass") as target:
        with pytest.raises(MigrateError, match="which takes 63 channels"):
            payload.check_number(target, disks, trees, rounds)
        payload.check_number(target, max(disks - 1, 0), min(trees, 11), rounds)
        target.capabilities = ("channels",)
        payload.check_number(target, disks, trees, rounds)


ENDLESS = "while True:\n    event()\n    time.sleep(0.01)"


def test_one_who_always_has_another_event_is_late_all_the_same() -> None:
    events: list[Any] = []
    with remote(ENDLESS, events) as target, pytest.raises(ReadError, match="no answer within 2 s"):
        target.call("clock", 2)
    assert events


def test_events_without_end_end_the_connection() -> None:
    body = "while True:\n    event('x' * 60000)"
    with remote(body) as target, pytest.raises(ProtocolError, match=r"of events came|flood"):
        target.call("clock", 60)


def test_an_answer_that_nobody_wants_any_more_is_not_waited_for() -> None:
    """After ^C, or when another disk has failed: a target may be silent for --timeout."""
    body = "time.sleep(1.5)\nmessage(id=1, ok=dict())\nmessage(id=2, ok={})"
    over = threading.Event()
    with remote(body) as target:
        job = Job(lambda: target.call("join", 600, over.is_set)).start()
        over.set()
        with pytest.raises(CancelledError):
            job.join(1.4)
        assert target.call("undo", 20) == {}  # the late answer is not this one's


def test_who_waits_when_the_connection_is_cut_fails_by_the_reason() -> None:
    """A target that is silent when the last pass of a tree is over (--suspend-limit)."""
    with remote("pass") as target:
        job = Job(lambda: target.call("join", 60)).start()
        with pytest.raises(TimeoutError):
            job.join(0.3)
        target.cut(MigrateError(6, "suspended for too long"))
        with pytest.raises(MigrateError, match="suspended for too long") as failed:
            job.join(10)
    assert failed.value.exit_code == 6


@pytest.mark.parametrize("name", ["line", "progress"])
def test_events_of_many_requests_do_not_fill_the_log(name: str) -> None:
    """Each request may bring some MiB of them, and a migration has a hundred or more."""
    body = f"""
for number in range(1, 9):
    for _ in range(50):
        event("x" * 60000, "{name}")
    message(id=number, ok={{"monotonic": 1}})
    time.sleep(0.05)
"""
    events: list[Any] = []
    with remote(body, events) as target:
        for _ in range(8):
            target.call("clock", 20)
    assert 100 < len(events) <= EVENT_BYTES / 60000 + 1
    last = events[-1][2]["text"]
    assert last == "this host sends too many messages: the rest of them is left out"
    assert all(event[2]["text"].startswith("x") for event in events[:-1])


def test_what_an_agent_prints_without_end_is_not_kept() -> None:
    """In a file it would fill the source's disk."""
    body = "os.write(2, b'no end' * 100000)\nos.write(2, b'last words')\nos._exit(1)"
    with remote(body) as target, pytest.raises(PyploopError, match="last words"):
        target.call("clock", 20)


def test_the_end_of_a_long_output_is_kept() -> None:
    kept = stderr_tail.LastWords()
    fd = os.dup(kept.fd)
    kept.started()
    for n in range(2000):
        os.write(fd, b"%0100d" % n)
    os.close(fd)
    assert kept.text(ended=True) == "".join(f"{n:0100d}" for n in range(2000))[-stderr_tail.KEPT :]
    kept.close()


WRONG: dict[str, tuple[str, Any]] = {
    "a list": ("clock", []),
    "nothing": ("clock", {}),
    "a text for a moment": ("clock", {"monotonic": "1"}),
    "a flag for a moment": ("clock", {"monotonic": True}),
    "names that are none": ("begin", {"kept": [5]}),
    "takes that is no list": ("check", {"takes": {"memory": 1}}),
    "moments that are none": ("restore", {"moments": []}),
    "moments without one": ("restore", {"moments": {"restore": 1.0, "running": 2.0}}),
    "a moment before all time": ("restore", {"moments": {"restore": -1e300}}),
    "a verdict that is none": ("settle", {"verdict": "maybe", "failed": []}),
    "no verdict": ("settle", {"failed": []}),
    "failures that are none": ("undo", {"failed": "everything"}),
    "a name that is none": ("tree", {"name": 5}),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_an_answer_of_another_kind_is_an_error_of_the_protocol(what: str) -> None:
    op, ok = WRONG[what]
    body = f"message(id=1, ok=json.loads({json.dumps(json.dumps(ok))}))"
    with remote(body) as target, pytest.raises(ProtocolError, match="wrong answer"):
        target.call(op, 20)
        target.cut(ReadError("over"))


@pytest.mark.parametrize(
    "event",
    [{"event": 5}, {"event": "x"}, {"event": "x", "at": "1"}, {"event": "x", "at": 1, "fields": 5}],
)
def test_an_event_of_another_kind_is_an_error_of_the_protocol(event: dict[str, Any]) -> None:
    body = f"message(**json.loads({json.dumps(json.dumps(event))}))"
    with remote(body) as target, pytest.raises(ProtocolError, match="wrong event"):
        target.call("clock", 20)


@pytest.mark.parametrize("error", [None, 5, [], {}, {"code": 10**9}, {"code": True}, {"code": "7"}])
def test_a_failure_of_another_kind_has_an_exit_code(error: Any) -> None:
    body = f"message(id=1, error=json.loads({json.dumps(json.dumps(error))}))"
    with remote(body) as target, pytest.raises(MigrateError) as failed:
        target.call("clock", 20)
    assert failed.value.exit_code == 1


@pytest.mark.parametrize(("told", "code"), [(4, 6), (8, 7), (9, 9), (20, 20), (21, 1), (127, 1)])
def test_where_the_container_is_no_target_tells_by_an_exit_code(told: int, code: int) -> None:
    """4: it may run there.  8: it does, or has not been suspended here."""
    body = f"message(id=1, error=dict(code={told}, message='no'))"
    with remote(body) as target, pytest.raises(MigrateError) as failed:
        target.call("clock", 20)
    assert failed.value.exit_code == code


# ---- the connection


@pytest.fixture
def ends() -> Iterator[tuple[Mux, socket.socket]]:
    ours, theirs = socket.socketpair()
    end = Mux(ours.fileno(), ours.fileno())
    try:
        yield end, theirs
    finally:
        end.close()
        ours.close()
        theirs.close()


def dead(end: Mux) -> PyploopError:
    with pytest.raises(PyploopError) as failed:
        while True:
            end.receive(20)
    return failed.value


def test_messages_that_nobody_asks_for_are_bounded(ends: tuple[Mux, socket.socket]) -> None:
    """13 MiB of them took 270, and 3 GiB on a source that was suspended meanwhile."""
    end, peer = ends
    flood = (wire.frame(wire.CONTROL, 0, 2) + b"{}") * 1000
    peer.settimeout(0.2)  # nobody reads when it is dead
    while end.failure is None:
        with contextlib.suppress(OSError):
            peer.sendall(flood)
    assert "a flood of messages" in str(end.failure)
    assert end._arrived <= mux.INBOX + mux.OVERHEAD + 2


def test_small_frames_take_no_more_than_their_bytes(ends: tuple[Mux, socket.socket]) -> None:
    end, peer = ends
    Job(lambda: [*iter(lambda: peer.recv(1 << 16), b"")]).start()  # the credit, until the end
    fd = end.open(1)  # which nobody reads yet
    large = wire.frame(wire.DATA, 1, wire.MAX_DATA) + bytes(wire.MAX_DATA)
    peer.sendall(large * 6)
    peer.sendall((wire.frame(wire.DATA, 1, 2) + b"xx") * 20_000 + wire.encode({"id": 1}))
    end.receive(20)  # all before it has been taken
    channel = end._channels[1]
    assert isinstance(channel, mux._Channel) and len(channel._incoming) < 12
    with socket.socket(fileno=fd) as s:
        s.settimeout(20)
        size = 6 * wire.MAX_DATA
        assert _exactly(s, size) == bytes(size)
        assert _exactly(s, 40_000) == b"x" * 40_000


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part
        data += part
    return data


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        (wire.frame(wire.DATA, 1, 0), "with 0 bytes"),
        (wire.frame(wire.END, 1, 0) + wire.frame(wire.DATA, 1, 1) + b"x", "after the end"),
    ],
)
def test_data_without_bytes_or_after_the_end_end_the_connection(
    ends: tuple[Mux, socket.socket], frames: bytes, why: str
) -> None:
    end, peer = ends
    fd = end.open(1)
    peer.sendall(frames)
    assert why in str(dead(end))
    os.close(fd)


def test_ends_of_a_channel_take_no_memory(ends: tuple[Mux, socket.socket]) -> None:
    end, peer = ends
    fd = end.open(1)
    peer.sendall(wire.frame(wire.END, 1, 0) * 10000 + wire.encode({}))
    assert end.receive(20) == {}
    channel = end._channels.get(1)
    assert channel is None or (isinstance(channel, mux._Channel) and not channel._incoming)
    os.close(fd)


# ---- files


@pytest.fixture
def channel() -> Iterator[tuple[int, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours.detach(), theirs
    theirs.close()


def place(folder: Path, **limits: Any) -> file_stream.Place:
    def opened(flags: int) -> Callable[[str], int]:
        return lambda name: os.open(folder / name, os.O_WRONLY | flags, 0o600)

    return file_stream.Place(opened(os.O_CREAT | os.O_EXCL), opened(0), **limits)


def head(name: bytes, data: bytes, pos: int = 0) -> bytes:
    return struct.pack("<HHIQ", len(name), 0o600, len(data), pos) + name + data


REFUSED: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "larger than its kind": (head(b"a", b"", 101), {"largest": lambda _: 100}, "100 bytes"),
    "data beyond its kind": (head(b"a", b"x", 100), {"largest": lambda _: 100}, "100 bytes"),
    "more than announced": (
        head(b"a", b"x" * 60) + head(b"b", b"x" * 60),
        {"budget": file_stream.Budget(100)},
        "100 bytes",
    ),
    "too many files": (
        head(b"a", b"") + head(b"b", b"") + head(b"c", b""),
        {"most_files": 2},
        "more than 2 files",
    ),
    "a NUL in a name": (head(b"a\0b", b"x"), {}, "NUL"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_a_stream_of_files_keeps_to_its_limits(
    channel: tuple[int, socket.socket], tmp_path: Path, what: str
) -> None:
    stream, limits, why = REFUSED[what]
    channel[1].sendall(stream)
    with pytest.raises(ProtocolError, match=why):
        file_stream.receive(channel[0], 20, place(tmp_path, **limits))


def test_files_that_are_all_begun_and_never_complete_are_bounded(
    channel: tuple[int, socket.socket], tmp_path: Path
) -> None:
    one_by_one = file_stream.Place(place(tmp_path).create)
    channel[1].sendall(b"".join(head(b"%d" % n, b"x") for n in range(file_stream.MOST_OPEN + 1)))
    with pytest.raises(ProtocolError, match="are not complete"):
        file_stream.receive(channel[0], 20, one_by_one)


@pytest.mark.parametrize("what", ["files", "digests"])
def test_one_who_drips_is_given_up(
    channel: tuple[int, socket.socket], tmp_path: Path, what: str
) -> None:
    """A byte before each deadline is no progress."""
    over = threading.Event()

    def drip() -> None:
        for byte in head(b"a", bytes(1 << 16)):
            if over.wait(0.05):
                return
            channel[1].sendall(bytes([byte]))

    dripping = Job(drip).start()
    try:
        with pytest.raises(ReadError, match=r"less than 64 KiB|does not send the digests"):
            if what == "files":
                file_stream.receive(channel[0], 0.5, place(tmp_path))
            else:
                reader = digests.Reader(channel[0], 0.5)
                try:
                    list(reader.runs(1 << 30))
                finally:
                    reader.close()
    finally:
        over.set()
        dripping.end()
