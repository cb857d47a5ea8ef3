# SPDX-License-Identifier: Apache-2.0
"""What a migration must not have changed: the client at work, and the verdicts."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.hosts import CONTAINER_IP, Lab

CLIENT = Path(__file__).with_name("client.py")
PORT = 5000
RECORD = 64


class Client:
    """client.py, running in the client's network."""

    def __init__(self, lab: Lab, ledger: Path, interval_ms: float) -> None:
        self.ledger = ledger
        words = lab.on_client(sys.executable, CLIENT, CONTAINER_IP, PORT, ledger, interval_ms)
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.port = int(self.order("mark")["port"])

    def order(self, text: str) -> dict[str, Any]:
        """One order; AssertionError when the client has lost its connection."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the client has ended"}
        assert "error" not in answer, f"client: {answer['error']}"
        return answer

    def load(self, megabytes: int) -> None:
        """Random writes in the container, in MB a second; 0: none."""
        self.order(f"load {megabytes}")

    def mark(self) -> dict[str, Any]:
        """Since the last mark: writes acknowledged, longest gap (seconds); the
        connection is the one that was opened first."""
        answer = self.order("mark")
        assert answer["port"] == self.port, "another connection"
        return answer

    def verify_blocks(self) -> int:
        """How many blocks of the load were compared with the container's memory;
        AssertionError when the disk has lost one."""
        answer = self.order("verify")
        assert answer["wrong"] == 0, f"{answer['wrong']} of {answer['checked']} blocks are wrong"
        return int(answer["checked"])

    def verify_database(self) -> int:
        """How many acknowledged writes the container's database has: all."""
        answer = self.order("database")
        assert answer["intact"], "the database is damaged"
        assert answer["rows"] == answer["acknowledged"], answer
        return int(answer["rows"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def client(lab: Lab, interval_ms: float = 5) -> Iterator[Client]:
    one = Client(lab, lab.folder / "ledger", interval_ms)
    try:
        yield one
    finally:
        one.close()


# ---- verdicts on the data, the container's file system mounted on `root`


def acknowledged(ledger: Path) -> set[int]:
    """The writes that the client saw acknowledged (a last, cut line was not)."""
    text = ledger.read_text()
    return {int(line.split()[0]) for line in text[: text.rfind("\n") + 1].splitlines()}


def check_database(root: Path, ledger: Path, work: Path) -> int:
    """The number of acknowledged writes, all of which are in the intact database."""
    for suffix in ("", "-wal"):
        source = root / "data" / f"ledger.db{suffix}"
        if source.exists():
            (work / source.name).write_bytes(source.read_bytes())
    with contextlib.closing(sqlite3.connect(work / "ledger.db")) as db:
        verdict = [row[0] for row in db.execute("PRAGMA integrity_check")]
        assert verdict == ["ok"], verdict
        rows = {row[0] for row in db.execute("SELECT seq FROM ledger")}
    lost = acknowledged(ledger) - rows
    assert not lost, f"{len(lost)} acknowledged writes are lost, the first is {min(lost)}"
    return len(acknowledged(ledger))


@dataclass(frozen=True)
class AppendLog:
    """An append log without a hole."""

    durable: list[int]
    """When each record but the last was durable, nanoseconds."""

    def gap(self, since: int = 0, until: int = 1 << 63) -> float:
        """Longest time between two durable records, in seconds."""
        times = [t for t in self.durable if since <= t <= until]
        return max((b - a for a, b in itertools.pairwise(times)), default=0) / 1e9


def check_append_log(root: Path) -> AppendLog:
    data = (root / "data" / "append.log").read_bytes()
    durable = []
    for at in range(0, len(data) - len(data) % RECORD, RECORD):
        record = data[at : at + RECORD]
        words = record.split()
        assert len(words) == 2 and record[-1:] == b"\n", f"record {at // RECORD}: {record!r}"
        assert int(words[0]) == at // RECORD, f"record {at // RECORD} is {record!r}"
        durable.append(int(words[1]))
    assert durable == sorted(durable), "the append log's times go back"
    return AppendLog(durable[1:])
