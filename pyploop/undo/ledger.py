# SPDX-License-Identifier: Apache-2.0
"""The steps that must be undone.  Each is kept in three places: in this process, in a
watchdog process, and in a journal for `pyploop thaw`.

Invariant: the watchdog knows a step before the step begins.  It drops the step only when
that is undone, or when another process has taken it over.  So one of these always remains
to undo it: this process after an exception or a signal; the watchdog when this process is
killed or takes longer than the limit; a person with `pyploop thaw` when both are gone.

For one thread only.
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
"""Seconds for it to answer.  It does nothing but wait for this process."""
UNDO_TIMEOUT = 30.0
"""Seconds for a command that undoes a step."""


@dataclass(frozen=True, eq=False)
class UndoStep:
    """One step of a ledger.  `fd`: the open file system, for an entry of kind `thaw`."""

    entry: Entry
    fd: int = -1

    @property
    def number(self) -> int:
        return int(self.entry["id"])

    def by(self, fd: int) -> UndoStep:
        """The same step, undone by another descriptor."""
        return self if fd == self.fd else replace(self, fd=fd)


class UndoLedger:
    """The undo steps of one copy, oldest first.  No process is started and no file made
    before the first step."""

    def __init__(self, what: str, report: Reporter) -> None:
        """`what`: for a person, in the journal."""
        self._what, self._report = what, report
        self._numbers = itertools.count(1)
        self._steps: list[UndoStep] = []
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
        """Begin to start a watchdog.  A later `start` waits for it; other work can be done
        in between."""
        if self._line is not None:
            return
        if self._journal is None and self._want_journal:
            try:
                self._journal = Journal.create(self._what)
            except OpenError as e:
                self._report.info(f"{e}; after a crash `pyploop thaw` cannot undo this copy")
        self._spawn()

    def start(self) -> None:
        """Have a living watchdog, and a journal.  Call it before the first step, so that
        neither adds to the downtime.  Raises as `watch` does when an earlier watchdog may
        have undone something."""
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
        for step in self._steps:
            self._send_step(step)
        if self._until is not None:
            self._send(op="limit", seconds=max(self._until - time.monotonic(), 0.0))

    def drop_journal(self, why: str) -> None:
        """Go on without a journal: it cannot be written, or lies on a file system that will
        be frozen."""
        self._report.info(f"No undo journal: {why}")
        self._want_journal = False
        if self._journal is not None:
            self._journal.clear()
            self._journal = None

    def _write(self, change: Callable[[Journal], object]) -> None:
        """Change the journal, if there is one.  When it cannot be written (a full or
        read-only folder), the copy goes on without it."""
        if self._journal is not None:
            try:
                change(self._journal)
            except DeviceControlError as e:
                self.drop_journal(f"{e}; after a crash `pyploop thaw` cannot undo this copy")

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

    def _send(self, fd: int = -1, **message: Any) -> None:
        """Send a message.  A watchdog that cannot take it counts as dead."""
        if self._line is None or not self._ready or self._ended is not None:
            return
        data = json.dumps(message).encode()
        try:
            socket.send_fds(self._line, [data], [fd] if fd >= 0 else [])
        except OSError:
            self._ended = "dead"

    def _send_step(self, step: UndoStep) -> None:
        self._send(step.fd, op="add", id=step.number, entry=step.entry)

    def _listen(self) -> None:
        """Read what the watchdog has sent unasked."""
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
                f"the source was frozen for more than {self._limit:g} s (--freeze-limit): the "
                "watchdog thawed it; no target was made"
            )
        if self._ended == "dead" and self._until is not None and time.monotonic() >= self._until:
            # It may have begun to undo, and died before it could report that.
            raise LoopError(
                f"the source was frozen for more than {self._limit:g} s (--freeze-limit), and the "
                "watchdog does not answer: it may have thawed the source; no target was made"
            )
        if self._ended == "dead":
            raise DeviceControlError(
                "the thaw watchdog has died: the source was thawed; no target was made"
            )

    def limit(self, seconds: float | None) -> None:
        """The freeze begins.  The watchdog undoes everything this many seconds from now;
        None: only when this process ends."""
        self._limit = seconds or 0.0
        self._until = None if seconds is None else time.monotonic() + seconds
        self._final = True
        self._send(op="limit", seconds=seconds)

    def unlimit(self) -> None:
        """The freeze has ended and all of it is undone.  Another may begin."""
        self._until, self._final = None, False
        self._send(op="limit", seconds=None)

    def in_time(self) -> None:
        """Raises as `watch` does, and LoopError when the limit has passed by this process's
        clock.  The watchdog is not asked, so this takes no time."""
        self.watch()
        if self._until is not None and time.monotonic() >= self._until:
            raise LoopError(
                f"the source was frozen for more than {self._limit:g} s (--freeze-limit): the "
                "watchdog is thawing it; no target was made"
            )

    def renew(self, seconds: float | None) -> None:
        """Ask the watchdog whether all steps still stand, and set a new limit (seconds from
        now; None: no limit) in the same message.  Raises as `watch` does when they do not."""
        if not self._ready:
            return
        self._ask(seconds)
        self.watch()

    def settle(self) -> None:
        """Wait until the watchdog has handled all earlier messages, and so has closed the
        descriptors of finished steps.  Raises as `watch` does."""
        if self._ready:
            left = None if self._until is None else max(self._until - time.monotonic(), 0.0)
            self.renew(left)

    def _ask(self, seconds: float | None) -> bool:
        until = None if seconds is None else time.monotonic() + seconds
        self._send(op="ask", seconds=seconds)
        if self._ended is None:
            answer = self._receive()
            if answer != watchdog.ARMED:
                self._ended = "undone" if answer == watchdog.UNDONE else "dead"
        if self._ended is None:
            self._until = until
        return self._ended is None

    # ---- steps

    def prepare(self, entry: Entry, fd: int = -1) -> UndoStep:
        """Write a step to the journal early, so that `add` writes no file in the freeze.
        Only for a step that is harmless to undo when it was not done."""
        step = UndoStep({**entry, "id": next(self._numbers)}, fd)
        if len(json.dumps(step.entry)) > watchdog.LONGEST // 2:
            raise ParameterError(
                f"the undo step {describe(entry)[:60]!r}… is too long: {watchdog.LONGEST // 2} "
                "bytes are allowed"
            )
        self._write(lambda journal: journal.add(step.entry))
        return step

    def add(self, what: Entry | UndoStep, fd: int = -1) -> UndoStep:
        """Call it before the step begins.  Raises as `watch` does: then it must not begin."""
        if not self._ready:
            self.start()
        self.watch()
        step = what if isinstance(what, UndoStep) else self.prepare(what, fd)
        self._steps.append(step)
        self._send_step(step)
        return step

    def release(self, step: UndoStep) -> None:
        """The step did not take place, or is undone.  It stays prepared."""
        if step in self._steps:
            self._steps.remove(step)
            self._send(op="done", id=step.number)

    def done(self, step: UndoStep) -> None:
        """The step is undone, or another process has taken it over."""
        self.release(step)
        if self._ended != "undone":
            self._forget(step.entry)

    def take_over(self) -> None:
        """This process undoes the steps itself from now on, so the limit is lifted.  Never
        raises."""
        if self._ready and self._ended is None:
            self._ask(None)

    def undo(self, step: UndoStep, *, keep_prepared: bool = False) -> bool:
        """Undo one step now; false: it has not begun.  DeviceControlError, or CommandError
        for a command, when that fails; the step then stays in the journal.  keep_prepared:
        it stays there when it succeeds, too."""
        if step not in self._steps:
            return False
        entry = step.entry
        try:
            if entry["kind"] == "thaw":
                _thaw(step)
            elif entry["kind"] == "write":
                watchdog.write_value(entry)
            elif self._ended != "undone":
                watchdog.run(entry)
        except OSError as e:
            self.release(step)
            entry["error"] = e.strerror or str(e)
            self._write(lambda journal: journal.save())
            kind = CommandError if entry["kind"] == "run" else DeviceControlError
            raise kind(f"cannot {describe(entry)}: {e.strerror or e}{self._by_hand(entry)}") from e
        if keep_prepared:
            self.release(step)
        else:
            self.done(step)
        return True

    def _by_hand(self, entry: Entry) -> str:
        ways = [entry["by_hand"]] if "by_hand" in entry else []
        ways += [f"pyploop thaw {self._journal.id}"] if self._journal is not None else []
        return f" (by hand: {', or '.join(ways)})" if ways else ""

    def set_file(self, path: str, value: str, what: str) -> UndoStep | None:
        """Write `value` to a file of /proc or /sys until `undo`; None: it has this value
        already.  OSError when the file cannot be read or written."""
        file = Path(path)
        old = file.read_text().strip()
        if old == value:
            return None
        step = self.add(
            {"kind": "write", "path": path, "value": old, "only_if": value, "what": what}
        )
        try:
            file.write_text(value)
        except OSError:
            self.done(step)
            raise
        return step

    def close(self) -> None:
        """Undo what is left, end the watchdog, remove the journal.  Reports what could not
        be undone; never raises."""
        if self._steps:
            self.take_over()
        for step in reversed(list(self._steps)):
            try:
                self.undo(step)
            except (DeviceControlError, CommandError) as e:
                self._report.error(str(e))
        self._end_watchdog()
        if self._journal is not None:
            undone_elsewhere = self._ended == "undone"
            if undone_elsewhere and self._journal.path.exists():
                self._report.error(
                    f"not everything could be undone: see journal {self._journal.id}",
                    "`pyploop thaw --list` shows what is left",
                )
            elif not undone_elsewhere:
                for entry in self._journal.entries:
                    if "error" not in entry:  # prepared, and never begun
                        self._forget(entry)
                if self._journal is not None:
                    self._journal.close()
            self._journal = None


def _thaw(step: UndoStep) -> None:
    try:
        kernel.fithaw(step.fd, step.entry["mount"])
    except OSError as e:
        if e.errno != errno.EINVAL:  # thawed already
            raise
