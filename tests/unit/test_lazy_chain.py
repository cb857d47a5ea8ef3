# SPDX-License-Identifier: Apache-2.0
"""Pages of memory rounds that are made lazy: the lists of a dump after it, and what CRIU's
daemon gets from the process that answers it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from pyploop.runtimes.lazy_images import PAGE, lazy_pages
from pyploop.runtimes.runc import lazy_chain, page_local
from pyploop.runtimes.runc.page_local import LocalPages, LocalServer
from pyploop.wire import criu
from pyploop.wire.page_server import ANSWER, GET, WIDE, Message
from pyploop.wire.protobuf import Malformed, varint_of

PID = 9
BASE = 0x7F0000000000
LAZY, PARENT, PRESENT = 2, 1, 4
ANONYMOUS, LOCKED = 0x22, 0x2022

Entry = tuple[int, int, int]
"""First page, number of pages, flags."""


def page(folder: str, number: int) -> bytes:
    return f"{folder}:{number};".encode().ljust(PAGE, b".")


def entry(fields: Mapping[int, int | bytes]) -> bytes:
    out = b""
    for number, value in fields.items():
        if isinstance(value, int):
            out += varint_of(number << 3) + varint_of(value)
        else:
            out += varint_of(number << 3 | 2) + varint_of(len(value)) + value
    return out


def image(kind: str, *entries: bytes) -> bytes:
    head = struct.pack("<II", criu.COMMON, criu.MAGICS[kind])
    return head + b"".join(struct.pack("<I", len(e)) + e for e in entries)


def write(folder: Path, entries: Sequence[Entry], parent: str = "") -> None:
    folder.mkdir()
    if parent:
        (folder / "parent").symlink_to(f"../{parent}")
    data = image("pagemap", entry({1: 3}))
    pages = b""
    for first, count, flags in entries:
        data += criu.pagemap_entry(BASE + first * PAGE, count, flags)
        if flags & PRESENT:
            pages += b"".join(page(folder.name, first + n) for n in range(count))
    (folder / f"pagemap-{PID}.img").write_bytes(data)
    (folder / "pages-3.img").write_bytes(pages)


def mappings(folder: Path, *pieces: Entry) -> None:
    """(first page, pages, flags)"""
    vmas = [
        entry({1: BASE + a * PAGE, 2: BASE + (a + n) * PAGE, 6: flags, 7: 1})
        for a, n, flags in pieces
    ]
    body = entry({1: 5}) + b"".join(entry({14: vma}) for vma in vmas)
    (folder / f"mm-{PID}.img").write_bytes(image("mm", body))


def listed(images: Path) -> list[Entry]:
    entries = criu.entries("pagemap", (images / f"pagemap-{PID}.img").read_bytes())
    next(entries)
    return [
        (((e.number(1) or 0) - BASE) // PAGE, e.number(5) or 0, e.number(4) or 0) for e in entries
    ]


class Chain:
    def __init__(self, top: Path) -> None:
        self.images, self.work = top / "images", top / "work"
        self.work.mkdir()
        write(top / "1", [(0, 100, PRESENT | LAZY), (200, 10, PRESENT), (300, 8, PRESENT | LAZY)])
        write(top / "2", [(0, 20, PARENT), (20, 5, PRESENT | LAZY), (25, 75, PARENT)], "1")
        self.last = [
            (0, 10, PARENT),
            (10, 2, LAZY),
            (12, 18, PARENT),
            (30, 1, PRESENT | LAZY),
            (31, 69, PARENT),
            (200, 10, PARENT),
            (300, 8, PARENT),
        ]
        write(self.images, self.last, "2")
        # The rounds at 200 and 300 are of the first one only, which the second one says too.
        write_more(top / "2", [(200, 10, PARENT), (300, 8, PARENT)])
        mappings(self.images, (0, 80, ANONYMOUS), (80, 20, LOCKED), (200, 200, ANONYMOUS))


def write_more(folder: Path, entries: Sequence[Entry]) -> None:
    with (folder / f"pagemap-{PID}.img").open("ab") as f:
        for first, count, flags in entries:
            f.write(criu.pagemap_entry(BASE + first * PAGE, count, flags))


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_what_the_rounds_have_is_lazy_unless_it_was_not_or_its_mapping_forbids_it(
    chain: Chain,
) -> None:
    lazy_chain.flatten(chain.images, chain.work)
    assert listed(chain.images) == [
        (0, 10, LAZY),
        (10, 2, LAZY),
        (12, 18, LAZY),
        (30, 1, PRESENT | LAZY),
        (31, 49, LAZY),
        (80, 20, PARENT),  # locked since
        (200, 10, PARENT),  # not lazy in the round
        (300, 8, LAZY),
    ]


def test_what_the_source_has_is_told_from_what_is_here(chain: Chain) -> None:
    lazy_chain.flatten(chain.images, chain.work)
    with contextlib.closing(LocalPages(chain.work / page_local.INDEX)) as local:
        pages = lazy_pages(chain.images, local.has)
    assert list(pages[PID].starts) == [BASE + 10 * PAGE]
    assert list(pages[PID].ends) == [BASE + 12 * PAGE]


def test_the_lists_are_put_back_for_an_eager_restore(chain: Chain) -> None:
    lazy_chain.flatten(chain.images, chain.work)
    lazy_chain.put_back(chain.images, chain.work)
    assert listed(chain.images) == chain.last


@pytest.mark.parametrize("what", ["list", "mappings"])
def test_nothing_is_changed_when_the_images_cannot_be_read(chain: Chain, what: str) -> None:
    name = f"pagemap-{PID}.img" if what == "list" else f"mm-{PID}.img"
    with (chain.images / name).open("ab") as f:
        f.write(b"\xff\xff\xff\xff")
    before = (chain.images / f"pagemap-{PID}.img").read_bytes()
    with pytest.raises(Malformed):
        lazy_chain.flatten(chain.images, chain.work)
    assert (chain.images / f"pagemap-{PID}.img").read_bytes() == before
    assert not (chain.work / lazy_chain.LISTS).exists()


def test_a_list_out_of_order_is_refused(chain: Chain) -> None:
    write_more(chain.images, [(5, 1, LAZY)])
    with pytest.raises(Malformed, match="not in order"):
        lazy_chain.flatten(chain.images, chain.work)


@pytest.fixture
def daemon(chain: Chain) -> Iterator[tuple[Chain, socket.socket, list[OSError]]]:
    lazy_chain.flatten(chain.images, chain.work)
    ours, theirs = socket.socketpair()
    failed: list[OSError] = []

    def serve() -> None:
        try:
            LocalServer(theirs, chain.work).serve()
        except OSError as e:
            failed.append(e)
        theirs.close()

    server = threading.Thread(target=serve)
    server.start()
    ours.settimeout(10)
    with ours:
        yield chain, ours, failed
        ours.shutdown(socket.SHUT_WR)
        server.join(10)


def exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := sock.recv(size - len(data))):
        data += part
    return data


def get(sock: socket.socket, first: int, count: int) -> bytes:
    """Ask as CRIU's daemon does: the pages that come with one answer."""
    sock.sendall(WIDE.write(Message(GET, count, BASE + first * PAGE, PID)))
    head = WIDE.read(exactly(sock, WIDE.size))
    assert head[0] == ANSWER and head[2:] == (BASE + first * PAGE, PID)
    assert 0 < head.pages <= count
    return exactly(sock, head.pages * PAGE)


def test_each_page_comes_from_the_newest_image_that_has_it(
    daemon: tuple[Chain, socket.socket, list[OSError]],
) -> None:
    chain, sock, _ = daemon
    origin = dict.fromkeys((*range(10), *range(12, 20), *range(25, 80), *range(300, 308)), "1")
    origin |= dict.fromkeys(range(20, 25), "2") | {30: "images"}
    at, wanted = 0, sorted(origin)
    while at < len(wanted):
        first = wanted[at]
        count = next(n for n in range(1, 400) if first + n not in origin)
        data = get(sock, first, count)
        for n in range(len(data) // PAGE):
            assert data[n * PAGE : (n + 1) * PAGE] == page(origin[first + n], first + n)
        at += len(data) // PAGE
    sock.sendall(WIDE.write(Message(0x1024, 0, 0, 0)))
    assert exactly(sock, 4) == b"\0\0\0\0"
    assert int((chain.work / page_local.PROGRESS).read_text()) == len(origin) * PAGE


def test_images_that_are_too_short_end_it(
    daemon: tuple[Chain, socket.socket, list[OSError]],
) -> None:
    chain, sock, failed = daemon
    os.truncate(chain.images.parent / "1" / "pages-3.img", PAGE)
    sock.sendall(WIDE.write(Message(GET, 10, BASE, PID)))
    while sock.recv(1 << 16):
        pass
    assert "the images end before" in str(failed[0])


def test_a_page_that_is_nowhere_ends_it(
    daemon: tuple[Chain, socket.socket, list[OSError]],
) -> None:
    _, sock, failed = daemon
    assert get(sock, 0, 1) == page("1", 0)
    sock.sendall(WIDE.write(Message(GET, 1, BASE + 10 * PAGE, PID)))
    assert not sock.recv(1)
    assert "no page" in str(failed[0])


def test_the_index_names_each_file_once(chain: Chain) -> None:
    lazy_chain.flatten(chain.images, chain.work)
    index = json.loads((chain.work / page_local.INDEX).read_text())
    assert len(index["files"]) == len(set(index["files"])) == 3
