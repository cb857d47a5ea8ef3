# SPDX-License-Identifier: Apache-2.0
"""What must be undone, held in three places: here, in a watchdog process, and
in a journal for `pyploop thaw`.

Invariant: an entry is with the watchdog before its act begins, and leaves it
only when it is undone or somebody else's.  So whoever dies, one is left who
undoes: this process after an exception or a signal, the watchdog when this
process is killed or hangs past the limit, a person when both are gone.

Used by one thread.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyploop.errors import (
    CommandError,
    DeviceControlError,
    LoopError,
    OpenError,
    ParameterError,
)
from pyploop.report.events import Reporter
from pyploop.system import kernel
from pyploop.system.worker import wait_for
from pyploop.undo import watchdog
from pyploop.undo.journal import Entry, Journal, describe

START_DEADLINE = 10.0
"""Seconds for the watchdog to start."""
ANSWER_DEADLINE = 5.0
"""Seconds for it to answer: it only ever waits for us."""
UNDO_TIMEOUT = 30.0
"""Seconds of a command that undoes."""


@dataclass(frozen=True, eq=False)
class Held:
    """One entry of a plan; `fd`: what a `thaw` needs."""

    entry: Entry
    fd: int = -1

    @property
    def number(self) -> int:
        return int(self.entry["id"])

    def by(self, fd: int) -> Held:
        """The same entry, undone by another descriptor."""
        return self if fd == self.fd else replace(self, fd=fd)


class Plan:
    """The undo steps of one copy, oldest first.  Nothing is started, and no
    file made, before there is something to hold."""

    def __init__(self, what: str, report: Reporter) -> None:
        """`what`: for a person, in the journal."""
        self._what, self._report = what, report
        self._numbers = itertools.count(1)
        self._held: list[Held] = []
        self._journal: Journal | None = None
        self._want_journal = True
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._ready = False
        self._ended: str | None = None
        self._limit = 0.0
        self._until: float | None = None
        """time.monotonic() at which the watchdog undoes everything."""
        self._final = False
        """A watchdog that ends now is not replaced: it may have undone something."""

    # ---- the watchdog

    def launch(self) -> None:
        """Begin to start a watchdog, for a `start` that comes later: nobody
        waits for a process meanwhile."""
        if self._line is not None:
            return
        if self._journal is None and self._want_journal:
            try:
                self._journal = Journal.create(self._what)
            except OpenError as e:
                self._report.info(f"{e}; `pyploop thaw` will know nothing of this copy")
        self._spawn()

    def start(self) -> None:
        """Have a living watchdog, and a journal; both before anything is held,
        so that neither costs frozen time.  What `watch` raises when the one
        there was may have undone something."""
        if self._ready and self._ended is None:
            self._listen()
        if self._ready and self._ended is not None:
            if self._final or self._ended == "undone":
                self.watch()
            self._end_watchdog()
        if self._ready:
            return
        self.launch()
        self._await_ready()
        for held in self._held:
            self._tell_add(held)
        if self._until is not None:
            self._tell(op="limit", seconds=max(self._until - time.monotonic(), 0.0))

    def drop_journal(self, why: str) -> None:
        """Go on without a journal: it cannot be written, or that would wait for a thaw."""
        self._report.info(f"No undo journal: {why}")
        self._want_journal = False
        if self._journal is not None:
            self._journal.clear()
            self._journal = None

    def _write(self, change: Callable[[Journal], object]) -> None:
        """In the journal, if there is one.  A folder that takes no more (it is full, or
        read-only now) costs the journal, and not the copy."""
        if self._journal is not None:
            try:
                change(self._journal)
            except DeviceControlError as e:
                self.drop_journal(f"{e}; `pyploop thaw` will know nothing of this copy")

    def _forget(self, entry: Entry) -> None:
        self._write(lambda journal: journal.done(entry))

    def _spawn(self) -> None:
        # Packets: one message each, whatever its length.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = "" if self._journal is None else str(self._journal.path)
        args = [sys.executable, "-I", "-S", str(Path(watchdog.__file__))]
        args += [str(kernel.FITHAW), str(theirs.fileno()), path]
        with theirs:
            self._process = subprocess.Popen(
                args,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._line = ours

    def _await_ready(self) -> None:
        assert self._line is not None and self._process is not None, "launched"
        self._line.settimeout(START_DEADLINE)
        if self._receive() != watchdog.READY:
            self._end_watchdog()
            raise DeviceControlError("the thaw watchdog did not start; nothing was frozen")
        self._line.settimeout(ANSWER_DEADLINE)
        self._ready, self._ended = True, None
        pids = os.getpid(), self._process.pid
        self._write(lambda journal: journal.set_owners(*pids))

    def _receive(self) -> bytes:
        assert self._line is not None
        try:
            return self._line.recv(watchdog.LONGEST)
        except OSError:  # TimeoutError among them
            return b""

    def _tell(self, fd: int = -1, **message: Any) -> None:
        """A message; a watchdog that cannot take it counts as dead."""
        if self._line is None or not self._ready or self._ended is not None:
            return
        data = json.dumps(message).encode()
        try:
            socket.send_fds(self._line, [data], [fd] if fd >= 0 else [])
        except OSError:
            self._ended = "dead"

    def _tell_add(self, held: Held) -> None:
        self._tell(held.fd, op="add", id=held.number, entry=held.entry)

    def _listen(self) -> None:
        """Has it said something of itself?"""
        assert self._line is not None
        while self._ended is None and select.select([self._line], [], [], 0)[0]:
            self._ended = "undone" if self._receive() == watchdog.UNDONE else "dead"

    def _end_watchdog(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
        self._ready = False
        if self._process is not None:
            try:
                wait_for(self._process, START_DEADLINE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def watch(self) -> None:
        """LoopError when the watchdog has undone everything because the limit
        had passed; DeviceControlError when it has died before that."""
        if not self._ready:
            return
        self._listen()
        if self._ended == "undone":
            raise LoopError(
                f"held for more than {self._limit:g} s: the watchdog undid it; no target was made"
            )
        if self._ended == "dead" and self._until is not None and time.monotonic() >= self._until:
            # It may have begun to undo, and not have come to say so.
            raise LoopError(
                f"held for more than {self._limit:g} s, and the watchdog does not answer: it may "
                "have undone everything; no target was made"
            )
        if self._ended == "dead":
            raise DeviceControlError("the thaw watchdog has died; undone, no target was made")

    def limit(self, seconds: float | None) -> None:
        """The freeze begins.  The watchdog undoes everything so many seconds
        from now; None: when this process ends only."""
        self._limit = seconds or 0.0
        self._until = None if seconds is None else time.monotonic() + seconds
        self._final = True
        self._tell(op="limit", seconds=seconds)

    def unlimit(self) -> None:
        """The freeze has ended and all of it is undone: another may begin."""
        self._until, self._final = None, False
        self._tell(op="limit", seconds=None)

    def in_time(self) -> None:
        """What `watch` raises, and LoopError when the limit has passed here:
        the watchdog is undoing by now.  No question, so it costs nothing."""
        self.watch()
        if self._until is not None and time.monotonic() >= self._until:
            raise LoopError(
                f"held for more than {self._limit:g} s, so it is being undone; no target was made"
            )

    def still_held(self, seconds: float | None) -> None:
        """Ask whether nothing has been undone, and set a new limit at once:
        what `watch` raises when the answer is not yes."""
        if not self._ready:
            return
        self._ask(seconds)
        self.watch()

    def settle(self) -> None:
        """Returns when the watchdog has done all that it was told so far, such
        as to close a descriptor.  What `watch` raises."""
        if self._ready:
            left = None if self._until is None else max(self._until - time.monotonic(), 0.0)
            self.still_held(left)

    def _ask(self, seconds: float | None) -> bool:
        until = None if seconds is None else time.monotonic() + seconds
        self._tell(op="ask", seconds=seconds)
        if self._ended is None:
            answer = self._receive()
            if answer != watchdog.HELD:
                self._ended = "undone" if answer == watchdog.UNDONE else "dead"
        if self._ended is None:
            self._until = until
        return self._ended is None

    # ---- entries

    def foresee(self, entry: Entry, fd: int = -1) -> Held:
        """Write an entry to the journal ahead of its time, so that `add` costs
        no file in the freeze: for what is harmless to undo when not done."""
        held = Held({**entry, "id": next(self._numbers)}, fd)
        if len(json.dumps(held.entry)) > watchdog.LONGEST // 2:
            raise ParameterError(f"{describe(entry)[:60]!r}…: too long to be held")
        self._write(lambda journal: journal.add(held.entry))
        return held

    def add(self, what: Entry | Held, fd: int = -1) -> Held:
        """Before the act; what `watch` raises when that must not begin."""
        if not self._ready:
            self.start()
        self.watch()
        held = what if isinstance(what, Held) else self.foresee(what, fd)
        self._held.append(held)
        self._tell_add(held)
        return held

    def release(self, held: Held) -> None:
        """Its act did not take place, or is undone; it is still foreseen."""
        if held in self._held:
            self._held.remove(held)
            self._tell(op="done", id=held.number)

    def done(self, held: Held) -> None:
        """It is undone, or somebody else's from now on."""
        self.release(held)
        if self._ended != "undone":
            self._forget(held.entry)

    def take_over(self) -> None:
        """Undoing begins here: the limit ends.  Never raises."""
        if self._ready and self._ended is None:
            self._ask(None)

    def undo(self, held: Held, *, keep_note: bool = False) -> bool:
        """Undo one now; false: its act has not begun.  What fails stays in the
        journal: DeviceControlError, for a command CommandError.  keep_note: so
        does what succeeds, still foreseen."""
        if held not in self._held:
            return False
        entry = held.entry
        try:
            if entry["kind"] == "thaw":
                _thaw(held)
            elif entry["kind"] == "write":
                watchdog.write_value(entry)
            elif self._ended != "undone":
                watchdog.run(entry)
        except OSError as e:
            self.release(held)
            entry["error"] = e.strerror or str(e)
            self._write(lambda journal: journal.save())
            kind = CommandError if entry["kind"] == "run" else DeviceControlError
            raise kind(f"cannot {describe(entry)}: {e.strerror or e}{self._by_hand(entry)}") from e
        if keep_note:
            self.release(held)
        else:
            self.done(held)
        return True

    def _by_hand(self, entry: Entry) -> str:
        ways = [entry["by_hand"]] if "by_hand" in entry else []
        ways += [f"pyploop thaw {self._journal.id}"] if self._journal is not None else []
        return f" (by hand: {', or '.join(ways)})" if ways else ""

    def set_file(self, path: str, value: str, what: str) -> Held | None:
        """Write `value` to a kernel's file until `undo`; None: it has it
        already.  OSError as of the file."""
        file = Path(path)
        old = file.read_text().strip()
        if old == value:
            return None
        held = self.add(
            {"kind": "write", "path": path, "value": old, "only_if": value, "what": what}
        )
        try:
            file.write_text(value)
        except OSError:
            self.done(held)
            raise
        return held

    def close(self) -> None:
        """Undo what is left, end the watchdog, remove the journal.  Says what
        could not be undone; never raises."""
        if self._held:
            self.take_over()
        for held in reversed(list(self._held)):
            try:
                self.undo(held)
            except (DeviceControlError, CommandError) as e:
                self._report.error(str(e))
        self._end_watchdog()
        if self._journal is not None:
            undone_elsewhere = self._ended == "undone"
            if undone_elsewhere and self._journal.path.exists():
                self._report.error(
                    f"not everything could be undone: pyploop thaw --list, {self._journal.id}"
                )
            elif not undone_elsewhere:
                for entry in self._journal.entries:
                    if "error" not in entry:  # foreseen, and never begun
                        self._forget(entry)
                if self._journal is not None:
                    self._journal.close()
            self._journal = None


def _thaw(held: Held) -> None:
    try:
        kernel.fithaw(held.fd, held.entry["mount"])
    except OSError as e:
        if e.errno != errno.EINVAL:  # thawed already
            raise
