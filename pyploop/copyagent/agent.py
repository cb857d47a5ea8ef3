# SPDX-License-Identifier: Apache-2.0
"""`pyploop copy-agent`: the other host's end of a remote copy (docs/internals/remote-copy.md).

It serves one connection on stdin and stdout, request by request.  When the connection ends,
what is frozen is thawed, and an incomplete target is removed.  Data come and go by lanes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from pyploop import __version__
from pyploop.api.copying import Copy, CopyOptions, check_update, wanted
from pyploop.copyagent.again import SLACK, Waiting
from pyploop.copyagent.permits import Permits
from pyploop.copyagent.reading import Reading
from pyploop.diskcopy import receiver
from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.sinks import open_sink
from pyploop.diskcopy.target_device import DeviceSink
from pyploop.diskcopy.target_file import Sink
from pyploop.errors import ExitCode, ProtocolError, PyploopError, ReadError
from pyploop.freeze.stoppers import Spec
from pyploop.system import cpu, descriptors
from pyploop.system.jobs import Job
from pyploop.transport import greeting
from pyploop.transport.lane_handover import HANDING_OVER, Awaited, Door, Lane, LaneError
from pyploop.transport.mux import Mux
from pyploop.transport.place import Here
from pyploop.transport.server import Server
from pyploop.wire import copy_messages
from pyploop.wire.messages import clipped

UNASKED = 60.0
"""Seconds without a request, even if pings come.  Then the connection is ended."""
UNDONE = 120.0
"""Seconds for a copy that was cancelled to thaw, and to undo what it stopped."""
HINT = "do not run `pyploop copy-agent` by hand: `pyploop copy` on the other host starts it"


def greet(rfd: int, wfd: int) -> bytes:
    """As greeting.greet.  LaneError: an ssh key has one command for agents and lanes."""

    def other(line: bytes) -> None:
        LaneError.check(line)

    return greeting.greet(rfd, wfd, hint=HINT, peer="the other host", other=other)


class CopyAgent(Server):
    """One connection, for one copy."""

    name, peer = "pyploop copy-agent", "other host"

    def __init__(
        self, rfd: int, wfd: int, permits: Permits, detach: Callable[[], None] = lambda: None
    ) -> None:
        """detach: called when the connection has ended and another one is waited for."""
        self._permits, self._detach = permits, detach
        self._awaited: dict[int, tuple[Awaited, Job[Lane]]] = {}
        """Lanes by their numbers; number 0 is the stream with its answers."""
        self._main = 0
        """The lane that has its part now."""
        self._door: Door | None = None
        """Where another connection comes, when this one has failed."""
        self._come: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        self._connection: Lane | None = None
        """What has come there."""
        self._retry = 0.0
        self._waiting: Waiting | None = None
        self._lanes = Lanes()
        """All but number 0."""
        self._sink: Sink | DeviceSink | None = None
        """The target, until the stream for it begins."""
        self._target: tuple[str, dict[str, Any]] | None = None
        self._reading = Reading()
        self._ending = False
        self._cancel: Callable[[], None] = lambda: None
        self._job: Job[dict[str, Any]] | None = None
        requests: dict[str, Callable[..., dict[str, Any]]] = {
            "check": self._check,
            "target": self._open_target,
            "lane": self._lane,
            "lanes": self._several,
            "receive": self._receive,
            "source": self._source,
            "join": self._join,
            "stay": self._stay,
            "leave": self._leave,
            "broken": self._broken,
            "again": self._again,
            "resume": self._resume,
            "undo": self._undo,
            "look": self._look,
            "digest": self._digest,
            "hashes": self._reading.hashes,
        }
        super().__init__(Mux(rfd, wfd, greet(rfd, wfd)), requests)

    def patience(self) -> float:
        return UNASKED

    def checked(self, op: Any, args: Any) -> dict[str, Any]:
        return copy_messages.request(op, args)

    def failure(self, error: PyploopError) -> dict[str, Any]:
        return {
            "code": error.exit_code,
            "message": clipped(error.with_hint()),
            "peer_failed": error.peer_failed,
        }

    def bad_request(self, text: str) -> dict[str, Any]:
        return {"code": ExitCode.READ, "message": clipped(text)}

    def end(self) -> None:
        if self._door is not None:
            self._door.close()
        with contextlib.suppress(PyploopError):
            self._undo()
            self._reading.close()
        self._mux.close()
        if self._connection is not None:
            self._connection.close()

    # ---- another connection

    def serve(self) -> None:
        """Answer requests until the connection ends, and each one that takes its place."""
        try:
            self.answer_requests()
            while (lane := self._other_connection()) is not None:
                if self._connection is not None:
                    self._connection.close()
                self._connection = lane
                self.connect(Mux(lane.rfd, lane.wfd))
                self.answer_requests()
        finally:
            self.end()

    def _other_connection(self) -> Lane | None:
        """Wait for it as long as the other host tries.  None: it does not come, or is not
        needed."""
        if self._door is None or self._job is None or self._ending:
            return None
        if self._mux.was_left():
            return None  # it was killed, or has given up
        self._mux.close()
        if self._connection is None:
            self._detach()
        with contextlib.suppress(queue.Empty):
            return self._come.get(timeout=self._retry + SLACK)
        return None

    def _stay(self, retry: float) -> dict[str, Any]:
        if self._door is not None or self._job is not None:
            raise ProtocolError("agent protocol: `stay` must come once, before the copy begins")
        self._door, self._retry = Door(), retry
        self._waiting = Waiting(retry, self._close_before)
        threading.Thread(target=self._watch, args=(self._door,), daemon=True).start()
        return {"token": self._door.token}

    def _leave(self) -> dict[str, Any]:
        """The other host knows how the copy has ended, and comes no more."""
        self._ending = True
        return {}

    def _watch(self, door: Door) -> None:
        for lane in door.each():
            before = self._mux
            self._come.put(lane)
            # The other host may have noticed its end first.
            before.end(ReadError("another connection has taken its place"))

    def _close_before(self) -> None:
        """In the copy: it uses none of the lanes before the present main one."""
        for number in [n for n in self._awaited if n < self._main]:
            awaited, coming = self._awaited[number]
            awaited.close()
            if coming.over.is_set() and coming.failure is None:
                coming.join().close()

    def _broken(
        self, timeout: float, number: int, ends: list[dict[str, int]], committed: bool
    ) -> dict[str, Any]:
        if self._job is None or self._waiting is None:
            raise ProtocolError("agent protocol: `broken` must come after `stay` and a copy")
        ready = False
        if not self._job.over.is_set():
            theirs = [(end["lane"], end["received"]) for end in ends]
            if number != self._main:
                theirs = [(0, 0)]  # a lane that is lost already, before it was used there
            ready = self._waiting.broken(timeout, theirs, committed)
        if self._job.over.is_set():
            self._job.join()  # its failure is the answer
            return {"ready": True, "committed": True, "ends": []}
        mine = [{"lane": lane, "received": received} for lane, received in self._waiting.ends]
        return {"ready": ready, "committed": False, "ends": mine if ready else []}

    def _again(self, number: int) -> dict[str, Any]:
        self._check_number(number)
        lane = Awaited()
        job = Job(lane.take)
        self._awaited[number] = (lane, job)
        job.start()
        return {"token": lane.token}

    def _resume(self, number: int) -> dict[str, Any]:
        if self._waiting is None or number not in self._awaited:
            raise ProtocolError("agent protocol: `resume` must come after `again`")
        lane = self._awaited[number][1].join(HANDING_OVER)
        before, self._main = self._main, number
        try:
            self._waiting.resume(lane)
        except PyploopError:
            self._main = before
            raise
        return {}

    def _check_number(self, number: int) -> None:
        if number != 0 if not self._awaited else number <= max(self._awaited):
            raise ProtocolError(f"agent protocol: lane {number} is not the next one")

    # ---- requests

    def _check(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "aes": "aes" in cpu.flags(),
            "source_options": sorted(copy_messages.SOURCE_OPTIONS),
            "target_options": sorted(copy_messages.TARGET_OPTIONS),
        }

    def _lane(self, number: int) -> dict[str, Any]:
        self._check_number(number)
        lane = Awaited()
        job = Job(lane.take if number == 0 else lambda: self._further(lane, number))
        self._awaited[number] = (lane, job)
        job.start()
        return {"token": lane.token}

    def _several(self, number: int, count: int) -> dict[str, Any]:
        """As many lanes, from that number on."""
        if number + count > copy_messages.LANES:
            raise ProtocolError(f"agent protocol: there is no lane {number + count - 1}")
        return {"tokens": [self._lane(n)["token"] for n in range(number, number + count)]}

    def _further(self, coming: Awaited, number: int) -> Lane:
        """A lane beside the first one takes part as soon as it is there."""
        lane = coming.take()
        try:
            if self._target is None:
                os.set_blocking(lane.wfd, False)
                self._lanes.add(lane.wfd, number)
            else:
                self._lanes.add(lane.rfd, number)
        except BaseException:
            lane.close()
            raise
        return lane

    def _close_further(self) -> None:
        """The copy has ended."""
        self._lanes.refuse("the copy has ended")
        for awaited, coming in [self._awaited[n] for n in self._awaited if n]:
            awaited.close()
            if coming.over.wait(UNDONE) and coming.failure is None:
                coming.join().close()

    def _first_lane(self) -> Job[Lane]:
        if not self._awaited:
            raise ProtocolError("agent protocol: `lane` must come first")
        return self._awaited[0][1]

    def _open_target(self, path: str, options: dict[str, Any]) -> dict[str, Any]:
        if self._target is not None or self._job is not None:
            raise ProtocolError("agent protocol: there is one copy in a connection")
        path = os.path.expanduser(path)
        self._permits.check_target(path, options)
        made = CopyOptions(**options)
        check_update(made)
        self._sink = open_sink(path, self._report, wanted(made))
        self._target = (path, options)
        return {}

    def _receive(self) -> dict[str, Any]:
        if self._target is None or self._job is not None:
            raise ProtocolError("agent protocol: `receive` must come once, after `target`")
        lane = self._first_lane()
        path, options = self._target
        sink, self._sink = self._sink, None
        assert sink is not None
        if self._waiting is not None:
            self._waiting.wanted = sink.wanted
        self._job = Job(lambda: self._received(path, options, sink, lane)).start()
        return {}

    def _received(
        self, path: str, options: dict[str, Any], sink: Sink | DeviceSink, first: Job[Lane]
    ) -> dict[str, Any]:
        with contextlib.ExitStack() as unused:
            unused.enter_context(sink)
            lane = first.join()
            unused.pop_all()  # the receiver closes it

        with lane, contextlib.ExitStack() as further:
            further.callback(self._close_further)
            return receiver.receive(
                path,
                lane.rfd,
                lane.wfd,
                self._report,
                options.get("timeout", CopyOptions.timeout),
                sink=sink,
                write=options.get("write", CopyOptions.write),
                opened=self._begun,
                lanes=self._lanes,
                relink=self._waiting,
            ).fields()

    def _source(self, path: str, options: dict[str, Any]) -> dict[str, Any]:
        if self._target is not None or self._job is not None:
            raise ProtocolError("agent protocol: there is one copy in a connection")
        path = os.path.expanduser(path)
        self._permits.check_source(path, options)
        stops = [Spec(**stop) for stop in options.pop("stops", ())]
        lane = self._first_lane()
        made = CopyOptions(stops=stops, **options)
        self._job = Job(lambda: self._sent(path, made, lane)).start()
        return {"size": descriptors.length(path)}

    def _sent(self, path: str, options: CopyOptions, first: Job[Lane]) -> dict[str, Any]:
        with first.join() as lane, contextlib.ExitStack() as further:
            further.callback(self._close_further)
            copying = Copy(
                Here(path), lane.wfd, feedback=lane.rfd, options=options, reporter=self._report
            )
            copying.lanes = self._lanes
            copying.relink = self._waiting
            self._begun(copying.cancel)
            with copying:
                copying.run()
            return copying.summary

    def _look(self, path: str) -> dict[str, Any]:
        if self._target is not None or self._job is not None:
            raise ProtocolError("agent protocol: a connection is for a copy or for a comparison")
        path = os.path.expanduser(path)
        self._permits.check_source(path, {})
        return self._reading.look(path)

    def _digest(self, size: int) -> dict[str, Any]:
        if self._job is not None:
            raise ProtocolError("agent protocol: `digest` must come once")
        self._job = Job(self._reading.digest(size, self._begun)).start()
        return {}

    def _begun(self, cancel: Callable[[], None]) -> None:
        """In the job: from now on `cancel` ends it."""
        self._cancel = cancel
        if self._ending:
            cancel()

    def _join(self, timeout: float) -> dict[str, Any]:
        if self._job is None:
            raise ProtocolError("agent protocol: `join` must come after what it waits for")
        if not self._job.over.wait(timeout):
            waits = self._waiting is not None and self._waiting.waits
            return {"done": False, "waits": True} if waits else {"done": False}
        return {"done": True, "result": self._job.join()}

    def _undo(self) -> dict[str, Any]:
        """Cancel the copy; returns when it has undone all of its own."""
        self._ending = True
        for lane, _ in self._awaited.values():
            lane.close()
        if self._job is None:
            for _, coming in self._awaited.values():
                if coming.over.wait(UNDONE) and coming.failure is None:
                    coming.join().close()  # it came, and no copy has used it
            self._awaited = {}
            sink, self._sink = self._sink, None
            if sink is not None:
                sink.__exit__(None, None, None)
            return {}
        self._cancel()
        if not self._job.over.wait(UNDONE):
            raise ProtocolError(
                f"the copy has not ended within {UNDONE:g} s after it was cancelled; its watchdog "
                "thaws what is frozen"
            )
        return {}
