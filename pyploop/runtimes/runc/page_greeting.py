# SPDX-License-Identifier: Apache-2.0
"""A connection of the page server to the relay on the target, while it is made: ssh starts an
agent there, which hands it over to the relay (docs/internals/post-copy.md).
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time

from pyploop.runtimes.runc.page_stream import Link

GREETING_SECONDS = 40.0
"""For ssh, the agent and the relay to answer."""
_HELLO = re.compile(rb"(?:\A|\n)PYPLOOP-AGENT \d+ [^\n]{1,40}\n")
_ANSWER = re.compile(rb"(PAGES|GONE \w+|NO [^\n]{0,300})\n")


class Greeting:
    """A connection that is being made, until the relay has it."""

    def __init__(self, argv: list[str], hello: str) -> None:
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.wfd, self.rfd = self.process.stdin.fileno(), self.process.stdout.fileno()
        self._hello, self._data, self._greeted = hello.encode(), b"", False
        self._deadline = time.monotonic() + GREETING_SECONDS
        self.answer = ""

    def look(self, readable: bool) -> bool:
        """Whether there is an answer; empty: there will be none."""
        if readable:
            try:
                part = os.read(self.rfd, 4096)
            except OSError:
                part = b""
            if not part:
                return True
            self._data += part
        if not self._greeted and (found := _HELLO.search(self._data)):
            self._data, self._greeted = self._data[found.end() :], True
            with contextlib.suppress(OSError):
                os.write(self.wfd, self._hello)
        if self._greeted and (answer := _ANSWER.match(self._data)):
            self.answer, self._data = answer[1].decode(errors="replace"), self._data[answer.end() :]
            return True
        return time.monotonic() > self._deadline or len(self._data) > 1 << 17

    def link(self) -> Link:
        return Link(self.rfd, self.wfd, self.close, self._data)

    def close(self) -> None:
        self.process.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
