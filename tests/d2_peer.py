# SPDX-License-Identifier: Apache-2.0
"""Both ends of D2 and D3 as the C library has them, independent of
pyploop.wire: plain struct.pack and blocking sockets, one packet at a time.
There is no C library to test with on Debian; docs/internals/protocol.md has the bytes."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

MARK = 0x4CC0AC3E
HEADER = struct.Struct("<IIIIQ")
DATA, CMD, ASYNC = 0, 1, 2
MD5, COPY_DEVICE = 1, 2
OLD, NEW, SLIP = 0, -3, -1
"""How receivers answer the handshake: 1.15, 7u14, and 9.0.30."""


def packet(kind: int, pos: int, data: bytes, md5: bool = False) -> bytes:
    digest = hashlib.md5(data).digest() if md5 else b""
    return HEADER.pack(MARK, kind, len(data), 0, pos) + digest + data


def command(number: int, pos: int = 0, md5: bool = False) -> bytes:
    return packet(CMD, pos, struct.pack("<I", number), md5)


def read_all(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError(f"closed after {len(data)} of {size} bytes")
        data += part
    return data


def read_reply(sock: socket.socket) -> int:
    (code,) = struct.unpack("<i", read_all(sock, 4))
    return int(code)


@dataclass
class Packet:
    kind: int
    pos: int
    data: bytes


@dataclass
class Receiver:
    """A receiver in a thread.  answer: to the handshake, which OLD takes for a
    SYNC; fail_at: this packet (from 0) gets `code`, and nothing is read after it;
    on_end: called before END is answered."""

    sock: socket.socket
    answer: int = OLD
    fail_at: int | None = None
    code: int = 7
    on_end: Callable[[], None] | None = None
    packets: list[Packet] = field(default_factory=list)
    offered: int = 0
    image: bytearray = field(default_factory=bytearray)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "the model receiver hangs"
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as e:
            self.error = e

    def _serve(self) -> None:
        md5 = False
        while True:
            mark, kind, size, _, pos = HEADER.unpack(read_all(self.sock, HEADER.size))
            assert mark == MARK
            digest = read_all(self.sock, 16) if md5 else b""
            data = read_all(self.sock, size)
            assert not md5 or hashlib.md5(data).digest() == digest, "wrong MD5"
            number = len(self.packets)
            self.packets.append(Packet(kind, pos, data))
            if number == self.fail_at:
                with contextlib.suppress(OSError):
                    self.sock.send(struct.pack("<i", self.code))
                return
            if size == 0:
                if self.on_end is not None:
                    self.on_end()
                self._reply(0)
                return
            if kind == CMD:
                assert struct.unpack("<I", data) == (0,), "not SYNC"
                if pos:
                    self.offered = pos
                    md5 = bool(pos & MD5) and self.answer != OLD
                    self._reply(self.answer)
                    continue
            else:
                assert kind == DATA or (kind == ASYNC and self.answer != OLD)
                self.image.extend(bytes(max(0, pos + size - len(self.image))))
                self.image[pos : pos + size] = data
            if kind != ASYNC:
                self._reply(0)

    def _reply(self, code: int) -> None:
        self.sock.sendall(struct.pack("<i", code))


def send(
    sock: socket.socket,
    blocks: Iterable[tuple[int, bytes]],
    *,
    offer: int = 0,
    kind: int = DATA,
    look: bool = True,
) -> list[int]:
    """A sender: a handshake if it offers something, the blocks, SYNC and END,
    in lockstep.  look: stop at the first failure; the C library's D2 does not.
    Returns the replies."""
    replies = []
    md5 = False

    def ask(data: bytes) -> bool:
        with contextlib.suppress(BrokenPipeError):  # then the answer says why
            sock.sendall(data)
        replies.append(read_reply(sock))
        return replies[-1] == 0 or not look

    if offer:
        sock.sendall(command(0, offer))
        features = read_reply(sock)
        assert features <= 0
        md5 = bool(-features & MD5)
    for pos, data in blocks:
        if kind == ASYNC:
            sock.sendall(packet(kind, pos, data, md5))
        elif not ask(packet(kind, pos, data, md5)):
            return replies
    if ask(command(0, 0, md5)):
        ask(packet(CMD, 0, b"", md5))
    return replies
