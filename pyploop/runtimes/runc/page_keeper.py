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
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import syslog
import time
from typing import Any

from pyploop.runtimes.runc import lazy_guard, page_relay
from pyploop.runtimes.runc.page_relay import Link, Stream

CONNECTING, SERVING, COMPLETE, LOST = "connecting", "serving", "complete", "lost"
RETRY = 0.5
GREETING_SECONDS = 40.0
"""For ssh, the agent and the relay to answer."""
CRIU_SECONDS = 60.0
"""For CRIU to end when its socket is closed."""
NOTE_EVERY = 1.0
REQUEST = 24
"""Bytes of a request of `criu lazy-pages` (struct page_server_iov)."""
FIRST_FD = 100
"""Descriptors for CRIU: below it, runc may have its own."""
_HELLO = re.compile(rb"(?:\A|\n)PYPLOOP-AGENT \d+ [^\n]{1,40}\n")
_ANSWER = re.compile(rb"(PAGES|GONE \w+|NO [^\n]{0,300})\n")


def _own_options() -> str:
    """What the user's own CRIU_CONFIG_FILE says, which ours takes the place of."""
    path = os.environ.get("CRIU_CONFIG_FILE")
    if not path:
        return ""
    with open(path) as f:
        return f.read()


class Greeting:
    """A connection that is being made."""

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


class Keeper:
    """Of one migration."""

    def __init__(self, line: socket.socket, record: lazy_guard.Record) -> None:
        self._line: socket.socket | None = line
        self._record = record
        self._fields = record.fields
        ours, self._theirs = socket.socketpair()
        self._stream = Stream(ours)
        self._greeting: Greeting | None = None
        self._again = 0.0
        """When to connect again."""
        self._gone = ""
        """What the target says when its relay has ended."""
        self._ready = False
        self._dump: subprocess.Popen[bytes] | None = None
        self._status = -1
        self._log = ""
        self._serving = self._stopping = self._bye = False
        self._freeze: tuple[str, str] = ("", "")
        self._noted = 0.0
        self._chld, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def serve(self) -> None:
        pid = os.getpid()
        self._record.set(keeper={"pid": pid, "start": lazy_guard.start_time(pid)})
        state = self._until_over()
        if self._stopping:
            self._stream.end(page_relay.BADLY)
            self._end_criu()
            self._flush()
            self._record.remove()
            self._say(stopped="")
            return
        self._stream.end(page_relay.WELL if state == COMPLETE else page_relay.BADLY)
        self._end_criu()
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
            if stream.peer_ended is not None and stream.drained:
                well = stream.peer_ended == page_relay.WELL
                return self._over(well, "the target's daemon has ended before it had all")
            if self._gone:
                return self._over(self._gone == COMPLETE, f"the target says: {self._gone}")
            if time.monotonic() - stream.heard > timeout:
                return self._over(False, f"the target could not be reached for {timeout:g} s")
            if self._line is None and not self._serving and self._dump is None:
                self._stopping = True  # the orchestrator was killed before the dump
            if stream.eof and stream.sock is not None:
                stream.close()  # CRIU has ended, well or not: the target says which
                stream.end(page_relay.BADLY)
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
        if self._status >= 0:
            others.append(self._status)
        ready = stream.turn(others, seconds)
        if self._chld in ready:
            with contextlib.suppress(BlockingIOError):
                self._stopping |= signal.SIGUSR1 in os.read(self._chld, 4096)
        if self._greeting is not None:
            self._greet(self._greeting.rfd in ready)
        if stream.met and not self._ready:
            self._ready = True
            self._say(ready="")
        if self._dump is not None and not self._serving:
            self._look_at_dump(self._status in ready)
        if self._line is not None and self._line.fileno() in ready:
            self._hear()
        if time.monotonic() - self._noted > NOTE_EVERY:
            self._noted = time.monotonic()
            if self._serving:
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
            self._start_dump(message)
        elif message["op"] == "bye":
            self._bye = True
        else:
            self._stopping = True

    # ---- CRIU

    def _start_dump(self, order: dict[str, Any]) -> None:
        sock = fcntl.fcntl(self._theirs.fileno(), fcntl.F_DUPFD, FIRST_FD)
        told, tell = os.pipe2(os.O_CLOEXEC)
        word = fcntl.fcntl(tell, fcntl.F_DUPFD, FIRST_FD)
        os.close(tell)
        self._freeze = (order["freeze"][0], order["freeze"][1])
        self._log = order["log"]
        try:
            with open(order["config"], "x") as f:
                f.write(f"{_own_options()}\nps-socket {sock}\n")
            self._dump = subprocess.Popen(
                [*order["argv"], "--lazy-pages", "--status-fd", str(word), order["name"]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[sock, word, *order["keep"]],
                env={**order["env"], "CRIU_CONFIG_FILE": order["config"]},
                start_new_session=True,
            )
            self._status = told
        except OSError as e:
            os.close(told)
            self._say(dumped=f"{order['argv'][0]}: {e.strerror}")
        finally:
            os.close(sock)
            os.close(word)
            self._theirs.close()
            for fd in order["keep"]:
                with contextlib.suppress(OSError):
                    os.close(fd)

    def _look_at_dump(self, told: bool) -> None:
        assert self._dump is not None
        if not told:
            return
        word = os.read(self._status, 1)
        os.close(self._status)
        self._status = -1
        if not word:
            self._say(dumped=self._said() or "it ended without a word")
            return
        try:
            with open(self._freeze[0], "w") as f:
                f.write(self._freeze[1])
        except OSError as e:
            self._say(dumped=f"cannot freeze it: {self._freeze[0]}: {e.strerror}")
            return
        self._serving = True
        self._note(state=SERVING, since=time.time())
        self._say(dumped="")

    def _said(self) -> str:
        """The errors in CRIU's log."""
        try:
            with open(self._log, errors="replace") as f:
                lines = [x.split(") ", 1)[-1].strip() for x in f if "Error" in x]
        except OSError:
            return ""
        return "; ".join(lines)[-400:]

    def _end_criu(self) -> None:
        """Its socket ends, and then it does.  In the midst of a dump it must not be killed:
        that would spoil the container."""
        self._stream.close()
        self._theirs.close()
        if self._dump is None:
            return
        deadline = time.monotonic() + CRIU_SECONDS
        while self._dump.poll() is None:
            if time.monotonic() > deadline and (self._serving or self._status < 0):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._dump.pid, signal.SIGKILL)
            # The status is not awaited any more.
            self._stream.turn([], 0.02)

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
            self._stream.turn([], 0.1)

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
    page_relay.hurry(os.getpid())
    line = socket.socket(fileno=int(sys.argv[1]))
    Keeper(line, lazy_guard.Record(sys.argv[2])).serve()


if __name__ == "__main__":
    main()
