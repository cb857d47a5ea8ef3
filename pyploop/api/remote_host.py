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

from pyploop import __version__, errors
from pyploop.api.copying import CopyOptions
from pyploop.errors import (
    CancelledError,
    ConnectError,
    ParameterError,
    ProtocolError,
    PyploopError,
)
from pyploop.freeze.stoppers import Spec, parse_spec
from pyploop.report import checked, event_types
from pyploop.report.events import ERROR, NOTE, Reporter
from pyploop.system import cpu
from pyploop.system.jobs import TICK, Job
from pyploop.transport import hints, ssh_cipher
from pyploop.transport.client import Client
from pyploop.transport.lane import Lane, NobodyWaitsError
from pyploop.wire import copy_messages
from pyploop.wire import mux as wire
from pyploop.wire.messages import Check, clipped

SSH = ("ssh",)
ASKING = 330.0
"""Seconds for a request to be answered: a source may lie in an image that is mounted first."""
UNDOING = 130.0
"""Seconds for the other host to undo its part."""
JOINING = 1.0
"""Seconds that one request to wait for the copy's end takes at most: between two of them the
other host may be asked something else, and its events count anew."""
SOONER = 0.2
"""Part of the time since the copy began that it takes at most: at first lanes are opened."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
"""Seconds between two attempts to connect again: each pause is twice the one before."""
LAST = 10.0
"""Seconds for a connection that has no more to do to end."""
_FAILURES = {
    int(kind.exit_code): kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, PyploopError)
    and kind not in (PyploopError, errors.MigrateError, errors.NotSupportedError)
}


class LostThereError(ConnectError):
    """The copy there has failed, since it had no connection for too long; or its pyploop has
    ended."""


_FAILURES[int(ConnectError.exit_code)] = LostThereError


class CopyClient(Client):
    """The connection to the agent.  ConnectError (69): there is none, or it was lost."""

    what = "the copy"
    nothing = "nothing was copied"
    """What state things are in, after a failure before the first byte."""
    not_in_log = ("progress",)
    install_ssh = "install it (the Debian package openssh-client)"

    def not_a_host(self, text: str) -> ParameterError:
        return ParameterError(text)

    def unreachable(self, text: str, hint: str | None = None) -> ConnectError:
        return ConnectError(f"{text}; {self.nothing}", hint=hint)

    def no_agent(self, why: str, printed: str, status: int | None) -> ConnectError:
        host, shown = self.host, f" ({printed})" if printed else ""
        install = (
            f"install pyploop {__version__} on {host}, so that `ssh {host} pyploop --version` "
            "prints it, or name the program there (--remote-pyploop)"
        )
        if status == 127:
            return self.unreachable(f"there is no pyploop on {host}{shown}", install)
        if "unknown command" in printed:
            return self.unreachable(
                f"the pyploop on {host} is too old for remote copies: it has no copy-agent", install
            )
        if status == 255:  # ssh's own
            return self.unreachable(
                f"cannot connect to {host}: {printed or why}",
                f"`ssh -o BatchMode=yes {host} true` must work: pyploop lets ssh ask nothing",
            )
        return self.unreachable(f"no pyploop copy-agent on {host}: {why}{shown}", install)

    def lost(self, error: PyploopError, op: str, why: str) -> PyploopError:
        if isinstance(error, CancelledError):
            return error
        return ConnectError(f"the connection to {self.host} was lost: {why}")

    def failed_there(self, error: Any) -> PyploopError:
        code, text, peer_failed = copy_messages.failure(error)
        text, hint = hints.parted(text)
        kind = _FAILURES.get(code, errors.ProtocolError)
        # Marked as the other host's words, both of them.
        failure = kind(f"{self.host}: {text}", hint=hint and f"{self.host}: {hint}")
        failure.peer_failed = peer_failed
        return failure

    def checked(self, op: str, value: Any) -> dict[str, Any]:
        return copy_messages.answer(op, value)


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
                return f"so was everything on {self.host}"
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


class FarEnd:
    """How the copy goes at the other host.  `job` asks it, in a thread."""

    def __init__(
        self, there: RemoteHost, lane: Lane, cancel: Callable[[], None], retry: float
    ) -> None:
        self._there, self._client = there, there.client
        self._lane, self._cancel, self._retry = lane, cancel, retry
        self._stopped = False
        self.committed = False
        """A receiver here has completed its target."""
        self._cancelled = False
        self._begin = time.monotonic()
        self.job: Job[dict[str, Any]] = Job(self._wait)

    def _wait(self) -> dict[str, Any]:
        try:
            while True:
                answer = self._joined()
                if answer["done"]:
                    return dict(answer.get("result", {}))
                if answer.get("waits") and self.committed:
                    # Only the answer to END was lost.
                    self._there.ask("broken", timeout=JOINING, ends=[], committed=True)
        except PyploopError as e:
            if not e.peer_failed and not self._stopped:
                self._cancelled = True
                self._cancel()
            raise

    def _joined(self) -> dict[str, Any]:
        """Wait for a while.  When the connection is lost, for another one, too."""
        timeout = min(JOINING, SOONER * (time.monotonic() - self._begin))
        try:
            return self._client.call("join", math.inf, lambda: self._stopped, timeout=timeout)
        except PyploopError:
            if not self._retry or self._stopped or self._client.alive():
                raise
            if not revived(self._there, self._retry, lambda: self._stopped):
                raise
            return {"done": False}

    @property
    def is_done(self) -> bool:
        """It has ended well there."""
        return self.job.over.is_set() and self.job.failure is None

    def result(self) -> dict[str, Any]:
        """After the end here: what the other host has to say.  It may still run a command of
        the user's.  (When it is dead, the connection ends.)"""
        return self.job.join()

    def cause_of(self, error: PyploopError) -> PyploopError | None:
        """The failure there that `error` follows from; None: it does not."""
        follows = error.peer_failed or self._cancelled
        if not follows:
            return None
        if not self.job.over.wait(LAST):
            self._lane.cut()  # it may wait for a half of the lane that nobody serves any more
        self.job.over.wait(UNDOING)
        failure = self.job.failure
        if not isinstance(failure, PyploopError):
            return None
        if not failure.peer_failed:
            return failure
        # Both ends say that the other one has gone: it was what is between them.
        printed = self._lane.printed()
        return ConnectError(
            f"the connection to {self._client.host} for the data was lost"
            + (f" ({printed})" if printed else "")
        )

    def stop(self) -> None:
        """Ask no more."""
        self._stopped = True
        self.job.end(LAST)


def revived(there: RemoteHost, retry: float, gone: Callable[[], bool]) -> bool:
    """Try so many seconds to have a connection to the agent.  False: `gone` says that it is not
    needed any more.  ConnectError: there is none; LostThereError: the agent has ended."""
    until, pause = time.monotonic() + retry, FIRST_PAUSE
    while not gone():
        try:
            there.revive()
            return True
        except LostThereError:
            raise
        except ConnectError as e:
            if time.monotonic() >= until:
                raise none_within(there.host, retry, e) from e
        rest(min(pause, until - time.monotonic()), gone)
        pause = min(2 * pause, LONGEST_PAUSE)
    return False


def none_within(host: str, retry: float, last: PyploopError) -> ConnectError:
    return ConnectError(
        f"the connection to {host} was lost, and no other one came about within {retry:g} s "
        f"(--retry): {last}"
    )


def rest(seconds: float, gone: Callable[[], bool]) -> None:
    """Sleep, at most until `gone` is true."""
    until = time.monotonic() + seconds
    while not gone() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, TICK))


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
