# SPDX-License-Identifier: Apache-2.0
"""`pyploop agent`: the target's end of a migration (docs/internals/agent-protocol.md).

It serves one connection on stdin and stdout, request by request.  When the connection ends
before the commit, everything is undone.  After the commit nothing is.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pyploop.errors import (
    BusyError,
    MigrateError,
    ProtocolError,
    PyploopError,
    VzExitCode,
)
from pyploop.migration import commit_record, deadlines, locks
from pyploop.migration.image_channels import ImageReader, open_reader
from pyploop.migration.target import checks, resumable_files, wire_probe
from pyploop.migration.target.first_line import greet
from pyploop.migration.target.incoming import Incoming
from pyploop.migration.target.incoming_disks import Stream
from pyploop.migration.target.incoming_lanes import IncomingLanes
from pyploop.migration.target.settle import settle, settle_dead
from pyploop.runtimes import Facts, Runtime, policy
from pyploop.runtimes.checks import Checks, ChecksFailedError, naming
from pyploop.runtimes.config import NAME, HostConfig
from pyploop.runtimes.policy import Source
from pyploop.runtimes.registry import accepted, make_runtime
from pyploop.system import contention
from pyploop.system.jobs import Job
from pyploop.transport.bulk import Bulk
from pyploop.transport.mux import Mux
from pyploop.transport.server import Server
from pyploop.wire import channels, messages
from pyploop.wire import mux as wire
from pyploop.wire.messages import clipped


class Agent(Server):
    """One connection."""

    name, peer = "pyploop agent", "source"

    def __init__(
        self, host: HostConfig, rfd: int, wfd: int, source: Source, early: bytes | None = None
    ) -> None:
        """source: the source, as this host knows it.  early: what greet() has returned; None:
        it was not called."""
        self._host, self._source = host, source
        self._live = False
        """A live migration was requested, and this host trusts the source with it."""
        self._runtime: Runtime | None = None
        self._incoming: Incoming | None = None
        self._had_begun = False
        """`begin` has come.  The checks hold no longer: this connection itself may have
        made what they look for."""
        self._probes = 0
        self._probing: Job[None] | None = None
        self._facts: Facts = {}
        self._locks = contextlib.ExitStack()
        self._lanes = IncomingLanes()
        self._bulk: Bulk | None = None
        """The connection over several lanes."""
        requests: dict[str, Callable[..., dict[str, Any]]] = {
            "clock": self._clock,
            "check": self._check,
            "busy": self._busy,
            "probe": self._probe,
            "probed": self._probed,
            "begin": self._begin,
            "items": self._items,
            "digests": self._digests,
            "disk": self._disk,
            "lane": self._lane,
            "use": self._use,
            "tree": self._tree,
            "dump": self._dump,
            "join": self._join,
            "restore": self._restore,
            "start": self._start,
            "finish": self._finish,
            "undo": self._undo,
            "settle": self._settle,
            "forget": self._forget,
        }
        early = greet(rfd, wfd) if early is None else early
        super().__init__(Mux(rfd, wfd, early, on_dead=self._dead), requests)

    def _dead(self, cause: PyploopError) -> None:
        """From any thread: the connection has ended, and with it all that goes by lanes."""
        self._lanes.end()
        if self._bulk is not None:
            self._bulk.mux.end(cause)

    def patience(self) -> float:
        """Seconds within which the next request must come."""
        if self._incoming is not None:
            return deadlines.IDLE if self._incoming.working() else deadlines.UNBEGUN
        return deadlines.UNBEGUN if self._runtime is not None else deadlines.UNASKED

    def checked(self, op: Any, args: Any) -> dict[str, Any]:
        return messages.request(op, args)

    def failure(self, error: PyploopError) -> dict[str, Any]:
        if isinstance(error, ChecksFailedError):
            # An older source knows only the first two.
            first = error.failed[0].error().with_hint()
            return {"code": error.exit_code, "message": clipped(first), "failed": error.told()}
        return {"code": vz_code(error), "message": clipped(error.with_hint())}

    def bad_request(self, text: str) -> dict[str, Any]:
        return {"code": VzExitCode.USAGE, "message": text}

    def end(self) -> None:
        failed: list[str] = []
        self._lanes.end()
        if self._incoming is not None:
            done, self._incoming = self._incoming, None
            if done.ran:
                failed = done.complete()
            elif not done.committed:
                failed = done.undo()
            # Else it is not known whether the container runs.  settle() finds the journal.
        self._close_lanes()
        self._mux.close()
        self._locks.close()
        for text in failed:
            self.say(f"not undone: {text}")

    # ---- requests

    def _clock(self) -> dict[str, Any]:
        return {"monotonic": time.monotonic()}

    def _check(
        self,
        *,
        container: str,
        runtime: str,
        live: bool,
        facts: Facts,
        sizes: list[int],
        nodeps: list[str],
    ) -> dict[str, Any]:
        if self._runtime is not None:
            raise ProtocolError("agent protocol: the request `check` came twice")
        if not NAME.fullmatch(container):
            raise ProtocolError(f"agent protocol: {container[:40]!r} is not a container's name")
        if runtime == "runc" and container not in self._host.containers:
            self._accept(container, facts, live)
        chosen = make_runtime(self._host, runtime, container)
        facts = {**facts, "source": resumable_files.source_of(facts, str(self._source))}
        found = Checks()
        if live or chosen.needs_trust:
            with found.named("trust"):
                checks.check_trust(self._host, self._source, chosen.name)
        try:
            with found.named("lock"):
                checks.lock(self._host, chosen, self._locks)
            if found.has("lock"):
                found.end()
            answer = checks.check_all(
                self._host, chosen, live, facts, sizes=sizes, nodeps=nodeps, found=found
            )
        except BaseException:
            self._locks.close()  # this migration has failed, and others may begin
            raise
        # Not before this: all that follows relies on all of these checks.
        self._runtime, self._facts, self._live = chosen, facts, live
        return answer

    def _accept(self, container: str, facts: Facts, live: bool) -> None:
        """A container that is not in the configuration, from a source that may place it.
        Without --live no other trust is asked for, so from others it is only not known."""
        told = facts.get("found")
        trusted = live or policy.trusts(self._host.trusted_live, self._source)
        if told and self._host.trusted_places and trusted:
            with naming("trust"):
                checks.check_trust(self._host, self._source, "runc")
            with naming("policy"):
                self._host = accepted(self._host, container, told)

    def _busy(self) -> dict[str, Any]:
        return {"busy": contention.busy()}

    def _probe(
        self, channel: int, size: int, window: int = wire.WINDOW, bulk: bool = False
    ) -> dict[str, Any]:
        if self._runtime is None or self._had_begun:
            raise ProtocolError("agent protocol: `probe` must come after `check`, before `begin`")
        if self._probing is not None and not self._probing.over.is_set():
            raise ProtocolError("agent protocol: a probe is under way")
        self._probes += 1
        if self._probes > channels.PROBES:
            raise ProtocolError(f"agent protocol: more than {channels.PROBES} probes")
        images = self._images(channel, window, bulk, deadlines.PROBING)
        self._probing = Job(wire_probe.receiver(images, size)).start()
        return {}

    def _probed(self) -> dict[str, Any]:
        if self._probing is None:
            raise ProtocolError("agent protocol: `probed` must come after `probe`")
        try:
            self._probing.join(deadlines.PROBING)
        except TimeoutError as e:
            raise ProtocolError("agent protocol: the bytes of a probe have not come") from e
        return {}

    def _begin(self, migration: str, stall: float, keep: bool) -> dict[str, Any]:
        if self._runtime is None or self._had_begun:
            raise ProtocolError("agent protocol: `begin` must come once, after `check`")
        chosen = self._runtime
        if not 0 <= float(stall) <= deadlines.IDLE:  # false for a NaN
            raise ProtocolError(
                f"agent protocol: {stall!r} is not a time-out from 0 to {deadlines.IDLE:g} seconds"
            )
        # vzctl's containers are not locked here, so another source may have come as far.
        with locks.exclusive(commit_record.make_folder(Path(self._host.state_dir))):
            settle_dead(self._host, chosen)
            if chosen.state().exists:
                raise MigrateError(
                    VzExitCode.EXISTS,
                    f"container {chosen.container} was created on this host after the checks; "
                    "nothing of the migration is left here",
                )
            self._incoming = Incoming(
                self._host,
                chosen,
                commit_record.check_id(migration),
                self._facts,
                stall=float(stall),
                keep=bool(keep),
                report=self._report,
            )
        self._had_begun = True
        return {"kept": self._incoming.kept_names}

    def _begun(self) -> Incoming:
        if self._incoming is None:
            raise ProtocolError("agent protocol: this request must come after `begin`")
        return self._incoming

    def _receiving(self) -> Incoming:
        """The incoming migration.  ProtocolError when it may receive nothing now."""
        if self._begun().committed:
            raise ProtocolError("agent protocol: nothing is received after the commit")
        if self._begun().placing():
            raise ProtocolError(
                "agent protocol: the static files are not all there yet; `join` must come first"
            )
        return self._begun()

    def _items(self, channel: int) -> dict[str, Any]:
        incoming = self._receiving()
        with self._opened(channel) as fd:
            incoming.take_items(fd)
        return {}

    def _digests(self, channel: int, files: list[Any]) -> dict[str, Any]:
        self._receiving().send_digests(files, self._mux.open(channel))
        return {}

    def _disk(self, index: int, channel: int, reuse: bool = False, lane: int = 0) -> dict[str, Any]:
        incoming = self._receiving()
        if not channel:
            came, further = self._lanes.take(lane), self._lanes.of_disk(index)
            failed = partial(self._lanes.drop, came)
            stream = Stream(came.rfd, came.wfd, further, self._lanes.reads, failed)
            incoming.take_disk(index, stream, reuse)
            return {}
        with self._opened(channel) as fd:
            incoming.take_disk(index, Stream(fd), reuse)
        return {}

    def _lane(self, number: int) -> dict[str, Any]:
        if self._runtime is None or (self._incoming is not None and self._incoming.committed):
            raise ProtocolError("agent protocol: `lane` must come after `check`, before the commit")
        return {"token": self._lanes.expect(number)}

    def _use(self, number: int, disk: int | None) -> dict[str, Any]:
        if disk is None:
            came = self._lanes.take(number)
            self._bulk = self._bulk or Bulk(at_once=channels.BULK_AT_AGENT)
            try:
                self._bulk.add(came.rfd, came.wfd, number)
            except OSError as e:
                raise ProtocolError.of(f"lane {number} cannot be added", e) from e
        else:
            self._receiving()
            self._lanes.use(number, disk)
        return {}

    def _close_lanes(self) -> None:
        """Nothing comes by them any more."""
        bulk, self._bulk = self._bulk, None
        if bulk is not None:
            bulk.close()
        self._lanes.close()

    def _images(self, channel: int, window: int, bulk: bool, stall: float) -> ImageReader:
        most = wire.BULK_WINDOW if bulk else wire.IMAGE_WINDOW
        if window > most:
            raise ProtocolError(f"agent protocol: a window of {window} bytes, {most} at most")
        return open_reader(self._through(bulk), channel, window, stall)

    def _through(self, bulk: bool) -> Mux:
        """The connection that a channel is opened in."""
        if not bulk:
            return self._mux
        if self._bulk is None:
            raise ProtocolError("agent protocol: there is no lane for a channel")
        return self._bulk.mux

    def _tree(self, index: int, channel: int, last: bool, bulk: bool = False) -> dict[str, Any]:
        incoming, mux = self._receiving(), self._through(bulk)
        return {"name": incoming.take_tree(index, mux.open(channel), last)}

    @contextlib.contextmanager
    def _opened(self, channel: int) -> Iterator[int]:
        """A channel's descriptor.  It is closed here if the body fails; otherwise the body
        has passed it on."""
        fd = self._mux.open(channel)
        try:
            yield fd
        except BaseException:
            os.close(fd)
            raise

    def _dump(
        self,
        channel: int,
        *,
        number: int = 0,
        parent: int = 0,
        room: int = 0,
        window: int = wire.WINDOW,
        post_copy: float = 0.0,
        bulk: bool = False,
    ) -> dict[str, Any]:
        incoming = self._receiving()
        self._need_live()
        images = self._images(channel, window, bulk, incoming.stall)
        try:
            incoming.take_dump(images, number, parent, room, post_copy)
        except BaseException:
            images.close()
            raise
        return {}

    def _join(self, name: str, timeout: float) -> dict[str, Any]:
        return {"ended": self._begun().join(name, timeout)}

    def _alive(self) -> None:
        if self._mux.failure is not None:
            raise self._mux.failure

    def _need_live(self) -> None:
        if not self._live:
            raise ProtocolError(
                "agent protocol: memory is received only in a live migration, and this one is not"
            )

    def _restore(self, timeout: float) -> dict[str, Any]:
        self._need_live()
        incoming = self._receiving()
        return {"moments": incoming.restore(self._alive, timeout), "lazy": incoming.lazy()}

    def _start(self, timeout: float, run: bool) -> dict[str, Any]:
        self._receiving().start(self._alive, timeout, run)
        return {}

    def _finish(self) -> dict[str, Any]:
        done = self._begun()
        if not done.committed:
            raise ProtocolError("agent protocol: `finish` must come after the commit")
        self._incoming = None
        failed = done.complete()
        self._close_lanes()
        return {"failed": failed}

    def _undo(self) -> dict[str, Any]:
        done = self._begun()
        if done.committed:
            raise ProtocolError(
                "agent protocol: the migration is committed, so it cannot be undone here"
            )
        self._incoming = None
        # This ends the jobs that still receive, so that they make nothing more.
        self._mux.reset_channels()
        if self._bulk is not None:
            self._bulk.mux.reset_channels()
        self._lanes.end()
        failed = done.undo()
        self._close_lanes()
        return {"failed": failed}

    def _not_ours(self, migration: str) -> str:
        """The checked ID of another migration.  ProtocolError when it is the one that this
        connection still has."""
        if self._incoming is not None and self._incoming.migration == migration:
            raise ProtocolError(
                "agent protocol: this migration is not over: `finish` or `undo` must come first"
            )
        return commit_record.check_id(migration)

    def _settle(self, migration: str) -> dict[str, Any]:
        answer = settle(self._host, self._not_ours(migration))
        locks.remove_dead(Path(self._host.lock_dir))
        return answer

    def _forget(self, migration: str) -> dict[str, Any]:
        """The source has done what follows from the commit record, so the record can go."""
        commit_record.forget(Path(self._host.state_dir), self._not_ours(migration))
        locks.remove_dead(Path(self._host.lock_dir))
        return {}


def vz_code(error: PyploopError) -> int:
    """vzmigrate's exit code for a failure here."""
    if isinstance(error, MigrateError):
        return error.exit_code
    return VzExitCode.LOCKED if isinstance(error, BusyError) else VzExitCode.COPY_FAILED
