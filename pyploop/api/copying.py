# SPDX-License-Identifier: Apache-2.0
"""Copying one disk that is in use, with its steps: `Copy`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pyploop.api.reporting import make_reporter
from pyploop.diskcopy import separate_target
from pyploop.diskcopy.compression import Compression, parse_compression
from pyploop.diskcopy.framing import COMPATS, Compat
from pyploop.diskcopy.freeze_policy import Policy, Round
from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.options import Options
from pyploop.diskcopy.relink import Relink
from pyploop.diskcopy.sender import Sender
from pyploop.diskcopy.sinks import Wanted
from pyploop.diskcopy.target import Output
from pyploop.diskcopy.target_registry import open_output
from pyploop.diskcopy.write_mode import WRITES, Write
from pyploop.disks import opening
from pyploop.errors import CancelledError, ParameterError
from pyploop.freeze.stoppers import Spec, parse_spec
from pyploop.report.events import Reporter
from pyploop.report.timeline import Recorder
from pyploop.system import descriptors
from pyploop.trackers.registry import choose
from pyploop.wire.d1 import NO_FEATURES, Feature

if TYPE_CHECKING:
    from pyploop.report.event_types import Event
    from pyploop.report.results import CopyResult

FREEZE_LIMIT = 60.0
"""Seconds, when nothing else is asked for."""
ANSWER_TIMEOUT = 600.0
"""Seconds for a peer to answer one SYNC, when there is no other timeout: a slow disk's
flush, and not for ever."""
_FRAMINGS: dict[str, Compat] = {name: name for name in COMPATS}
"""Of a pipe, or a socket that is not answered by packets."""


class HasFileno(Protocol):
    """A socket, a pipe or a file that is open."""

    def fileno(self) -> int: ...


Target = str | os.PathLike[str] | int | HasFileno
"""The path of a new file, or of a device (`to_device`); or a descriptor: a pipe or a socket
to a receiver, or a file that is written in place.  Descriptors stay the caller's, and are not
closed."""


@dataclass(frozen=True, kw_only=True)
class CopyOptions:
    """How a disk is copied.  Times are seconds, sizes are bytes."""

    tracker: Literal["auto", "bpf", "ploop", "dm", "scan"] = "auto"
    """How to learn what was written."""
    read: Literal["auto", "device", "backing"] = "auto"
    """How a loop device is read: from the device, or from its backing file."""
    mounts: Sequence[str] = ()
    """Mount points to freeze, instead of those found."""
    unsafe_in_use: bool = False
    """Copy although something uses the source that the copy cannot take into account.  The
    copy may be stale; `CopyResult.unsafe` names what it was."""
    stops: Sequence[str | Spec] = ()
    """What to stop before the file systems are frozen, in order: `vzctl:CTID`,
    `cgroup:PATH`, `fs`, `fs:MOUNT`, or `cmd:COMMAND`.  A Stop has a command that undoes
    its command."""
    resume: bool = False
    """Resume what was stopped also after success.  After a failure it always is."""
    before_thaw: str | None = None
    """Shell command to run when the target is durable and the source still frozen."""
    max_freeze: float | None = None
    """Freeze only when it is expected to last this long at most."""
    deadline: float = Policy.deadline
    """With `max_freeze`: go on with rounds so long at most after the first pass."""
    on_deadline: Literal["freeze", "abort"] = Policy.on_deadline
    """What to do then."""
    freeze_limit: float | None = None
    """Fail, thaw, and resume what was stopped, when the freeze lasts longer.  None: 60,
    with `max_freeze` twice that and a second.  0: never."""
    throttle_rate: int | None = None
    """With `max_freeze`: slow the writer down to so many bytes per second by its cgroup
    when nothing else makes the freeze fit."""
    throttle_cgroup: str | None = None
    """That cgroup; None: the one of `stops`."""
    bandwidth: int = 0
    """Bytes per second to the target at most while the source runs, counted as they are
    sent, so after they were compressed; 0: no limit."""
    compress: str | None = None
    """When blocks are compressed on the way to a pyploop receiver that answers.  `auto`:
    while more data get through that way than without; `zstd` or `zstd:LEVEL` (1 to 19;
    3): always, but in the freeze only while the stream is the bottleneck; `never`.  None:
    `auto` from or to another host, else `never`."""
    reserve: int | None = None
    """Stop when only so many bytes are left free where the source and the target both
    grow.  None: the larger of 5% and 1 GiB of what is free at the start, but half of that
    at most.  0: neither compare nor watch the room."""
    cluster: int | None = None
    """Bytes of a cluster of a device-mapper target, for the tracker `dm`."""
    readers: int | None = None
    """Reading threads beside the sending one, 0 to 64; None: as many as help."""
    to_device: bool = False
    """The target path is a block device, which is overwritten."""
    update: bool = False
    """The target is an older copy of the source, and only what differs from it is sent.  It
    stays as it is until the new one is complete.  If there is none, it is a new file."""
    inplace: bool = False
    """With `update`: write into the older copy itself, which needs no room for a second one.
    After a failure it is neither the older nor the newer state.  A device needs this."""
    keep_partial: bool | None = None
    """What a copy that failed has brought stays as TARGET.pyploop-partial, and the next copy
    to that target goes on from it.  None: from or to another host it does."""
    write: Write = "auto"
    """How the target is written here: past the page cache (direct), through it (buffered), or
    the first where that pays (auto).  A receiver has an option of its own."""
    timeout: float = 600.0
    """Fail when the peer neither takes nor sends a byte for so long; 0: never."""
    retry: float = 120.0
    """From or to another host: when the connection is lost, try so long to get another one,
    and go on with what has not arrived; 0: fail.  Nothing is frozen meanwhile."""
    sync_wait: float = 5.0
    """Wait so long for a peer that cannot answer."""
    protocol: Literal["auto", "ploop", "native", "packets", "packets-async"] = "auto"
    """What to speak into a pipe or socket: the C tool's stream (ploop), ours (native), or
    what the peer turns out to be (auto); or libploop's packets, which are answered on the
    same socket.  `packets-async`: the peer takes several without an answer."""
    ssh_options: Sequence[str] = ()
    """Options for ssh, which a copy from or to another host uses."""
    remote_pyploop: str = "pyploop"
    """The command that is pyploop on that host."""
    proof: Literal["auto", "always", "never"] | None = None
    """Keep hashes of what was sent, and have the receiver compare them with those of what it
    wrote.  `auto`: if the receiver can; `always`: ParameterError if it cannot; `never`.
    None: `auto` from or to another host and for a receipt, else `never`."""
    receipt: str | os.PathLike[str] | None = None
    """A file that is written when the target is durable: what it must hold, for `verify`."""


class Copy:
    """One copy, as a context manager: `run`, or its steps one by one.

        with Copy(a, to_a) as one, Copy(b, to_b) as other:
            for disk in one, other:
                disk.first_pass()
                disk.converge()
            for disk in one, other:
                disk.freeze_and_finish()

    Entering it opens the source and the target.  Tracking begins with the first pass.
    After it, nothing is frozen or tracked, and an incomplete target is gone.  Any thread
    may call, one at a time; `cancel` may be called by any thread at any time.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        target: Target,
        *,
        options: CopyOptions | None = None,
        feedback: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        """As `copy`, but source and target are on this host (ParameterError).  reporter: for
        programs that render as our command line does; instead of `on_event` and the logger."""
        for one in (source, target):
            if isinstance(one, str) and ":" in one:
                _check_here(one)
        self._source, self._target = os.fspath(source), target
        self._options = options or CopyOptions()
        self._compression = _compression(self._options)
        self._feedback = feedback
        self._report = reporter or make_reporter(on_event)
        self._undo = contextlib.ExitStack()
        self._sender: Sender | None = None
        self._begun = self._cancelled = False
        self.target_host = ""
        """Where a descriptor leads, for the result; empty: to this host, or not known."""
        self.target_path: str | None = None
        """The same for the receipt; None: not known."""
        self.lanes: Lanes | None = None
        """Further streams for the data."""
        self.relink: Relink | None = None
        """Gives another connection when this one fails."""

    def __enter__(self) -> Copy:
        o = self._options
        options = _internal(o, self._target, self._report)
        if isinstance(self._target, (str, os.PathLike)):
            options.target = os.path.abspath(self._target)
            options.target_host = os.uname().nodename
        elif self.target_host:
            options.target, options.target_host = self.target_path, self.target_host
        with contextlib.ExitStack() as undo:
            out = undo.enter_context(self._open_target())
            source = opening.open_source(
                self._source,
                o.read,
                o.mounts,
                unsafe=o.unsafe_in_use,
                # Who gave us that output has it open, too: say what is wrong, not who.
                check=lambda source: separate_target.check_output(source, out.fd),
            )
            undo.callback(source.close)
            tracker = choose(o.tracker, source, o.cluster)
            undo.callback(tracker.stop, False)  # it may have been tried out, and not started
            if o.protocol == "ploop" and tracker.drains_like_ploop:
                # The C tool reads the driver's marks until there are none, once.
                options.policy = replace(options.policy, max_rounds=1, patience=0)
            self._sender = Sender(source, tracker, out, options, self._report)
            self._sender.summary.target_host = self.target_host
            self._undo = undo.pop_all()
        return self

    @contextlib.contextmanager
    def _open_target(self) -> Iterator[Output]:
        o, target = self._options, self._target
        timeout = o.timeout or ANSWER_TIMEOUT
        path = fd = None
        if isinstance(target, (str, os.PathLike)):
            path = os.fspath(target)
        else:
            fd = target if isinstance(target, int) else target.fileno()
        if o.write not in WRITES:
            raise ParameterError(f"write={o.write!r}: it must be one of {', '.join(WRITES)}")
        if fd is not None and o.to_device:
            raise ParameterError("to_device is for a target that is given by its path")
        check_update(o)
        if fd is not None and self._feedback is not None:
            descriptors.check_stream(self._feedback, "feedback descriptor")
        compat = _FRAMINGS.get(o.protocol)
        if compat is None:
            if fd is None:
                raise ParameterError(
                    f"protocol {o.protocol!r} needs a socket, and the target is a file"
                )
            from pyploop.diskcopy.d2_target import PacketOutput

            descriptors.check_open(fd, "descriptor")
            if not descriptors.is_socket(fd):
                raise ParameterError(
                    f"protocol {o.protocol!r} needs a socket, and descriptor {fd} is not one"
                )
            yield PacketOutput(
                fd,
                self._report,
                answer_timeout=timeout,
                knows_async=o.protocol == "packets-async",
            )
            return
        with open_output(
            target=path,
            out_fd=-1 if fd is None else fd,
            feedback=None if fd is None else self._feedback,
            report=self._report,
            sync_wait=o.sync_wait,
            answer_timeout=timeout,
            compat=compat,
            offered=self._offered(),
            wanted=wanted(o),
            write=o.write,
            lanes=self.lanes,
            relink=self.relink,
        ) as out:
            yield out

    def _offered(self) -> Feature:
        """What a pyploop peer is asked for."""
        o = self._options
        offered = Feature.COMPRESSED if self._compression else NO_FEATURES
        if o.proof in ("auto", "always") or (o.proof is None and o.receipt is not None):
            offered |= Feature.PROOF
        if o.update or o.keep_partial:
            offered |= Feature.DIGESTS
        return offered

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.__exit__(kind, error, traceback)  # the target may say what it holds

    def close(self) -> None:
        """As the end of `with`: tracking ends, what is frozen is thawed, and an incomplete
        target is removed.  May be called again."""
        self._undo.close()

    def cancel(self) -> None:
        """From any thread: the step that runs, and each one after it, fails with
        CancelledError, or with what it was waiting for."""
        self._cancelled = True
        if self._sender is not None:
            self._sender.cancel()

    def run(self) -> None:
        """The whole copy: `first_pass`, `converge`, `freeze_and_finish`."""
        self.first_pass()
        self.converge()
        self.freeze_and_finish()

    # ---- while the source runs

    def begin(self) -> None:
        """Begin to track, and learn what the peer can; `first_pass` does it, too."""
        if self._cancelled:
            raise CancelledError(f"the copy of {self._source} was cancelled; no target was made")
        if not self._begun:
            self._begun = True
            self._undo.enter_context(self._opened)

    def first_pass(self) -> None:
        """Send all data of the source."""
        self.begin()
        self._opened.first_pass()

    def round(self) -> Round:
        """Send what was written until now.  Bytes and seconds are in the result."""
        return self._opened.round()

    def converge(self) -> None:
        """Rounds until the rest is for the freeze.  LoopError: it does not get small
        enough before the deadline.  Called again, it makes one round at least."""
        self._opened.converge()

    def sync_target(self) -> str:
        """Have the target make durable what it has.  Returns how far that is known
        (`CopyResult.acknowledged`)."""
        return self._opened.sync_target()

    def prepare_freeze(self) -> None:
        """What the freeze need not wait for, and one more round."""
        self._opened.prepare_freeze()

    # ---- the freeze

    def freeze_and_finish(self) -> None:
        """`prepare_freeze`, the freeze with the last blocks, the end, and the thaw."""
        self._opened.freeze_and_finish()

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Stopped and frozen in the body, which runs `last_blocks` and `finish`: for
        several disks that are to have one moment in common."""
        return self._opened.frozen()

    def last_blocks(self) -> None:
        """Frozen: send what is dirty, and prove that nothing is missing."""
        self._opened.last_blocks()

    def finish(self) -> None:
        """Frozen: end the image, and wait until the target is durable."""
        self._opened.finish()

    # ---- what it was

    @property
    def sent(self) -> int:
        """Bytes of data so far."""
        return self._opened.sent

    @property
    def recorder(self) -> Recorder | None:
        """What happened when, at both ends; None: the copy was never entered."""
        return None if self._sender is None else self._sender.recorder

    @property
    def predicted(self) -> float | None:
        """Seconds of the freeze until the target is durable, as forecast just before it;
        None: nothing was to be frozen, or it has not come to that."""
        return self._opened.summary.predicted

    @property
    def result(self) -> CopyResult:
        """After `freeze_and_finish`."""
        from pyploop.report.results import copy_result

        return copy_result(self.summary)

    @property
    def summary(self) -> dict[str, Any]:
        """The same as the fields of the event `summary`."""
        return vars(self._opened.summary)

    @property
    def _opened(self) -> Sender:
        if self._sender is None:
            raise ParameterError("this copy is not open: use it inside `with Copy(…) as copying:`")
        return self._sender


def _compression(o: CopyOptions) -> Compression:
    try:
        return parse_compression("never" if o.compress is None else o.compress)
    except ValueError as e:
        raise ParameterError(f"compress: {e}") from e


@dataclass
class Done:
    """What a copy has come to, also after a failure."""

    summary: dict[str, Any] = field(default_factory=dict)
    """The fields of CopyResult; empty after a failure."""
    recorder: Recorder | None = None
    """What happened when, at both ends; None: the sender runs on the other host, or it has
    not come to that."""


def _check_here(path: str) -> None:
    from pyploop.transport.place import host_of  # few names have a colon

    if host := host_of(path):
        raise ParameterError(
            f"{path} is on another host ({host}), and the steps of a copy are for this one; "
            "nothing was copied",
            hint=f"use pyploop.copy(), or for a file here ./{path} or a PathLike",
        )


def run_here(copying: Copy, done: Done) -> None:
    """Run it.  done: is filled, also on a failure."""
    try:
        with copying:
            copying.run()
        done.summary = copying.summary
    finally:
        done.recorder = copying.recorder


def check_proof(o: CopyOptions, target: Target) -> None:
    """ParameterError for a proof and a receipt that contradict each other, or the protocol.
    ParameterError, WriteError for a receipt that cannot be written where it should be."""
    if o.receipt is not None and o.proof == "never":
        raise ParameterError("a receipt (--receipt) needs the proof that --proof never leaves out")
    if o.protocol == "ploop" and (o.receipt is not None or o.proof == "always"):
        raise ParameterError(
            "no proof can be kept of what --compat ploop sends, since it may be parts of blocks "
            "(--proof, --receipt)"
        )
    if o.receipt is not None:
        from pyploop.diskcopy import receipt  # few ask for one

        path = os.fspath(target) if isinstance(target, (str, os.PathLike)) else None
        receipt.check_place(os.fspath(o.receipt), path)


def check_update(o: CopyOptions) -> None:
    """ParameterError for ways to update a target that contradict each other."""
    if o.inplace and not o.update:
        raise ParameterError("inplace (--inplace) says how to update a target (--update)")
    if o.update and o.to_device and not o.inplace:
        raise ParameterError(
            "a device can be updated only in place: after a failure it has parts of both states",
            hint="add --inplace",
        )
    if o.update and o.write == "direct":
        raise ParameterError("an update is written through the page cache (--write)")


def wanted(o: CopyOptions) -> Wanted:
    """What the target is to be."""
    partial = bool(o.keep_partial) and not o.to_device
    return Wanted(o.to_device, update=o.update, inplace=o.inplace, partial=partial)


def _internal(o: CopyOptions, target: Target, report: Reporter) -> Options:
    """ParameterError for a value that cannot be."""
    if o.readers is not None and not 0 <= o.readers <= 64:
        raise ParameterError(f"readers={o.readers}: it must be 0 to 64")
    check_proof(o, target)
    limit = o.freeze_limit
    if limit is None:
        limit = FREEZE_LIMIT if o.max_freeze is None else 2 * o.max_freeze + 1
    throttle = None
    if o.throttle_rate is not None:
        from pyploop.freeze.throttle import Throttle

        throttle = Throttle(o.throttle_rate, o.throttle_cgroup, report)
    try:
        stops = [parse_spec(s) if isinstance(s, str) else s for s in o.stops]
    except ValueError as e:
        raise ParameterError(str(e)) from e
    return Options(
        stops=stops,
        resume=o.resume,
        before_thaw=o.before_thaw,
        stall=o.timeout,
        rate=o.bandwidth,
        compression=_compression(o),
        readers=o.readers,
        freeze_limit=limit,
        reserve=o.reserve,
        throttle=throttle,
        proof=o.proof or "auto",
        receipt=None if o.receipt is None else os.fspath(o.receipt),
        policy=Policy(max_freeze=o.max_freeze, deadline=o.deadline, on_deadline=o.on_deadline),
    )
