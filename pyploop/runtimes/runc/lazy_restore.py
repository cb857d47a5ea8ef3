# SPDX-License-Identifier: Apache-2.0
"""A lazy restore from the images that are on this host: whether it can be, and the agent's
end of the guard that starts CRIU's daemon and outlives the agent (lazy_guard.py).

Each step may fail, and then the restore is eager: nothing of the container has run yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pyploop.runtimes import lazy_images, lazy_policy, lazy_record
from pyploop.runtimes.lazy_policy import Choice
from pyploop.runtimes.lazy_record import LazyRecord
from pyploop.runtimes.runc import lazy_chain, lazy_guard, page_local, page_relay
from pyploop.system.commands import Command, detached, last_words
from pyploop.wire.protobuf import Malformed

FEATURES = ("uffd", "uffd-noncoop")
PROBE_SECONDS = 30.0
READY_SECONDS = 5.0
"""For the guard to start."""
SERVING_SECONDS = 10.0
"""For the daemon to listen.  It reads two small images."""
STOPPING_SECONDS = 5.0
FIRST_FD = 100
"""Of a descriptor for CRIU."""
WORK = "lazy-work"
"""The daemon's folder, and the restore's: CRIU looks for its socket there."""


def problem(criu: str) -> str:
    """Why memory cannot be loaded by page faults here; empty: it can."""
    for feature in FEATURES:
        try:
            status, said = Command([criu, "check", "--feature", feature]).wait(PROBE_SECONDS)
        except OSError as e:  # TimeoutError is one
            return f"{criu} check --feature {feature}: {e.strerror or e}"
        if status:
            return f"{criu} check --feature {feature}: {last_words(said)}"
    return ""


class LazyRestore:
    """Of one container that comes to this host."""

    def __init__(self, criu: str, state: Path) -> None:
        """state: runc's record of the container."""
        self._criu, self._state = criu, state
        self._want: lazy_policy.Wanted = "never"
        self._line: socket.socket | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._folder, self._commit = Path(), Path()
        self._record: Path | None = None
        self._asked = self._kept = False
        self.post_copy, self.chained = 0.0, False
        self._flat: Path | None = None
        """The images whose lists have been written anew."""
        self._relay: subprocess.Popen[bytes] | None = None
        self._pages = -1
        """The guard's number of the daemon's socket to the relay."""
        self._socket = Path()
        """Through which the relay gets its connections."""
        self.limit = 0
        """Bytes of the container's memory limit here; 0: none."""
        self.choice = Choice(lazy_policy.NOT_LIVE)
        """Also of what failed on the way."""

    @property
    def work(self) -> Path:
        return self._folder / WORK

    def choose(self, want: lazy_policy.Wanted, told: Any) -> Choice:
        """Before anything is copied.  told: as the source tells of its memory."""
        self._want = want
        self.choice = lazy_policy.choose(want, lazy_policy.memory_of(told), self.limit)
        if self.choice.lazy:
            self.choice = Choice(problem(self._criu))
        return self.choice

    def why_no_post_copy(self, want: lazy_policy.Wanted, told: Any) -> str:
        """want: this host's wish, or the source's.  told: as for `choose`."""
        if want == "never":
            return "lazy_restore is never, so no memory is loaded while the container runs"
        memory = lazy_policy.memory_of(told)
        if memory and (why := lazy_policy.exceeds(memory, self.limit)):
            return why
        return problem(self._criu)

    def start(self, folder: Path, commit: Path, record: Path, **fields: Any) -> None:
        """The guard, before the container is suspended.  folder: of all images.  commit: the
        commit record.  record: the one to make, with `fields`."""
        self._folder, self._commit = folder, commit
        try:
            self.work.mkdir(mode=0o700)
            self._record = record
            if self.post_copy:
                fields["post_copy"] = self.post_copy
            LazyRecord.create(record, images=str(folder), **fields)
            more = self._start_relay(record, str(fields["migration"]))
            self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            args = [sys.executable, "-I", "-m", lazy_guard.__name__]
            with theirs:
                self._guard = detached(
                    [*args, str(theirs.fileno()), str(record)], [theirs.fileno(), *more]
                )
            for fd in more:
                os.close(fd)
        except OSError as e:
            self._fail(f"no guard: {e.strerror or e}")

    def _start_relay(self, record: Path, migration: str) -> list[int]:
        """What answers the daemon, when it does not read the pages itself.  Returns the
        daemon's end."""
        if not self.post_copy and not self.chained:
            return []
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._pages = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, FIRST_FD)
            fd = str(ours.fileno())
            if self.post_copy:
                self._socket = record.parent / lazy_record.relay_name(migration)
                words = [page_relay.__name__, fd, self._socket.name, str(record)]
                words += [str(self.work), str(self.post_copy)]
            else:
                words = [page_local.__name__, fd, str(self.work)]
            command = [sys.executable, "-I", "-m", *words]
            self._relay = detached(command, [ours.fileno()], record.parent)
        return [self._pages]

    def _fail(self, why: str) -> None:
        self.choice = Choice(why)
        self.stop()
        if self._flat is not None:
            lazy_chain.put_back(self._flat, self.work)
            self._flat = None

    def _answer(self, key: str, seconds: float) -> None:
        """Wait for one message; what it says is wrong becomes the choice's reason."""
        why = f"the guard did not answer within {seconds:g} s"
        with contextlib.suppress(OSError, ValueError):
            assert self._line is not None
            if select.select([self._line], [], [], seconds)[0]:
                data = self._line.recv(lazy_guard.LONGEST)
                why = json.loads(data).get(key, f"no {key!r}") if data else "the guard has ended"
        if why:
            self._fail(why)

    def _tell(self, **message: Any) -> None:
        assert self._line is not None
        with contextlib.suppress(OSError):  # its end is seen when it should answer
            self._line.send(json.dumps(message).encode())

    def serve(self, images: Path) -> None:
        """All images are there, and checked: the daemon is started, and not waited for."""
        if not self.choice.lazy:
            return
        if self.chained:
            try:
                lazy_chain.flatten(images, self.work)
            except (OSError, Malformed) as e:
                self._fail(f"the memory rounds cannot be loaded lazily: {e}")
                return
            self._flat = images
        pages = lazy_images.lazy_bytes(images) or 0
        again = Choice() if self.post_copy else lazy_policy.choose_again(self._want, pages)
        if not again.lazy:
            self._fail(again.why)
            return
        self._answer("ready", READY_SECONDS)
        if not self.choice.lazy:
            return
        log = self.work / "lazy-pages.log"
        argv = [self._criu, "lazy-pages", "-D", str(images), "-W", str(self.work)]
        more: dict[str, Any] = {}
        if self._pages >= 0:
            os.symlink(images, self.work / page_relay.IMAGES)
            argv += ["--page-server", "--ps-socket", str(self._pages)]
            more = {"pass": [self._pages], "why": str(self.work / "why")}
        self._tell(
            op="serve",
            argv=[*argv, "-o", log.name],
            log=str(log),
            state=str(self._state),
            images=str(self._folder),
            total=pages,
            commit=str(self._commit),
            **more,
        )
        self._asked = True

    def serving(self) -> bool:
        """Wait for the daemon.  False: the restore must be eager (`choice` says why)."""
        if self.choice.lazy and not self._asked:
            self._fail("the images were not there in time")
        if self.choice.lazy:
            self._answer("serving", SERVING_SECONDS)
        return self.choice.lazy

    def failed(self, why: str) -> None:
        """The lazy restore has failed, and nothing of the container has run."""
        self._fail(f"the lazy restore failed: {why}")

    def keep(self) -> None:
        """The container runs: the guard goes on by itself."""
        if self._line is not None:
            self._tell(op="keep")
            self._line.close()
            self._line = None
            self._kept = True

    def stop(self) -> None:
        """The container does not run, or not by this: the daemon is ended, and the record
        removed.  Nothing when there is no guard."""
        line, self._line = self._line, None
        deadline = time.monotonic() + STOPPING_SECONDS
        if line is not None:
            self._end_guard(line, deadline)
        if self._relay is not None and not self._kept:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._relay.wait(2.0)
            self._relay.kill()  # the source hears of it in another way
            self._relay.wait()
            if self.post_copy:
                self._socket.unlink(missing_ok=True)
        if self._record is not None and not self._kept and (left := LazyRecord.read(self._record)):
            left.stop()

    def _end_guard(self, line: socket.socket, deadline: float) -> None:
        with line, contextlib.suppress(OSError, ValueError):
            line.send(b'{"op": "stop"}')
            while select.select([line], [], [], max(0.0, deadline - time.monotonic()))[0]:
                data = line.recv(lazy_guard.LONGEST)
                if not data or "stopped" in json.loads(data):
                    break
        if self._guard is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(max(0.1, deadline - time.monotonic()))
