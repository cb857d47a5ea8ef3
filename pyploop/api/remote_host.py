# SPDX-License-Identifier: Apache-2.0
"""The other host of a remote copy, as the end that asks sees it: its agent, its lanes, what
it reports, and how it fails."""

from __future__ import annotations

import contextlib
import math
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pyploop import __version__
from pyploop.api.copy_client import CopyClient, LostThereError
from pyploop.api.copying import CopyOptions
from pyploop.api.far_end import UNDOING, FarEnd
from pyploop.errors import (
    ConnectError,
    ParameterError,
    ProtocolError,
    PyploopError,
)
from pyploop.freeze.stoppers import Spec, parse_spec
from pyploop.report import checked, event_types
from pyploop.report.events import ERROR, NOTE, Reporter
from pyploop.system import cpu
from pyploop.transport import ssh_cipher
from pyploop.transport.lane import Lane, NobodyWaitsError
from pyploop.wire import copy_messages
from pyploop.wire import mux as wire
from pyploop.wire.messages import Check, clipped

SSH = ("ssh",)
ASKING = 330.0
"""Seconds for a request to be answered: a source may lie in an image that is mounted first."""


@dataclass(frozen=True)
class Peer:
    """What the other host has said about itself."""

    version: str
    aes: bool
    options: dict[str, Sequence[str]]
    """`source` and `target` -> the options that it knows."""


class RemoteHost:
    """The other host; a context manager that connects to it, and ends the connection."""

    client_kind = CopyClient
    has_lanes = True
    """Data go over connections of their own."""

    def __init__(self, host: str, options: CopyOptions, report: Reporter) -> None:
        self.host, self._options, self._report = host, options, report
        self.lanes = 0
        """Lanes that were asked for; the number of the next one."""
        self._choice: ssh_cipher.Choice | None = None
        self._early: Lane | None = None
        """Of number 0: it connects already, and waits for its token."""
        self._round_trip = math.inf
        self._token = ""
        """With it the agent takes another connection, when this one has failed."""
        self._reviving = threading.Lock()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> RemoteHost:
        o = self._options
        try:
            self._program = program = shlex.split(o.remote_pyploop)
        except ValueError as e:
            raise ParameterError(f"{o.remote_pyploop!r} is not a command: {e}") from e
        with contextlib.ExitStack() as undo:
            undo.callback(self._close_early)
            if self.has_lanes:
                self._connect_early()
            self.client = self.client_kind(
                self.host, SSH, o.ssh_options, [*program, "copy-agent"], self._on_event
            )
            undo.callback(self.client.close)
            try:
                answer = self._quick("check")
            except ConnectError:
                raise
            except PyploopError as e:
                raise ConnectError(
                    f"what answers on {self.host} is no pyploop copy-agent: {e}; "
                    f"{self.client.nothing}",
                    hint="the command of this ssh key there must be `pyploop copy-agent`",
                ) from e
            self.peer = Peer(
                answer["version"],
                answer["aes"],
                {"source": answer["source_options"], "target": answer["target_options"]},
            )
            self._report.info(f"{self.host} has pyploop {self.peer.version}")
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(PyploopError):
            if self._token and self.client.alive():
                self.ask("leave")  # else the agent would wait for us
        self._undo.close()

    def ask(self, op: str, **args: Any) -> dict[str, Any]:
        """As Client.call.  ParameterError: a path or a command that cannot go over."""
        try:
            wire.check_values(args)
        except ValueError as e:
            raise ParameterError(
                f"{self.host} can only be sent texts in UTF-8, and a path or command of this copy "
                f"is not ({e}); {self.client.nothing}"
            ) from e
        return self.client.call(op, ASKING, **args)

    def keeping_partial(self, side: str) -> CopyOptions:
        """The options, in which a failed copy leaves a partial file, unless the user has
        decided, or the other host does not know that as this side."""
        if self._options.keep_partial is None and "keep_partial" in self.peer.options[side]:
            self._options = replace(self._options, keep_partial=True)
        return self._options

    def options_for(self, side: str) -> dict[str, Any]:
        """Those options of the copy that the other host needs as its `side` (source or
        target), as a request has them.  What is at its default is left out, so that an older
        host need not know it.  ConnectError: it does not know one."""
        tables: dict[str, dict[str, Check]] = {
            "source": copy_messages.SOURCE_OPTIONS,
            "target": copy_messages.TARGET_OPTIONS,
        }
        found = {}
        for name in tables[side]:
            value = _plain(getattr(self._options, name))
            if value == _plain(getattr(CopyOptions, name)):
                continue
            if name not in self.peer.options[side]:
                raise ConnectError(
                    f"pyploop {self.peer.version} on {self.host} does not know the option "
                    f"{name!r} of this copy; nothing was copied",
                    hint=f"install pyploop {__version__} there, or copy without it",
                )
            found[name] = value
        return found

    def _quick(self, op: str, gone: Callable[[], bool] = bool, **args: Any) -> dict[str, Any]:
        """A request that is answered at once."""
        begin = time.monotonic()
        answer = self.client.call(op, ASKING, gone, **args)
        self._round_trip = min(self._round_trip, time.monotonic() - begin)
        return answer

    def round_trip(self) -> float:
        """Seconds that a short request takes, at least."""
        return self._round_trip

    def stay(self, retry: float) -> bool:
        """Before the copy: let the agent outlive its connection.  retry: seconds for which
        `revive` is tried.  False: it is too old for that."""
        try:
            self._token = self._quick("stay", retry=retry)["token"]
        except ProtocolError:
            self._report.info(
                f"pyploop {self.peer.version} on {self.host} cannot go on after a lost connection"
            )
        return bool(self._token)

    def revive(self) -> None:
        """From any thread: if the connection to the agent has failed, try once to make another
        one.  ConnectError; LostThereError: the agent has ended."""
        with self._reviving:
            if self.client.alive():
                return
            try:
                lane = self._open_lane(self._token)
            except NobodyWaitsError as e:
                raise LostThereError(
                    f"the connection to {self.host} was lost, and its pyploop has ended: {e}"
                ) from e
            self.client.reconnect(lane.detach())

    def _connect_early(self) -> None:
        """The connection for the data comes about beside the one to the agent.  Which cipher
        it is asked for supposes that the other CPU has AES, as nearly all have."""
        self._choice = self._cipher(_has_aes())
        with contextlib.suppress(ConnectError):  # the agent's connection says it
            self._early = self._new_lane()

    def _close_early(self) -> None:
        early, self._early = self._early, None
        if early is not None:
            early.cut()
            early.close()

    def _new_lane(self) -> Lane:
        options = (*self._options.ssh_options, *self._chosen().options)
        return Lane(self.host, SSH, options, [*self._program, "copy-lane"])

    def _open_lane(self, token: str, gone: Callable[[], bool] = bool) -> Lane:
        return self._new_lane().join(token, gone)

    def _first_lane(self, token: str) -> Lane:
        early = self._early
        if early is not None and self.peer.aes >= _has_aes():
            self._early = None  # it closes itself
            with contextlib.suppress(ConnectError):  # the agent was asked for long
                return early.join(token)
        self._close_early()
        self._choice = self._cipher(self.peer.aes and _has_aes())
        return self._open_lane(token)

    def _cipher(self, aes: bool) -> ssh_cipher.Choice:
        return ssh_cipher.choose(SSH, self._options.ssh_options, self.host, aes)

    def _chosen(self) -> ssh_cipher.Choice:
        assert self._choice is not None, "nothing is opened before the connection to the agent"
        return self._choice

    def next_lane(self, request: str, gone: Callable[[], bool] = bool) -> tuple[int, Lane]:
        """Open the lane that this request asks for.  Returns its number, too."""
        number, self.lanes = self.lanes, self.lanes + 1
        token = self.client.call(request, ASKING, gone, number=number)["token"]
        return number, self._open_lane(token)

    def tokens(self, count: int, gone: Callable[[], bool] = bool) -> list[tuple[int, str]]:
        """Numbers and tokens of so many lanes more, or of as many as there may be.
        CancelledError: `gone` says that they are not needed any more."""
        first = self.lanes
        count = min(count, copy_messages.LANES - first)
        if count <= 0:
            return []
        self.lanes += count
        tokens = self._quick("lanes", gone, number=first, count=count)["tokens"]
        return list(zip(range(first, first + count), tokens, strict=False))

    def further_lane(self, token: str, gone: Callable[[], bool]) -> Lane:
        """Open one of them.  ConnectError; also if `gone` says that it is not needed any
        more."""
        return self._open_lane(token, gone)

    def lane(self) -> Lane:
        """Open the first lane."""
        self.lanes = 1
        lane = self._first_lane(self._quick("lane", number=0)["token"])
        choice = self._chosen()
        asked = ssh_cipher.PREFERRED if choice.preferred else ""
        self._report.event("connection", cipher=lane.cipher, asked=asked, why=choice.why)
        self._report.info(
            f"ssh encrypts the data with {lane.cipher or 'a cipher that it does not name'}; it was "
            f"{f'asked for {asked} first' if asked else 'not asked for another one'} "
            f"({choice.why})"
        )
        return lane

    def undo(self) -> str:
        """Have the other host undo its part, and wait for that.  Returns what is known of it,
        in words."""
        try:
            if self.client.alive():
                self._report.detail(f"Waiting for {self.host} to undo its part")
                self.client.call("undo", UNDOING)
                return f"everything was undone on {self.host}, too"
        except PyploopError as e:
            return f"{self.host} was asked to undo its part, but: {e}"
        return f"the connection to {self.host} was lost, so it undoes its part by itself"

    def _on_event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        if name == "line":
            level = fields.get("level")
            if type(level) is int:
                level = NOTE if level == ERROR else level  # errors are in answers
                self._report.line(level, f"{self.host}: {clipped(fields.get('text'))}")
            return
        kind = event_types.OF_A_COPY.get(name)
        if kind is None:
            return
        try:
            fields = checked.checked(kind, {**fields, "time": 0.0, "host": self.host})
        except ValueError as e:
            self._report.detail(f"{self.host}: an event that is not shown: {clipped(e, 200)}")
            return
        del fields["time"]
        if name == "sending":
            fields["clock"] = self._report.start
        elif name == "summary":
            fields["source_host"] = self.host
        self._report.event(name, **fields)

    @contextlib.contextmanager
    def watched(
        self, lane: Lane, cancel: Callable[[], None], retry: float = 0.0
    ) -> Iterator[FarEnd]:
        """The copy runs there, and here in the body.  cancel: ends it here, when it has
        failed there; called from another thread.  retry: see `stay`.  What the body raises
        is replaced by the failure there, or of the lane, when it only follows from that."""
        far = FarEnd(self, lane, cancel, retry)
        far.job.start()
        try:
            yield far
        except PyploopError as e:
            if (cause := far.cause_of(e)) is not None:
                raise cause from e
            raise
        finally:
            far.stop()


def _has_aes() -> bool:
    return "aes" in cpu.flags()


def _plain(value: Any) -> Any:
    """A value of an option, as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return asdict(value) if isinstance(value, Spec) else value


def with_specs(options: CopyOptions) -> list[Spec]:
    """The stops, parsed.  ParameterError."""
    try:
        return [parse_spec(s) if isinstance(s, str) else s for s in options.stops]
    except ValueError as e:
        raise ParameterError(str(e)) from e
