# SPDX-License-Identifier: Apache-2.0
"""The loads of bench_freeze: what writes inside the container's file system.

Each has one process, paced, which a stop command can stop by its PID:

    fsync     4 KiB random writes, each followed by fsync
    buffered  sequential writes that nothing syncs, over and over the same file
    sqlite    transactions in a WAL database, synchronous=FULL

The first two are fio, the third is load_sqlite.py.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import load_sqlite
from common import MIB

STARTUP = 30.0
"""Seconds for a load to have written its first bytes."""
PAGE, ROWS_OF_PAGE = 4096, 9


@dataclass(frozen=True)
class Pace:
    """How fast the loads write, and how large what they write to is, bytes."""

    fsync_size: int
    buffered_size: int
    sqlite_size: int
    fsync_iops: int = 1000
    buffered_rate: int = 100_000_000
    sqlite_tps: int = 300

    @classmethod
    def of_disk(cls, size: int) -> Pace:
        """3/4 of a disk of `size` bytes."""
        return cls(size // 4, size // 8 * 3, size // 8)

    @property
    def sqlite_rows(self) -> int:
        return self.sqlite_size // PAGE * ROWS_OF_PAGE


class Load:
    """A running load, or none."""

    def __init__(self, name: str, process: subprocess.Popen[bytes] | None) -> None:
        self.name = name
        self._process = process
        self._start = (time.monotonic(), self._written())

    @property
    def pids(self) -> list[int]:
        return [] if self._process is None else [self._process.pid]

    def _written(self) -> int:
        """Bytes given to write calls so far."""
        if self._process is None:
            return 0
        for line in Path(f"/proc/{self._process.pid}/io").read_text().splitlines():
            name, _, value = line.partition(": ")
            if name == "wchar":
                return int(value)
        raise RuntimeError("/proc/PID/io has no wchar")

    def begun(self) -> None:
        """Wait until it writes; its rate counts from then on."""
        if self._process is None:
            return
        deadline = time.monotonic() + STARTUP
        while self._written() < MIB:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the load {self.name} does not write")
            time.sleep(0.02)
        self._start = (time.monotonic(), self._written())

    def rate(self) -> float:
        """Bytes per second that it has written so far."""
        seconds = time.monotonic() - self._start[0]
        return (self._written() - self._start[1]) / seconds if seconds > 0 else 0.0


def _fio(folder: Path, name: str, size: int) -> list[str]:
    command = ["fio", f"--name={name}", f"--filename={folder / name}", f"--size={size}"]
    # One process to be stopped; no warm-up reads; nothing to say.
    return [*command, "--thread", "--ioengine=psync", "--invalidate=0", "--output=/dev/null"]


def prepare(folder: Path, pace: Pace) -> None:
    """Lay out the files, so that a load begins by rewriting them."""
    for name, size in (("fsync", pace.fsync_size), ("buffered", pace.buffered_size)):
        layout = ["--rw=write", "--bs=1M", "--end_fsync=1", "--refill_buffers"]
        subprocess.run([*_fio(folder, name, size), *layout], check=True)
    load_sqlite.connect(folder / "sqlite", pace.sqlite_rows).close()


def command(folder: Path, name: str, pace: Pace) -> list[str]:
    """The program that is the load `name`."""
    endless = ["--time_based", "--runtime=3600", "--overwrite=1"]
    if name == "fsync":
        job = ["--rw=randwrite", "--bs=4k", "--fsync=1", f"--rate_iops={pace.fsync_iops}"]
        return [*_fio(folder, name, pace.fsync_size), *endless, *job, "--norandommap"]
    if name == "buffered":
        job = ["--rw=write", "--bs=256k", f"--rate={pace.buffered_rate}"]
        return [*_fio(folder, name, pace.buffered_size), *endless, *job]
    program = [sys.executable, "-I", load_sqlite.__file__, str(folder / "sqlite")]
    return [*program, str(pace.sqlite_rows), str(pace.sqlite_tps)]


@contextlib.contextmanager
def running(folder: Path, name: str, pace: Pace, settle: float) -> Iterator[Load]:
    """The load, having written for `settle` seconds.  It is ended whether it
    was stopped meanwhile or not."""
    if name == "idle":
        yield Load(name, None)
        return
    process = subprocess.Popen(
        command(folder, name, pace), stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        load = Load(name, process)
        load.begun()
        time.sleep(settle)
        yield load
    finally:
        process.kill()
        process.wait()
