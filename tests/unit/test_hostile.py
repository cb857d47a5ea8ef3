# SPDX-License-Identifier: Apache-2.0
"""Peers that drip, flood, say things in the wrong order, or never read: each is
bounded by a limit or a deadline.  Drips go on until the copy ends them."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
from support import MIB, SUCCESS, d1_end, d1_frame, d1_header, d1_sync

from pyploop.diskcopy.receiver import receive
from pyploop.errors import WriteError
from pyploop.report.events import Reporter
from pyploop.system import descriptors

COPY = [*support.pyploop_cmd(), "-v-1", "copy"]
D2_DATA = struct.pack("<IIIIQ", 0x4CC0AC3E, 0, MIB, 0, 0)


@contextlib.contextmanager
def thread(main: Callable[[], None]) -> Iterator[None]:
    worker = threading.Thread(target=main)
    worker.start()
    try:
        yield
    finally:
        worker.join(30)
        assert not worker.is_alive()


def run(command: list[str], *fds: int, stdin: int = subprocess.DEVNULL) -> tuple[int, str]:
    done = subprocess.run(
        command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=fds,
        env=support.pyploop_env(), timeout=30, check=False,
    )  # fmt: skip
    err = done.stderr.decode()
    assert "Traceback" not in err and len(err.splitlines()) <= 1, err
    return done.returncode, err


D1_STREAM, D2_STREAM = d1_header(MIB, 0) + bytes(MIB), D2_DATA + bytes(MIB)


@pytest.mark.parametrize(("stream", "at_once"), [
    (D1_STREAM, 0), (D1_STREAM, 7), (D1_STREAM, 16), (D1_STREAM, 1000), (D2_STREAM, 20),
    (D2_STREAM, 24),
])  # fmt: skip
@pytest.mark.invariant(number=6)
def test_a_sender_that_drips_is_given_up(tmp_path: Path, stream: bytes, at_once: int) -> None:
    """In a header or in data: a byte now and then is no progress."""
    ours, theirs = socket.socketpair()

    def drip() -> None:
        with contextlib.suppress(OSError):
            theirs.sendall(stream[:at_once])
            for at in range(at_once, len(stream)):
                theirs.sendall(stream[at : at + 1])
                time.sleep(0.02)

    with ours, theirs, thread(drip):
        command = [*COPY, "-d", str(tmp_path / "image"), "--timeout", "0.4"]
        code, err = run(command, stdin=ours.fileno())
        ours.close()
    assert code == 6 and "--timeout" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.invariant(number=6)
def test_a_receiver_that_drips_is_given_up(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 * MIB))
    r, w = os.pipe()
    fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 65536)
    over = threading.Event()

    def drip() -> None:
        # A page at a time: a pipe has no room before one is free.
        while not over.is_set() and os.read(r, 4096):
            time.sleep(0.1)

    with thread(drip):
        code, err = run([*COPY, "-s", str(source), "-o", str(w), "--timeout", "0.4"], w)
        os.close(w)
        over.set()
    os.close(r)
    assert code == 7 and "next to nothing" in err


@pytest.mark.parametrize("answer", [b"SUCCESS\n", b"PYPLOOP\x01"])
def test_an_answer_that_drips_is_not_waited_for(tmp_path: Path, answer: bytes) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(4096))
    (r, w), (back_r, back_w) = os.pipe(), os.pipe()
    over = threading.Event()

    def drip() -> None:
        os.read(r, 4096)  # its question
        for byte in answer:
            os.write(back_w, bytes([byte]))
            if over.wait(0.6):
                return

    with thread(drip):
        command = [*COPY, "-s", str(source), "-o", str(w), "-f", str(back_r), "--timeout", "1"]
        code, err = run(command, w, back_r)
        over.set()
    for fd in (r, w, back_r, back_w):
        os.close(fd)
    assert code == 6 and "no answer" in err


def test_a_flood_of_syncs_is_answered_one_by_one(tmp_path: Path) -> None:
    count = 3000
    ours, theirs = socket.socketpair()
    got = bytearray()

    def peer() -> None:
        with contextlib.suppress(OSError):
            while part := theirs.recv(65536):
                got.extend(part)

    def flood() -> None:
        theirs.sendall(d1_frame(0, b"data") + d1_sync() * count + d1_frame(0, b"image") + d1_end())

    with ours, theirs, thread(peer), thread(flood):
        fd = str(ours.fileno())
        command = [*COPY, "-d", str(tmp_path / "image"), "-i", fd, "-f", fd]
        code, err = run(command, ours.fileno())
        ours.close()
        theirs.shutdown(socket.SHUT_WR)
    assert code == 0, err
    # `data` is four bytes, so it was a SYNC as well.
    assert bytes(got) == SUCCESS * (count + 1)
    assert (tmp_path / "image").read_bytes() == b"image"


def test_a_flood_of_syncs_whose_answers_are_not_read_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = descriptors.write_all
    monkeypatch.setattr(descriptors, "write_all", functools.partial(patient, timeout=0.3))
    (r, w), (back_r, back_w) = os.pipe(), os.pipe()
    fcntl.fcntl(back_w, fcntl.F_SETPIPE_SZ, 4096)
    fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.write(w, d1_sync() * 2000)
    with pytest.raises(WriteError, match="does not read"):
        receive(str(tmp_path / "image"), r, back_w, Reporter(), 5)
    for fd in (r, w, back_r, back_w):
        os.close(fd)
    assert list(tmp_path.iterdir()) == []


DATA = b"x" * 100
ORDERS = {
    "END alone": (d1_end(), 0, b""),
    "SYNC before data": (d1_sync() + d1_frame(0, DATA) + d1_end(), 0, DATA),
    "the end before the beginning": (
        d1_frame(100, DATA) + d1_frame(50, bytes(50)) + d1_frame(0, DATA[:50]) + d1_end(),
        0, DATA[:50] + bytes(50) + DATA,
    ),
    "the same block twice": (d1_frame(0, bytes(100)) + d1_frame(0, DATA) + d1_end(), 0, DATA),
    "data behind END": (d1_frame(0, DATA) + d1_end() + d1_frame(0, bytes(9)), 0, DATA),
    "two images in one": (d1_frame(0, DATA) + d1_end() + d1_end(), 0, DATA),
    "another dialect in the middle": (d1_frame(0, DATA) + D2_DATA, 13, None),
    "a header in a header": (d1_header(MIB, 0)[:8] + d1_header(MIB, 0), 6, None),
    "a position of 2^63 - 1": (d1_header(1, 2**63 - 1) + b"x" + d1_end(), 7, None),
    "a position of 2^63 - 1 with SYNC": (
        d1_header(4, 2**63 - 1) + b"sync" + d1_frame(0, DATA) + d1_end(), 0, DATA
    ),
    "a position of 2^64 - 1 with END": (d1_frame(0, DATA) + d1_header(0, 2**64 - 1), 0, DATA),
    "the largest size": (d1_header(2**32 - 1, 0), 5, None),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ORDERS))
def test_any_order_has_one_meaning(tmp_path: Path, name: str) -> None:
    stream, code, image = ORDERS[name]
    r, w = os.pipe()
    os.write(w, stream)
    os.close(w)
    got, err = run([*COPY, "-d", str(tmp_path / "image")], stdin=r)
    os.close(r)
    assert got == code, err
    if image is None:
        assert list(tmp_path.iterdir()) == []
    else:
        assert (tmp_path / "image").read_bytes() == image
