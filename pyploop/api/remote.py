# SPDX-License-Identifier: Apache-2.0
"""`copy`: from and to this host or another one.

A push runs the sender here and the receiver there; a pull the other way round.  The agent
there is asked by a connection of its own, and the data go by a lane (transport/lane.py), so
the stream, its answers and their order are those of a copy through a pipe.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyploop.api.copying import (
    Copy,
    CopyOptions,
    Done,
    Target,
    check_proof,
    check_update,
    run_here,
    wanted,
)
from pyploop.api.reporting import make_reporter
from pyploop.errors import (
    ConnectError,
    Interrupted,
    ParameterError,
    ProtocolError,
    PyploopError,
)
from pyploop.report.events import Reporter
from pyploop.system import descriptors
from pyploop.transport.place import Here, Place, place
from pyploop.units import LONGEST

if TYPE_CHECKING:
    from pyploop.api.remote_host import RemoteHost
    from pyploop.diskcopy.receiver import Received
    from pyploop.report.event_types import Event
    from pyploop.report.results import CopyResult


def copy(
    source: str | os.PathLike[str],
    target: Target,
    *,
    options: CopyOptions | None = None,
    feedback: int | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> CopyResult:
    """Copy a block device or image file that is in use, and freeze it for the last blocks.

    source: a block device, /dev/ploopN, or an image file; or `[user@]host:path` of one on
    another host.  target: see Target; or `[user@]host:path` of a new file on another host.
    One of the two is on this host.  A path with a colon before its first slash is one on
    this host as `./a:b`, or as a PathLike.  feedback: descriptor on which a receiver behind a
    pipe answers.  on_event: is called with each event and line of the log
    (`pyploop.events`), in this thread, those of another host perhaps in another one; what
    happens during the freeze comes after the thaw.

    When it returns, the target is complete and durable, as far as the peer can say
    (`CopyResult.acknowledged`), and the source runs.  When it raises, the source runs too,
    and there is no target unless the message says so.  It raises a PyploopError:
    DeviceError (no source), OpenError (the source is in use), CreateError (the target
    exists), ReadError, WriteError, SyncError, LoopError (the source was written to during
    the freeze, or no freeze fitted), DeviceControlError (tracking or freezing failed),
    CommandError (one of the caller's commands failed), ConnectError (no pyploop on the other
    host, or the connection was lost).
    """
    done = Done()
    run(
        source,
        target,
        options=options or CopyOptions(),
        feedback=feedback,
        report=make_reporter(on_event),
        done=done,
    )
    from pyploop.report.results import copy_result

    return copy_result(done.summary)


def run(
    source: str | os.PathLike[str],
    target: Target,
    *,
    options: CopyOptions,
    report: Reporter,
    done: Done,
    feedback: int | None = None,
) -> None:
    """As `copy`.  done: is filled, also on a failure."""
    from_, to = places(source, target)
    if options.compress is None and (from_.host or to.host):
        options = replace(options, compress="auto")
    if options.proof is None and (from_.host or to.host):
        options = replace(options, proof="auto")
    check_update(options)
    if from_.host:
        _pull(from_, to.path, options, report, done)
    elif to.host:
        _push(from_.path, to, options, report, done)
    else:
        copying = Copy(source, target, options=options, feedback=feedback, reporter=report)
        run_here(copying, done)


def places(source: str | os.PathLike[str], target: Target) -> tuple[Place, Place]:
    """Where both are.  ParameterError: on two other hosts, or one has no path."""
    try:
        from_ = place(source) if isinstance(source, str) else Place("", os.fspath(source))
        to = place(target) if isinstance(target, str) else Place("", "")
    except ValueError as e:
        raise ParameterError(str(e)) from e
    if from_.host and (to.host or not isinstance(target, (str, os.PathLike))):
        raise ParameterError(
            f"{source} and {target} are both not on this host, and one of them must be",
            hint=f"run `pyploop copy` on {from_.host}, or on the target's host",
        )
    if isinstance(target, os.PathLike):
        to = Place("", os.fspath(target))
    return from_, to


def _push(source: str, to: Place, options: CopyOptions, report: Reporter, done: Done) -> None:
    from pyploop.api.bridge import Bridge
    from pyploop.api.more_lanes import MoreLanes
    from pyploop.api.remote_host import RemoteHost
    from pyploop.diskcopy.lanes import Lanes

    _check_options(options)
    check_proof(options, -1)
    with RemoteHost(to.host, options, report) as there, _undone_there(there):
        options = there.keeping_partial("target")
        there.ask("target", path=to.path, options=there.options_for("target"))
        retry = _retry(there, options)
        with there.lane() as lane:
            there.ask("receive")
            # How the target is written is the other host's part.
            options = replace(options, to_device=False, inplace=False, write=CopyOptions.write)
            copying = Copy(
                Here(source), lane.wfd, options=options, feedback=lane.rfd, reporter=report
            )
            copying.target_host, copying.target_path = to.host, to.path
            copying.lanes = lanes = Lanes()
            size = descriptors.length(source)
            more = MoreLanes(there, lanes, report, sending=True, size=size)
            bridge = Bridge(there, lane, more, report, retry)
            copying.relink = bridge if retry else None
            state = ["the source runs", f"a target is on {to.host} only if it is complete"]
            watched = there.watched(lane, copying.cancel, retry)
            with _lost(state), bridge, more, watched as far, more.allowed():
                bridge.is_done = lambda: far.is_done
                run_here(copying, done)
                try:
                    far.result()
                except PyploopError as e:  # it has acknowledged the end
                    report.note(f"The copy is complete and durable, but: {e}")


def _pull(from_: Place, target: str, options: CopyOptions, report: Reporter, done: Done) -> None:
    from pyploop.api.bridge import Bridge
    from pyploop.api.more_lanes import MoreLanes
    from pyploop.api.remote_host import RemoteHost, with_specs
    from pyploop.diskcopy import receiver
    from pyploop.diskcopy.lanes import Lanes
    from pyploop.diskcopy.sinks import open_sink
    from pyploop.report import checked
    from pyploop.report.results import CopyResult

    _check_options(options)
    check_proof(options, target)
    began = time.monotonic()
    options = replace(options, stops=with_specs(options))
    with contextlib.ExitStack() as stack:
        unused = stack.enter_context(contextlib.ExitStack())
        keep = options.keep_partial is not False
        sink = open_sink(target, report, wanted(replace(options, keep_partial=keep)))
        unused.enter_context(sink)
        there = stack.enter_context(RemoteHost(from_.host, options, report))
        stack.enter_context(_undone_there(there))
        there.keeping_partial("source")
        retry = _retry(there, options)
        lane = stack.enter_context(there.lane())
        asked = there.ask("source", path=from_.path, options=there.options_for("source"))
        state = ["no target was made", f"{from_.host} lets the source run again by itself"]
        stack.enter_context(_lost(state))
        lanes = Lanes()
        size = asked.get("size", 0)
        more = MoreLanes(there, lanes, report, sending=False, size=size)
        bridge = stack.enter_context(Bridge(there, lane, more, report, retry))
        stack.enter_context(more)
        far = stack.enter_context(there.watched(lane, bridge.cut, retry))
        stack.enter_context(more.allowed())
        unused.pop_all()  # the receiver closes it
        got = receiver.receive(
            target,
            lane.rfd,
            lane.wfd,
            report,
            options.timeout,
            sink=sink,
            write=options.write,
            lanes=lanes,
            relink=bridge if retry else None,
        )
        far.committed = True
        state[0] = f"{target} is complete and was kept"
        try:
            fields = {**far.result(), "source_host": from_.host}
            done.summary = checked.checked(CopyResult, fields)
            if options.receipt is not None:
                _write_receipt(os.fspath(options.receipt), from_, got, done.summary, began)
        except ValueError as e:
            raise ProtocolError(f"{from_.host}: a wrong result ({e}); {state[0]}") from None
        except ConnectError:
            raise
        except PyploopError as e:
            e.add(state[0])
            raise


def _write_receipt(
    path: str, from_: Place, got: Received, summary: dict[str, Any], began: float
) -> None:
    """Of what was received, which the sender has compared.  WriteError, ProtocolError."""
    from pyploop.diskcopy import receipt

    if got.proof is None:
        raise ProtocolError(f"no receipt was written: {from_.host} keeps no proof")
    now = time.monotonic()
    receipt.make(
        got.proof,
        summary,
        source=(from_.path, from_.host),
        target=(os.path.abspath(got.target), receipt.host()),
        times=(began, now - summary["frozen_window"] if summary["frozen_window"] else None, now),
    ).write(path)


@contextlib.contextmanager
def _lost(state: list[str]) -> Iterator[None]:
    """When the connection is lost in the body, the error says what state things are in."""
    try:
        yield
    except ConnectError as e:
        e.add("; ".join(state))
        raise


def _retry(there: RemoteHost, options: CopyOptions) -> float:
    """Seconds for which lost connections are tried again."""
    return options.retry if options.retry and there.stay(options.retry) else 0.0


def _check_options(options: CopyOptions) -> None:
    """ParameterError for a value that cannot be between two hosts."""
    if not 0 <= options.retry <= LONGEST:
        raise ParameterError(f"retry={options.retry}: it must be 0 to {LONGEST:g} seconds")
    if options.protocol not in ("auto", "native"):
        raise ParameterError(
            f"protocol {options.protocol!r} is for a receiver that was started by hand, and this "
            "one is pyploop"
        )


@contextlib.contextmanager
def _undone_there(there: RemoteHost) -> Iterator[None]:
    """After a failure or a signal in the body, return when the other host has undone its
    part, too."""
    try:
        yield
    except BaseException as e:
        undone = there.undo()
        if isinstance(e, Interrupted):
            e.state += f"; {undone}"
        raise
