# SPDX-License-Identifier: Apache-2.0
"""Reads the pages of a post-copy ahead of `criu lazy-pages` (docs/internals/post-copy.md).

CRIU's daemon has one request in the background for each process, begins again with 64 KiB
after each page fault, and waits for a round trip each time.  The relay knows from the images
which pages will be wanted.  So it asks for them itself, in order, as fast as they come, and
answers CRIU from what has come.

- CRIU takes answers in the order of its requests.  It takes an answer with fewer pages than it
  asked for, and asks for the others later.  So an answer is what is here, and no request waits
  for more than its first page.
- A page that CRIU asks for and that was not asked for goes out at once, before what would be
  read ahead next.  What is on its way already comes before it, so that is bounded: by what
  arrives in STANDING seconds, above what the round trip needs.
- The source's page server copies pages out of its pipes, so they can be asked for again.  It
  ends at a request for a page that it does not have.  So only pages of its own lists, and those
  that CRIU wants, are asked for, and never across the border of two ranges.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping

from pyploop.runtimes.lazy_images import PAGE, LazyPages
from pyploop.runtimes.runc.page_local import LocalPages
from pyploop.runtimes.runc.page_store import AHEAD, Chunk, PageStore
from pyploop.runtimes.runc.page_stream import PIECE, CriuSocket, Stream
from pyploop.wire.page_server import ANSWER, GET, NARROW, WIDE, Layout, Message

PART = 1 << 20
"""Bytes that are read ahead with one request, at most."""
NEIGHBOURS = 64 << 10
"""Bytes that come with a page that a process waits for."""
STANDING = 0.05
"""Seconds that a page may wait for those that are on their way."""
LEAST_WINDOW, MOST_WINDOW = 2 << 20, 8 << 20
"""Bytes on their way, for a slow connection and for a fast one."""
MOST_ASKED = 256
"""Requests on their way."""
BATCH = 64
"""Pages that are worth an answer when more of the same request are about to come."""
UNSENT = 1 << 20
"""Bytes for CRIU that wait for room in its socket, above which no more are added."""


class PagesError(Exception):
    """The source does not answer what was asked."""


class ReadAhead(CriuSocket):
    """CRIU's socket at the target."""

    def __init__(self, sock: socket.socket, learn: Callable[[], None]) -> None:
        """learn: is called when CRIU begins, and calls `know`."""
        super().__init__(sock)
        self._learn = learn
        self.why_not = ""
        """Why nothing is read ahead."""
        self.answered = 0
        """Bytes of pages that CRIU has got."""
        self._layout: Layout | None = None
        self._raw = False
        """The bytes of both sides are carried as they are."""
        self._pages: Mapping[int, LazyPages] = {}
        """Of the source."""
        self._local: LocalPages | None = None
        self._cursors: deque[Cursor] = deque()
        self._store = PageStore()
        self._said = b""
        """By CRIU; less than a request."""
        self._requests: deque[Message] = deque()
        """Of CRIU, without an answer."""
        self._closing = b""
        """What CRIU said last: it wants no more pages."""
        self._asked: deque[Chunk] = deque()
        """In the order in which their answers come."""
        self._flight = self._arrived = 0
        """Bytes: asked for; come in all."""
        self._head = b""
        """Of an answer; less than all of it."""
        self._out: deque[memoryview] = deque()
        self._unsent = 0
        self._rate, self._quickest = 0.0, 1.0
        """Bytes a second; seconds of the quickest answer."""

    def know(self, pages: Mapping[int, LazyPages], local: LocalPages | None = None) -> None:
        """Which pages the source has, by process, and which are on this host."""
        self._pages, self._local = pages, local
        self._cursors = deque(Cursor(n, ranges) for n, ranges in pages.items())

    def drained(self, stream: Stream) -> bool:
        """Nothing of what has come is on its way to CRIU."""
        return not self._out and not (self._raw and stream.incoming)

    # ---- what the stream calls

    def events(self, stream: Stream) -> dict[int, int]:
        if self._raw or self._sock is None:
            return super().events(stream)
        events = 0 if self.eof or self._closing else select.POLLIN
        if self._out:
            events |= select.POLLOUT
        return {self._sock.fileno(): events} if events else {}

    def move(self, stream: Stream) -> None:
        if not self._raw and self._sock is not None:
            self._from_criu(self._sock, stream)
        if self._raw or self._sock is None:
            super().move(stream)
            return
        self._from_source(stream)
        self._answer(stream)
        self._read_ahead(stream)
        self._to_criu(self._sock)
        if self._closing and not self._asked and not self._out:
            stream.say(self._closing)
            self._raw = True

    # ---- CRIU's requests

    def _from_criu(self, sock: socket.socket, stream: Stream) -> None:
        if self.eof or self._closing:
            return
        try:
            data = sock.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.eof = True
            return
        self._said += data
        if self._layout is None and not self._find_layout():
            if self._raw:
                stream.say(self._said)
            return
        assert self._layout is not None
        size = self._layout.size
        while len(self._said) >= size:
            request = self._layout.read(self._said[:size])
            if request.command != GET or not request.pages:
                self._closing = self._said
                return
            self._said = self._said[size:]
            self._requests.append(request)
            if not self._is_local(request) and self._here(request) is None:
                self._want(request, stream)

    def _find_layout(self) -> bool:
        """From the first request: it must be for pages that are in the lists."""
        self._learn()
        for layout in (WIDE, NARROW):
            if len(self._said) >= layout.size:
                first = layout.read(self._said[: layout.size])
                ranges = self._pages.get(first.process)
                known = ranges and ranges.end_of(first.address)
                if first.command == GET and (known or self._is_local(first)):
                    self._layout = layout
                    return True
        if len(self._said) >= WIDE.size:
            self.why_not = self.why_not or "CRIU's requests are of an unknown kind"
            self._raw = True
        return False

    def _is_local(self, request: Message) -> bool:
        return self._local is not None and self._local.has(request.process, request.address)

    def _here(self, request: Message) -> Chunk | None:
        """The chunk, asked for or here, that its first page is in."""
        return self._store.find(request.process, request.address)

    def _want(self, request: Message, stream: Stream) -> None:
        """Ask for it now, before anything else."""
        start, ranges = request.address, self._pages.get(request.process)
        border = ranges.end_of(start) if ranges else 0
        size = min(request.pages * PAGE, PART)
        if request.pages == 1 and border:
            size = NEIGHBOURS
        end = min(start + size, border or start + size)
        end = self._store.next_start(request.process, start, end)
        self._ask(Chunk(request.process, start, end, ahead=False), stream)

    def _ask(self, chunk: Chunk, stream: Stream) -> None:
        assert self._layout is not None
        chunk.asked, chunk.before = time.monotonic(), self._arrived
        self._store.add(chunk)
        self._asked.append(chunk)
        self._flight += chunk.size
        pages = chunk.size // PAGE
        stream.say(self._layout.write(Message(GET, pages, chunk.start, chunk.process)))

    # ---- ahead of them

    @property
    def window(self) -> int:
        """Bytes that may be on their way."""
        size = int(self._rate * (self._quickest + STANDING))
        return min(max(size, LEAST_WINDOW), MOST_WINDOW)

    def _read_ahead(self, stream: Stream) -> None:
        if self._layout is None or self._closing:
            return
        window = self.window
        while (
            self._cursors
            and self._flight < window
            and self._store.ahead < AHEAD
            and len(self._asked) < MOST_ASKED
            and stream.room
        ):
            cursor = self._cursors[0]
            start, end = cursor.next(self._store, min(PART, window // 2 // PAGE * PAGE))
            if start == end:
                self._cursors.popleft()
                continue
            self._cursors.rotate(-1)  # each process has its turn
            self._ask(Chunk(cursor.process, start, end, ahead=True), stream)

    # ---- the source's answers

    def _from_source(self, stream: Stream) -> None:
        while stream.incoming:
            data = stream.incoming[0]
            if not self._asked:
                raise PagesError("the source's page server sends what nobody asked for")
            chunk = self._asked[0]
            if not chunk.data:
                assert self._layout is not None
                data = data[: self._layout.size - len(self._head)]
                self._head += data
                stream.took(len(data))
                if len(self._head) == self._layout.size:
                    self._begin(chunk, self._layout.read(self._head))
                    self._head = b""
                continue
            data = data[: chunk.size - chunk.filled]
            chunk.data[chunk.filled : chunk.filled + len(data)] = data
            chunk.filled += len(data)
            self._flight -= len(data)
            self._arrived += len(data)
            stream.took(len(data))
            if chunk.complete:
                self._asked.popleft()
                self._measure(chunk)

    def _begin(self, chunk: Chunk, answer: Message) -> None:
        """An answer begins.  Its length is checked before there is room for it."""
        asked = chunk.size // PAGE
        right = (ANSWER, chunk.start, chunk.process)
        if (answer.command, answer.address, answer.process) != right or not (
            0 < answer.pages <= asked
        ):
            raise PagesError(
                f"the source's page server does not answer what it was asked: {answer}, and not "
                f"{asked} pages at {chunk.start:#x} of process {chunk.process}"
            )
        self._flight -= (asked - answer.pages) * PAGE
        self._store.shorten(chunk, chunk.start + answer.pages * PAGE)
        chunk.data = bytearray(chunk.size)

    def _measure(self, chunk: Chunk) -> None:
        seconds = max(time.monotonic() - chunk.asked, 1e-6)
        self._quickest = min(self._quickest, seconds)
        rate = (self._arrived - chunk.before) / seconds
        self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate

    # ---- the answers to CRIU

    def _answer(self, stream: Stream) -> None:
        while self._requests and self._unsent < UNSENT:
            request = self._requests[0]
            if self._is_local(request):
                self._requests.popleft()
                self._send_local(request)
                continue
            chunk = self._here(request)
            if chunk is None:  # CRIU has had it before: a process has forked, say
                self._want(request, stream)
                return
            here = min(chunk.pages_from(request.address), request.pages)
            more = min(request.pages, (chunk.end - request.address) // PAGE) > here
            comes = more and here < BATCH and stream.peer_ended is None
            if here <= 0 or (comes and len(self._requests) == 1):
                return
            self._requests.popleft()
            self._send(request, chunk, here)

    def _send(self, request: Message, chunk: Chunk, pages: int) -> None:
        address, size = request.address, pages * PAGE
        at = address - chunk.start
        self._put(request, memoryview(chunk.data)[at : at + size])
        # One page: a process waits for it, wherever it is.
        self._store.used(chunk, address, address + size, in_order=request.pages > 1)

    def _send_local(self, request: Message) -> None:
        assert self._local is not None
        most = min(request.pages * PAGE, PART)
        try:
            data = self._local.read(request.process, request.address, most)
        except OSError as e:
            raise PagesError(str(e.strerror)) from e
        self._put(request, memoryview(data))

    def _put(self, request: Message, data: memoryview) -> None:
        assert self._layout is not None
        answer = request._replace(command=ANSWER, pages=len(data) // PAGE)
        head = memoryview(self._layout.write(answer))
        self._out += (head, data)
        self._unsent += len(head) + len(data)
        self.answered += len(data)

    def _to_criu(self, sock: socket.socket) -> None:
        try:
            while self._out:
                n = sock.sendmsg([self._out[i] for i in range(min(8, len(self._out)))])
                self._unsent -= n
                while n and n >= len(self._out[0]):
                    n -= len(self._out.popleft())
                if n:
                    self._out[0] = self._out[0][n:]
        except BlockingIOError:
            return
        except OSError:
            self.close()


class Cursor:
    """Where reading ahead has come to in the memory of a process."""

    def __init__(self, process: int, pages: LazyPages) -> None:
        self.process = process
        self._pages = pages
        self._range = self._address = 0

    def next(self, store: PageStore, most: int) -> tuple[int, int]:
        """What is asked for next: addresses in one range; equal ones: there is nothing left."""
        starts, ends = self._pages.starts, self._pages.ends
        while self._range < len(starts):
            start, end = max(self._address, starts[self._range]), ends[self._range]
            if start >= end:
                self._range += 1
            elif chunk := store.find(self.process, start):
                self._address = chunk.end
            else:
                end = store.next_start(self.process, start, min(end, start + most))
                self._address = end
                return start, end
        return 0, 0
