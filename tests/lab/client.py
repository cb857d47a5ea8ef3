# SPDX-License-Identifier: Apache-2.0
"""The container's user: one TCP connection, and a ledger of what was acknowledged.

    python3 client.py ADDRESS PORT LEDGER INTERVAL_MS

Sends a write, waits for its acknowledgement, appends "SEQ SENT ACKNOWLEDGED"
(nanoseconds, CLOCK_MONOTONIC) to the ledger, and so on.  Orders come on stdin, one a
line, answers go to stdout as JSON: `mark` tells what was since the last mark,
`load N`, `verify` and `database` ask the container, `stop`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from typing import TextIO

TIMEOUT = 60.0 * int(os.environ.get("PYPLOOP_SLOWNESS", "1"))
"""Seconds: a longer silence is a lost connection."""


class Client:
    def __init__(self, address: str, port: int, ledger: TextIO, interval: float) -> None:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self.socket = socket.create_connection((address, port), timeout=TIMEOUT)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.lines = self.socket.makefile("r")
        self.ledger = ledger
        self.interval = interval
        self.seq = 0
        self.last = time.monotonic_ns()
        self.acknowledged, self.gap = 0, 0

    def ask(self, request: str, answer: str) -> list[int]:
        """One request; the numbers of its answer, which begins with `answer`."""
        self.socket.sendall(request.encode() + b"\n")
        words = self.lines.readline().split()
        if not words or words[0] != answer:
            raise ConnectionError(f"{request!r} was answered by {words}")
        return [int(w) for w in words[1:] if w.isdigit()]

    def write(self) -> None:
        sent = time.monotonic_ns()
        if self.ask(f"W {self.seq}", "A") != [self.seq]:
            raise ConnectionError(f"write {self.seq}: another one was acknowledged")
        now = time.monotonic_ns()
        self.ledger.write(f"{self.seq} {sent} {now}\n")
        self.gap = max(self.gap, now - self.last)
        self.last = now
        self.seq += 1
        self.acknowledged += 1

    def order(self, words: list[str]) -> dict[str, object]:
        match words:
            case ["mark"] | ["stop"]:
                answer: dict[str, object] = {
                    "acknowledged": self.acknowledged,
                    "gap": self.gap / 1e9,
                    "port": self.socket.getsockname()[1],
                }
                self.acknowledged, self.gap = 0, 0
                return answer
            case ["load", rate]:
                self.ask(f"L {rate}", "L")
                return {"load": int(rate)}
            case ["verify"]:
                checked, wrong = self.ask("V", "V")
                self.last = time.monotonic_ns()
                return {"checked": checked, "wrong": wrong}
            case ["database"]:
                rows, intact = self.ask("I", "I")
                self.last = time.monotonic_ns()
                return {"rows": rows, "acknowledged": self.seq, "intact": bool(intact)}
        return {"error": f"what is {words}?"}

    def run(self) -> None:
        while True:
            self.write()
            wait = max(0.0, self.last / 1e9 + self.interval - time.monotonic())
            if select.select([sys.stdin], [], [], wait)[0]:
                words = sys.stdin.readline().split()
                print(json.dumps(self.order(words or ["stop"])), flush=True)
                if words in ([], ["stop"]):
                    return


def main() -> int:
    address, port, ledger, interval_ms = sys.argv[1:]
    try:
        with open(ledger, "w", buffering=1) as file:
            Client(address, int(port), file, float(interval_ms) / 1000).run()
    except (OSError, ConnectionError) as e:
        print(json.dumps({"error": f"{type(e).__name__}: {e}"}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
