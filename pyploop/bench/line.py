# SPDX-License-Identifier: Apache-2.0
"""What carries the stream: a pipe, and connections of ssh."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence

from pyploop.bench import source as reading
from pyploop.bench.stages import LEAST, Stage, rates
from pyploop.disks.source import Source
from pyploop.errors import ConnectError, PyploopError
from pyploop.system import descriptors
from pyploop.units import MIB

PIPE, CONNECT, ROUND_TRIP = "read into a pipe", "ssh connects", "ssh round trip"
LANES = (1, 2, 4, 8)
"""Connections at once that are tried."""
GAIN = 1.1
"""More connections are tried while they carry this many times as much."""
START = 30.0
"""Seconds for an ssh to connect and to answer."""
PIECE = MIB
SLICE = 0.25
"""Seconds of one sample of the lanes, at most."""


def lanes_name(count: int) -> str:
    return f"ssh, {count} at once" if count > 1 else "ssh"


def pipe(source: Source, seconds: float) -> Stage:
    """The stream of a copy into a pipe that a thread empties."""
    left = reading.parts(source)
    read_end, write_end = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, read_end)
        thread = threading.Thread(target=_empty, args=(read_end,), daemon=True)
        stack.callback(thread.join)
        stack.callback(os.close, write_end)
        descriptors.enlarge_pipe(write_end)
        thread.start()
        pump = reading.into(source, write_end)
        values = rates(seconds, lambda: reading.send(pump, next(left, None)))
    return Stage(PIPE, "bytes/s", values, "" if values else "there is no data")


def _empty(fd: int) -> None:
    buffer = bytearray(PIECE)
    while os.readv(fd, [buffer]):
        pass


class Lane:
    """One ssh whose far end drops what it gets."""

    def __init__(self, command: Sequence[str]) -> None:
        """ConnectError if it cannot be run."""
        try:
            self._process = subprocess.Popen(
                [*command, "echo ready && exec cat >/dev/null"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as e:
            raise ConnectError(f"cannot run {command[0]}: {e.strerror}") from e
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        descriptors.enlarge_pipe(self._in)
        self.sent = 0

    def ready(self) -> None:
        """ConnectError if the far end does not answer."""
        if not descriptors.readable(self._out, START) or not os.read(self._out, 64):
            raise ConnectError(f"cannot connect: {self.end() or 'no answer'}")

    def fill(self, data: bytes, end: float) -> None:
        """Send until `end` (time.monotonic)."""
        with descriptors.nonblocking(self._in) as fd:
            while (left := end - time.monotonic()) > 0:
                try:
                    self.sent += os.write(fd, data)
                except BlockingIOError:
                    descriptors.writable(fd, left)

    def end(self) -> str:
        """End it; what it printed."""
        self._process.kill()
        _, printed = self._process.communicate()
        return printed.decode(errors="replace").strip().replace("\n", "; ")


def connect(command: Sequence[str], pyploop: Sequence[str]) -> Stage:
    """Seconds until pyploop there has started and ended, by an ssh of its own.  pyploop: its
    command there, as words."""
    values = []
    try:
        for _ in range(LEAST):
            began = time.monotonic()
            subprocess.run(
                [*command, shlex.join([*pyploop, "--version"])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=START,
                check=True,
            )
            values.append(time.monotonic() - began)
    except (OSError, subprocess.SubprocessError) as e:
        return Stage(CONNECT, "s", (), str(e))
    return Stage(CONNECT, "s", tuple(values), "and pyploop there starts")


def round_trip(command: Sequence[str]) -> Stage:
    """Seconds between a line and its answer, through one ssh."""
    process = subprocess.Popen(
        [*command, "exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        values = []
        for _ in range(1 + 4 * LEAST):
            began = time.monotonic()
            os.write(process.stdin.fileno(), b"x\n")
            out = process.stdout.fileno()
            if not descriptors.readable(out, START) or not os.read(out, 64):
                return Stage(ROUND_TRIP, "s", (), "no answer")
            values.append(time.monotonic() - began)
        return Stage(ROUND_TRIP, "s", tuple(values[1:]))
    except OSError as e:
        return Stage(ROUND_TRIP, "s", (), e.strerror or "no answer")
    finally:
        process.kill()
        process.communicate()


def lanes(command: Sequence[str], data: bytes, seconds: float) -> Iterator[Stage]:
    """What so many connections carry together, as long as more of them carry more.
    command: ssh with its options and the host.  data: of the source, or random.  Sending,
    encryption and decryption share the CPUs with this program."""
    best = 0.0
    for count in LANES:
        stage = _at_once(command, data, seconds, count)
        yield stage
        if not stage.values or stage.median < best * GAIN:
            return
        best = stage.median


def _at_once(command: Sequence[str], data: bytes, seconds: float, count: int) -> Stage:
    name, made = lanes_name(count), list[Lane]()
    try:
        for _ in range(count):  # one after the other: sshd's MaxStartups
            made.append(Lane(command))
            made[-1].ready()
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=x.fill, args=(data, end), daemon=True) for x in made]
        for thread in threads:
            thread.start()
        values, before, then = [], 0, time.monotonic()
        while time.monotonic() < end:
            time.sleep(min(SLICE, seconds / (LEAST + 1)))
            sent, now = sum(x.sent for x in made), time.monotonic()
            values.append((sent - before) / (now - then))
            before, then = sent, now
        for thread in threads:
            thread.join()
        # The first sample has filled pipes and windows.
        return Stage(name, "bytes/s", tuple(values[1:]))
    except (PyploopError, OSError) as e:
        return Stage(name, "bytes/s", (), str(e))
    finally:
        for lane in made:
            lane.end()
