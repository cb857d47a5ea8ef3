# SPDX-License-Identifier: Apache-2.0
"""The page server of a post-copy migration at its source: a process that owns CRIU's dump,
and with it the stopped processes and their pages, until the target has the last of them
(docs/internals/post-copy.md).

It outlives the orchestrator, and connects to the target by itself, again and again.

Invariant: the container's processes are never resumed here.  While CRIU serves pages, its
tasks are only traced, and their cgroup is thawed.  So the cgroup is frozen again before the
target is asked to restore.  If CRIU is killed, they stay frozen.

argv: the descriptor of a packet socket to the orchestrator; the path of the record.  The
record has the `ssh` command and its `hello`, the `timeout`, and the `recover` command.
Messages, one JSON object a packet:

    keeper:       {"ready": ""}       connected to the target's relay
    orchestrator: {"op": "dump", …}   start the dump: `argv`, `name`, `env`, `config` (a file to
                                      write: options for CRIU), `log`, `freeze` (file and word
                                      that freeze the container), `keep` (descriptors for runc)
    keeper:       {"dumped": ""}      all but the pages is in the images.  Else what failed
    orchestrator: {"op": "stop"}      undo: end the dump.  The container stays frozen.
                                      SIGUSR1 is the same, of a later process
    keeper:       {"stopped": ""}
    keeper:       {"ended": STATE}    `complete`: the target has all.  `lost`: it never will,
                                      for the reason `why`.  `bytes` for `requests` were sent
    orchestrator: {"op": "bye"}       it tidies up itself

When the socket ends without `bye` after the dump, the keeper tidies up when all has ended: it
becomes `pyploop migrate --recover`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import syslog
import time
from typing import Any

from pyploop.runtimes.runc import lazy_guard, page_stream
from pyploop.runtimes.runc.page_dump import PageDump
from pyploop.runtimes.runc.page_greeting import Greeting
from pyploop.runtimes.runc.page_stream import Stream

CONNECTING, SERVING, COMPLETE, LOST = "connecting", "serving", "complete", "lost"
RETRY = 0.5
NOTE_EVERY = 1.0
REQUEST = 32
"""Bytes of a request of `criu lazy-pages` (struct page_server_iov)."""


class Keeper:
    """Of one migration."""

    def __init__(self, line: socket.socket, record: lazy_guard.Record) -> None:
        self._line: socket.socket | None = line
        self._record = record
        self._fields = record.fields
        self._stream, self._dump = Stream(), PageDump()
        self._greeting: Greeting | None = None
        self._again = 0.0
        """When to connect again."""
        self._gone = ""
        """What the target says when its relay has ended."""
        self._ready = False
        self._stopping = self._bye = False
        self._noted = 0.0
        self._chld, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def serve(self) -> None:
        pid = os.getpid()
        self._record.set(keeper={"pid": pid, "start": lazy_guard.start_time(pid)})
        state = self._until_over()
        if self._stopping:
            self._stream.end(page_stream.BADLY)
            self._dump.end(self._stream)
            self._flush()
            self._record.remove()
            self._say(stopped="")
            return
        self._stream.end(page_stream.WELL if state == COMPLETE else page_stream.BADLY)
        self._dump.end(self._stream)
        self._note(state=state, ended=time.time())
        level = syslog.LOG_INFO if state == COMPLETE else syslog.LOG_ERR
        lazy_guard.log(
            f"container {self._fields['container']}: page server {state}, "
            f"{self._stream.acknowledged} bytes for {self._stream.delivered // REQUEST} requests",
            level,
        )
        self._say(
            ended=state,
            why=str(self._fields.get("why", "")),
            bytes=self._stream.acknowledged,
            requests=self._stream.delivered // REQUEST,
        )
        self._flush()
        self._stream.detach()
        self._tidy()

    def _until_over(self) -> str:
        """Returns COMPLETE or LOST, or anything when it is stopped."""
        stream, timeout = self._stream, float(self._fields["timeout"])
        while not self._stopping:
            self._turn(1.0)
            if stream.peer_ended is not None and not stream.incoming:
                well = stream.peer_ended == page_stream.WELL
                return self._over(well, "the target's daemon has ended before it had all")
            if self._gone:
                return self._over(self._gone == COMPLETE, f"the target says: {self._gone}")
            if time.monotonic() - stream.heard > timeout:
                return self._over(False, f"the target could not be reached for {timeout:g} s")
            if self._line is None and not self._dump.started:
                self._stopping = True  # the orchestrator was killed before the dump
            if self._dump.socket.eof and self._dump.socket.open:
                self._dump.socket.close()  # CRIU has ended, well or not: the target says which
                stream.end(page_stream.BADLY)
        return LOST

    def _over(self, well: bool, why: str) -> str:
        if not well:
            self._note(why=why)
        return COMPLETE if well else LOST

    def _turn(self, seconds: float) -> None:
        stream = self._stream
        if stream.link is None and self._greeting is None and time.monotonic() > self._again:
            self._connect()
        others = [self._chld]
        if self._line is not None:
            others.append(self._line.fileno())
        if self._greeting is not None:
            others.append(self._greeting.rfd)
        if (status := self._dump.status) >= 0:
            others.append(status)
        ready = stream.turn(self._dump.socket, others, seconds)
        if self._chld in ready:
            with contextlib.suppress(BlockingIOError):
                self._stopping |= signal.SIGUSR1 in os.read(self._chld, 4096)
        if self._greeting is not None:
            self._greet(self._greeting.rfd in ready)
        if stream.met and not self._ready:
            self._ready = True
            self._say(ready="")
        if status in ready:
            self._look_at_dump()
        if self._line is not None and self._line.fileno() in ready:
            self._hear()
        if time.monotonic() - self._noted > NOTE_EVERY:
            self._noted = time.monotonic()
            if self._dump.serving:
                self._note(sent=stream.acknowledged)

    # ---- the connection

    def _connect(self) -> None:
        try:
            self._greeting = Greeting(self._fields["ssh"], self._fields["hello"])
        except OSError as e:
            self._note(why=f"{self._fields['ssh'][0]}: {e.strerror}")
            self._again = time.monotonic() + RETRY

    def _greet(self, readable: bool) -> None:
        greeting = self._greeting
        assert greeting is not None
        if not greeting.look(readable):
            return
        self._greeting = None
        if greeting.answer == "PAGES":
            self._stream.attach(greeting.link())
            self._noted = 0.0
            return
        greeting.close()
        self._again = time.monotonic() + RETRY
        if greeting.answer.startswith("GONE"):
            self._gone = greeting.answer.split()[1]

    # ---- the orchestrator

    def _say(self, **words: str | int) -> None:
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.send(json.dumps(words).encode())

    def _hear(self) -> None:
        assert self._line is not None
        try:
            data = self._line.recv(lazy_guard.LONGEST)
        except ConnectionResetError:
            data = b""
        if not data:
            self._line.close()
            self._line = None
            return
        message = json.loads(data)
        if message["op"] == "dump":
            if why := self._dump.start(message):
                self._say(dumped=why)
        elif message["op"] == "bye":
            self._bye = True
        else:
            self._stopping = True

    def _look_at_dump(self) -> None:
        why = self._dump.look()
        if self._dump.serving:
            self._note(state=SERVING, since=time.time())
        self._say(dumped=why)

    def _note(self, **fields: Any) -> None:
        """A full disk costs the record, and not what comes next."""
        with contextlib.suppress(OSError):
            self._record.set(**fields)

    # ---- the end

    def _flush(self) -> None:
        """The target hears that it is over here."""
        deadline = time.monotonic() + 2.0
        while self._stream.link is not None and self._stream.link.out:
            if time.monotonic() > deadline:
                return
            self._stream.turn(self._dump.socket, [], 0.1)

    def _tidy(self) -> None:
        """The orchestrator does it; else this process."""
        while self._line is not None and not self._bye:
            if self._stopping:
                self._say(stopped="")
                self._bye = True
            elif select.select([self._line], [], [], 3600)[0]:
                self._hear()
        if self._bye:
            self._record.remove()
            return
        command = self._fields["recover"]
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        os.execv(command[0], command)


def main() -> None:
    for name in ("SIGINT", "SIGHUP", "SIGQUIT", "SIGPIPE", "SIGCHLD", "SIGTERM", "SIGUSR1"):
        # Not SIG_IGN: the commands it runs would inherit that.
        signal.signal(getattr(signal, name), lambda *_: None)
    syslog.openlog("pyploop-pages", syslog.LOG_PID, syslog.LOG_DAEMON)
    lazy_guard.spare(os.getpid())
    page_stream.hurry(os.getpid())
    line = socket.socket(fileno=int(sys.argv[1]))
    Keeper(line, lazy_guard.Record(sys.argv[2])).serve()


if __name__ == "__main__":
    main()
