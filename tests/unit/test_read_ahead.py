# SPDX-License-Identifier: Apache-2.0
"""Pages that the relay of a post-copy reads ahead of `criu lazy-pages`: against a page server
that answers as CRIU's does, and a daemon that asks as CRIU's does."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections import deque
from collections.abc import Iterator
from functools import partial

import pytest

from pyploop.runtimes.lazy_images import PAGE, LazyPages
from pyploop.runtimes.runc import page_store, read_ahead
from pyploop.runtimes.runc.page_stream import CriuSocket, Link, Stream
from pyploop.runtimes.runc.read_ahead import PagesError, ReadAhead
from pyploop.units import MIB
from pyploop.wire.page_server import ANSWER, GET, NARROW, WIDE, Layout, Message

CLOSE = 0x1024
START = 0x7F0000000000
PROCESS = 7


def page(process: int, address: int) -> bytes:
    return (process * 31 + address // PAGE).to_bytes(8, "little") * (PAGE // 8)


def ranges(*pieces: tuple[int, int]) -> LazyPages:
    found = LazyPages()
    for start, pages in pieces:
        found.add(start, pages)
    return found


class Scene:
    """CRIU's daemon - relay = keeper - page server, in one thread."""

    def __init__(self, pages: dict[int, LazyPages], layout: Layout = WIDE) -> None:
        self.pages, self.layout = pages, layout
        pairs = [socket.socketpair() for _ in range(2)]
        self.daemon, self.server = pairs[0][1], pairs[1][1]
        for sock in (self.daemon, self.server):
            sock.setblocking(False)
        self.ahead = ReadAhead(pairs[0][0], lambda: self.ahead.know(pages))
        self.keeper = CriuSocket(pairs[1][0])
        self.streams = Stream(), Stream()
        self.line: list[socket.socket] = []
        self.asked: list[Message] = []
        """Of the page server, in order."""
        self.serving = True
        self._answers: deque[memoryview] = deque()
        self._said, self._heard = b"", b""
        self.connect()

    def connect(self) -> None:
        """Anew; what was on the way is lost."""
        for old in self.line:
            old.close()
        self.line = list(socket.socketpair())
        for stream, one in zip(self.streams, self.line, strict=True):
            fds = os.dup(one.fileno()), os.dup(one.fileno())
            stream.attach(Link(*fds, partial(_close, fds)))

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.streams[0].turn(self.ahead, [], 0.0)
            self.streams[1].turn(self.keeper, [], 0.0)
            if self.serving:
                self._serve()

    def _serve(self) -> None:
        """As CRIU: it answers in order, to the end of a range at most, and ends at a request
        for a page that it does not have."""
        with contextlib.suppress(BlockingIOError):
            self._said += self.server.recv(1 << 16)
        while len(self._said) >= self.layout.size:
            request = self.layout.read(self._said[: self.layout.size])
            self._said = self._said[self.layout.size :]
            self.asked.append(request)
            if request.command == CLOSE:
                self._answers.append(memoryview(b"\0\0\0\0"))
                continue
            assert request.command == GET
            end = self.pages[request.process].end_of(request.address)
            assert end, f"{request.address:#x} is not there"
            count = min(request.pages, (end - request.address) // PAGE)
            head = self.layout.write(request._replace(command=ANSWER, pages=count))
            data = b"".join(page(request.process, request.address + n * PAGE) for n in range(count))
            self._answers.append(memoryview(head + data))
        try:
            while self._answers:
                n = self.server.send(self._answers[0])
                self._answers[0] = self._answers[0][n:]
                if not self._answers[0]:
                    self._answers.popleft()
        except BlockingIOError:
            pass

    def ask(self, address: int, pages: int = 1, process: int = PROCESS) -> None:
        self.daemon.sendall(self.layout.write(Message(GET, pages, address, process)))

    def answers(self) -> list[tuple[int, int]]:
        """(address, pages) of complete ones that the daemon has got by now; what is in them
        is right."""
        found = []
        try:
            while data := self.daemon.recv(1 << 20):
                self._heard += data
        except BlockingIOError:
            pass
        while len(self._heard) >= self.layout.size:
            head = self.layout.read(self._heard[: self.layout.size])
            end = self.layout.size + head.pages * PAGE
            if len(self._heard) < end:
                break
            data, self._heard = self._heard[self.layout.size : end], self._heard[end:]
            assert head.command == ANSWER
            for n in range(head.pages):
                expected = page(head.process, head.address + n * PAGE)
                assert data[n * PAGE : (n + 1) * PAGE] == expected
            found.append((head.address, head.pages))
        return found

    def until_answered(self) -> tuple[int, int]:
        for _ in range(2000):
            self.turn()
            if found := self.answers():
                (one,) = found
                return one
        raise AssertionError("no answer")

    def take_all(self, process: int = PROCESS) -> int:
        """As the daemon loads a process: one request in the background after the other, twice
        as long each.  Returns the pages."""
        total, size = 0, 16
        for start, end in zip(self.pages[process].starts, self.pages[process].ends, strict=True):
            at = start
            while at < end:
                self.ask(at, min(size, (end - at) // PAGE), process)
                size = min(2 * size, 1024)
                address, pages = self.until_answered()
                assert address == at and pages
                at += pages * PAGE
                total += pages
        return total

    def close(self) -> None:
        for stream in self.streams:
            stream.detach()
        self.ahead.close()
        self.keeper.close()
        for sock in (self.daemon, self.server, *self.line):
            sock.close()


def _close(fds: tuple[int, int]) -> None:
    for fd in fds:
        os.close(fd)


@pytest.fixture
def made() -> Iterator[list[Scene]]:
    scenes: list[Scene] = []
    yield scenes
    for one in scenes:
        one.close()


def scene(made: list[Scene], *pieces: tuple[int, int], layout: Layout = WIDE) -> Scene:
    made.append(Scene({PROCESS: ranges(*pieces)}, layout))
    return made[0]


@pytest.mark.parametrize("layout", [WIDE, NARROW], ids=["64 bits", "32 bits"])
def test_all_pages_come_once_and_are_asked_for_in_large_parts(
    made: list[Scene], layout: Layout
) -> None:
    one = scene(made, (START, 5000), (START + 64 * MIB, 3), layout=layout)
    assert one.take_all() == 5003
    assert sum(m.pages for m in one.asked) == 5003
    assert len(one.asked) < 40
    assert one.ahead.answered == 5003 * PAGE


def test_pages_come_before_they_are_asked_for(made: list[Scene]) -> None:
    one = scene(made, (START, 2000))
    one.ask(START)
    one.turn(100)
    one.answers()
    assert sum(m.pages for m in one.asked) == 2000
    one.serving = False
    assert one.take_all() == 2000


def test_a_page_that_a_process_waits_for_goes_before_what_is_read_ahead(
    made: list[Scene],
) -> None:
    one = scene(made, (START, 20000))
    far = START + 15000 * PAGE
    one.ask(START)
    one.turn(4)
    one.answers()
    asked, arrived = len(one.asked), one.ahead.answered
    one.ask(far)
    assert one.until_answered() == (far, 1)
    later = [m.address for m in one.asked[asked:]]
    assert far in later
    waited = sum(m.pages for m in one.asked[asked : asked + later.index(far)]) * PAGE
    assert waited <= read_ahead.MOST_WINDOW
    assert one.ahead.answered == arrived + PAGE


def test_an_answer_has_what_is_here_when_another_request_waits_behind_it(
    made: list[Scene],
) -> None:
    one = scene(made, (START, 300), (START + MIB * 16, 1))
    one.ask(START)
    assert one.until_answered() == (START, 1)
    one.turn(20)
    one.serving = False
    one.ask(START + PAGE, 299)
    one.ask(START + MIB * 16)
    one.turn(20)
    found = one.answers()
    assert [address for address, _ in found] == [START + PAGE, START + MIB * 16]


def test_memory_that_nobody_takes_is_bounded(made: list[Scene]) -> None:
    one = scene(made, (START, 60000))
    one.ask(START)
    one.turn(1000)
    ahead = sum(m.pages for m in one.asked) * PAGE
    assert ahead <= page_store.AHEAD + 2 * read_ahead.PART, ahead


def test_pages_at_random_are_bounded_and_all_are_right(made: list[Scene]) -> None:
    one, chance = scene(made, (START, 40000)), random.Random(3)
    for _ in range(600):
        at = START + chance.randrange(40000) * PAGE
        one.ask(at)
        assert one.until_answered() == (at, 1)
        store = one.ahead._store
        assert store.wanted <= page_store.WANTED + read_ahead.NEIGHBOURS
        assert store.ahead <= page_store.AHEAD + read_ahead.PART
    assert one.take_all() == 40000


def test_a_range_that_the_process_gave_back_does_not_stay(made: list[Scene]) -> None:
    one = scene(made, (START, 4000), (START + 64 * MIB, 100))
    one.ask(START)
    one.turn(200)
    one.answers()
    one.ask(START + 64 * MIB, 100)
    assert one.until_answered() == (START + 64 * MIB, 100)
    assert one.ahead._store.ahead == one.ahead._store.wanted == 0


def test_pages_are_asked_for_again_when_a_forked_process_wants_them_too(
    made: list[Scene],
) -> None:
    one = scene(made, (START, 1000))
    assert one.take_all() == one.take_all() == 1000


def test_pages_that_lie_apart_are_asked_for_many_at_a_time(made: list[Scene]) -> None:
    one = scene(made, *((START + 2 * n * PAGE, 1) for n in range(500)))
    one.turn(3)
    one.ask(START)
    one.turn()
    assert not one.streams[0]._waiting, "what was asked is not sent"
    assert one.until_answered() == (START, 1)
    assert one.take_all() == 500
    assert len(one.asked) <= 501


def test_processes_have_their_turns(made: list[Scene]) -> None:
    pages = {n: ranges((START, 3000)) for n in (7, 8, 9)}
    made.append(Scene(pages))
    one = made[0]
    one.ask(START, 1, 7)
    one.turn(6)
    assert {m.process for m in one.asked} == {7, 8, 9}
    assert one.until_answered() == (START, 1)
    assert [one.take_all(n) for n in pages] == [3000] * 3


@pytest.mark.parametrize("seed", range(3))
def test_cuts_lose_and_double_nothing(made: list[Scene], seed: int) -> None:
    one, chance = scene(made, (START, 8000)), random.Random(seed)
    at, size, turns = START, 16, 0
    one.ask(at, size)
    while at < START + 8000 * PAGE:
        if turns == 0:
            one.connect()
            turns = chance.randrange(2, 30)
        turns -= 1
        one.turn()
        for address, pages in one.answers():
            assert address == at
            at += pages * PAGE
            size = min(2 * size, 1024, (START + 8000 * PAGE - at) // PAGE)
            if size:
                one.ask(at, size)
    assert sum(m.pages for m in one.asked) == 8000


def test_the_end_is_carried_to_the_source_and_its_answer_back(made: list[Scene]) -> None:
    one = scene(made, (START, 100))
    one.take_all()
    one.daemon.sendall(WIDE.write(Message(CLOSE, 0, 0, 0)))
    one.turn(50)
    assert one.daemon.recv(100) == b"\0\0\0\0"
    assert one.asked[-1].command == CLOSE


def test_without_lists_of_pages_all_is_carried_as_it_is(made: list[Scene]) -> None:
    one = scene(made, (START, 100))
    one.ahead._learn = lambda: None
    one.ask(START, 40)
    assert one.until_answered() == (START, 40)
    assert one.ahead.why_not
    assert [m.pages for m in one.asked] == [40]


@pytest.mark.parametrize(
    "answer",
    [
        Message(ANSWER, 2**40, START, PROCESS),
        Message(ANSWER, 0, START, PROCESS),
        Message(ANSWER, 1, START + PAGE, PROCESS),
        Message(ANSWER, 1, START, PROCESS + 1),
        Message(GET, 1, START, PROCESS),
    ],
    ids=["too long", "empty", "another address", "another process", "no answer"],
)
def test_an_answer_to_another_question_is_refused(made: list[Scene], answer: Message) -> None:
    one = scene(made, (START, 100))
    one.serving = False
    one.ask(START)
    one.turn(5)
    one.server.sendall(WIDE.write(answer))
    with pytest.raises(PagesError, match="does not answer what it was asked"):
        one.turn(20)


def test_what_nobody_asked_for_is_refused(made: list[Scene]) -> None:
    one = scene(made, (START, 16))
    one.ask(START)
    one.until_answered()
    one.turn(20)
    one.server.sendall(b"x")
    with pytest.raises(PagesError, match="nobody asked for"):
        one.turn(20)
