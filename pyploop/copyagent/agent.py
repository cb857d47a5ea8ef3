# SPDX-License-Identifier: Apache-2.0
"""`pyploop copy-agent`: the other host's end of a remote copy (docs/internals/remote-copy.md).

It serves one connection on stdin and stdout, request by request.  When the connection ends,
what is frozen is thawed, and an incomplete target is removed.  Data come and go by lanes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from pyploop import __version__
from pyploop.api.copying import Copy, CopyOptions
from pyploop.copyagent.permits import Permits
from pyploop.diskcopy import receiver
from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.target_device import DeviceSink
from pyploop.diskcopy.target_file import Sink
from pyploop.diskcopy.target_registry import open_sink
from pyploop.errors import ExitCode, ProtocolError, PyploopError
from pyploop.freeze.stoppers import Spec
from pyploop.system import cpu
from pyploop.system.jobs import Job
from pyploop.transport import greeting
from pyploop.transport.lane_handover import Awaited, Lane, LaneError
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

    def __init__(self, rfd: int, wfd: int, permits: Permits) -> None:
        self._permits = permits
        self._awaited: list[tuple[Awaited, Job[Lane]]] = []
        """Lanes by their numbers; number 0 is the stream with its answers."""
        self._lanes = Lanes()
        """All but number 0."""
        self._sink: Sink | DeviceSink | None = None
        """The target, until the stream for it begins."""
        self._target: tuple[str, dict[str, Any]] | None = None
        self._ending = False
        self._cancel: Callable[[], None] = lambda: None
        self._job: Job[dict[str, Any]] | None = None
        requests: dict[str, Callable[..., dict[str, Any]]] = {
            "check": self._check,
            "target": self._open_target,
            "lane": self._lane,
            "receive": self._receive,
            "source": self._source,
            "join": self._join,
            "undo": self._undo,
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
        with contextlib.suppress(PyploopError):
            self._undo()
        self._mux.close()

    # ---- requests

    def _check(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "aes": "aes" in cpu.flags(),
            "source_options": sorted(copy_messages.SOURCE_OPTIONS),
            "target_options": sorted(copy_messages.TARGET_OPTIONS),
        }

    def _lane(self, number: int) -> dict[str, Any]:
        if number != len(self._awaited):
            raise ProtocolError(f"agent protocol: lane {number} is not the next one")
        lane = Awaited()
        job = Job(lane.take if number == 0 else lambda: self._further(lane, number))
        self._awaited.append((lane, job))
        job.start()
        return {"token": lane.token}

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
        for awaited, coming in self._awaited[1:]:
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
        path, to_device = os.path.expanduser(path), options.get("to_device", False)
        self._permits.check_target(path, to_device)
        self._sink = open_sink(path, self._report, to_device)
        self._target = (path, options)
        return {}

    def _receive(self) -> dict[str, Any]:
        if self._target is None or self._job is not None:
            raise ProtocolError("agent protocol: `receive` must come once, after `target`")
        lane = self._first_lane()
        path, options = self._target
        sink, self._sink = self._sink, None
        assert sink is not None
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
        return {}

    def _sent(self, path: str, options: CopyOptions, first: Job[Lane]) -> dict[str, Any]:
        with first.join() as lane, contextlib.ExitStack() as further:
            further.callback(self._close_further)
            copying = Copy(
                Here(path), lane.wfd, feedback=lane.rfd, options=options, reporter=self._report
            )
            copying.lanes = self._lanes
            self._begun(copying.cancel)
            with copying:
                copying.run()
            return copying.summary

    def _begun(self, cancel: Callable[[], None]) -> None:
        """In the job: from now on `cancel` ends it."""
        self._cancel = cancel
        if self._ending:
            cancel()

    def _join(self, timeout: float) -> dict[str, Any]:
        if self._job is None:
            raise ProtocolError("agent protocol: `join` must come after `receive` or `source`")
        if not self._job.over.wait(timeout):
            return {"done": False}
        return {"done": True, "result": self._job.join()}

    def _undo(self) -> dict[str, Any]:
        """Cancel the copy; returns when it has undone all of its own."""
        self._ending = True
        for lane, _ in self._awaited:
            lane.close()
        if self._job is None:
            for _, coming in self._awaited:
                if coming.over.wait(UNDONE) and coming.failure is None:
                    coming.join().close()  # it came, and no copy has used it
            self._awaited = []
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
