#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A target that is honest until something happens, and then is not: a relay between
the source and a real agent.

    hostile.py HOW AGENT…       HOW as below; a second one there is honest

From the moment on at which the dump's stream begins:
    deaf        takes nothing any more, says nothing; it only lives (pings)
    flood       the same, and sends events without end
    drip        the same, and sends an event now and then
    mute        carries the channels on, and answers no request
    chatter     the same, and tells a long story when the first one comes
Of the request to restore:
    forgetful   it never comes to the agent; what follows does
    late        the agent answers it, and the source does not hear of that
Of the request to finish:
    claims      the answer is another one
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import threading
from pathlib import Path

HEADER = struct.Struct("<BBHI")
CONTROL, PING = 1, 6
MUTE = ("mute", "chatter")
CLOCKS = 5
"""Requests for the clock: the last ones before the container is suspended."""
AFTER = ("forgetful", "late", "claims")
"""Those that do not turn when the dump's stream begins."""
CLAIM = {"failed": ["box: it does not run any more here"]}


def exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def frame(fd: int) -> tuple[int, bytes]:
    head = exactly(fd, HEADER.size)
    kind, _, _, length = HEADER.unpack(head)
    return kind, head + exactly(fd, length)


def line(fd: int) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        data += exactly(fd, 1)
    return data


def send(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Relay:
    def __init__(self, how: str, agent: subprocess.Popen[bytes]) -> None:
        assert agent.stdin is not None and agent.stdout is not None
        self.how, self.agent = how, agent
        self.to, self.of = agent.stdin.fileno(), agent.stdout.fileno()
        self.turned = threading.Event()
        self.finish = 0
        """The number of that request."""
        self.begun = False
        """Its journal is made.  Earlier questions for the clock are probes of the connection."""
        self.compared = threading.Event()
        """All questions for the clock are answered."""

    def back(self) -> None:
        """From the agent."""
        try:
            send(1, line(self.of))
            clocks = 0
            while True:
                kind, data = frame(self.of)
                if kind == CONTROL and self.finish:
                    answer = json.loads(data[HEADER.size :])
                    if answer.get("id") == self.finish:
                        said = json.dumps({"id": self.finish, "ok": CLAIM}).encode()
                        data = HEADER.pack(CONTROL, 0, 0, len(said)) + said
                if (
                    not self.turned.is_set()
                    or kind == PING
                    or self.how == "forgetful"
                    or (self.how in MUTE and kind != CONTROL)
                    or b'"error"' in data
                ):
                    send(1, data)
                clocks += self.begun and kind == CONTROL and b'"monotonic"' in data
                if clocks == CLOCKS:
                    self.compared.set()
        except (EOFError, OSError):
            os._exit(0)

    def there(self) -> None:
        """To the agent."""
        send(self.to, line(0))
        clocks = 0
        while True:
            kind, data = frame(0)
            if kind == CONTROL and b'"op": "finish"' in data and self.how == "claims":
                self.finish = json.loads(data[HEADER.size :])["id"]
            if kind == CONTROL and b'"op": "restore"' in data and self.how in ("forgetful", "late"):
                self.turned.set()
                if self.how == "forgetful":
                    continue
            if self.how == "chatter" and kind == CONTROL and self.turned.is_set():
                self.chatter()
            send(self.to, data)
            self.begun = self.begun or (kind == CONTROL and b'"op": "begin"' in data)
            if (
                self.begun
                and kind == CONTROL
                and b'"op": "clock"' in data
                and self.how not in AFTER
            ):
                clocks += 1
                if clocks == CLOCKS:
                    self.compared.wait(30)
                    self.turn()

    def chatter(self) -> None:
        line = b'{"event": "line", "at": 1, "fields": {"level": 0, "text": "%s"}}' % (b"x" * 4000)
        for _ in range(100):
            send(1, HEADER.pack(CONTROL, 0, 0, len(line)) + line)
        Path(f"{sys.argv[-1]}.chattered").touch()

    def turn(self) -> None:
        self.turned.set()
        if self.how in MUTE:
            return
        event = b'{"event": "x", "at": 1, "fields": {}}'
        event = HEADER.pack(CONTROL, 0, 0, len(event)) + event
        source = select.poll()
        source.register(0, 0)  # its end is told in any case
        while not source.poll(20 if self.how == "drip" else 0 if self.how == "flood" else 500):
            if self.how != "deaf":
                send(1, event)
        raise EOFError

    def run(self) -> None:
        threading.Thread(target=self.back, daemon=True).start()
        try:
            self.there()
        except (EOFError, OSError):
            os.close(self.to)
            self.agent.wait()


def main() -> None:
    how, *command = sys.argv[1:]
    mark = Path(f"{command[-1]}.{how}")  # beside the agent's configuration
    if mark.exists():
        os.execvp(command[0], command)
    mark.touch()
    agent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    Relay(how, agent).run()


if __name__ == "__main__":
    main()
