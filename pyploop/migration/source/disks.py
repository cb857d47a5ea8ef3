# SPDX-License-Identifier: Apache-2.0
"""The disks of one migration, at its source.  All are copied at the same time, each over a
lane of its own, or through a channel of the connection: each step is made for all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from pyploop.diskcopy.d1_target import StreamOutput
from pyploop.diskcopy.freeze_policy import Round
from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.options import Options, Summary
from pyploop.diskcopy.sender import Sender
from pyploop.disks import opening
from pyploop.disks.source import Source
from pyploop.errors import MigrateError, VzExitCode
from pyploop.migration import deadlines
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.disk_lanes import CopiedDisk, DiskLanes
from pyploop.migration.source.remote_digests import RemoteDigests
from pyploop.report.events import Reporter
from pyploop.report.timeline import Span
from pyploop.runtimes import Disk
from pyploop.system.jobs import in_parallel
from pyploop.trackers.registry import choose
from pyploop.transport import deadlines as connection
from pyploop.units import MIB, SECTOR
from pyploop.wire import channels
from pyploop.wire.d1 import NO_FEATURES, Feature

T = TypeVar("T")
MEASURABLE = 16 * MIB
"""Bytes that a first pass must have sent before its speed counts as the connection's."""


@contextlib.contextmanager
def opened(disks: Sequence[Disk]) -> Iterator[list[Source]]:
    """The disks as sources of copies."""
    with contextlib.ExitStack() as stack:
        sources = []
        for disk in disks:
            source = opening.open_source(disk.source)
            stack.callback(source.close)
            sources.append(source)
        yield sources


def allocated(source: Source) -> int:
    """Bytes that a copy of it sends, and needs on the target's disk: holes take none."""
    fd = source.fd if source.sparse_fd is None else source.sparse_fd
    return os.fstat(fd).st_blocks * SECTOR


class Disks:
    """A sender for each source; a context manager, in which tracking is on."""

    def __init__(
        self,
        remote: Remote,
        sources: Sequence[Source],
        options: Options,
        report: Reporter,
        kept: Container[str] = (),
        *,
        trees: int = 0,
    ) -> None:
        """kept: names of what the target can reuse, `disk N` for a disk.  trees: how many
        directory trees are copied beside the disks."""
        self._stack = contextlib.ExitStack()
        self._senders: list[Sender] = []
        self._kept: dict[Sender, RemoteDigests] = {}
        self._wanted = (remote, sources, options, report, kept)
        self._limited = bool(options.rate)
        self._trees = trees
        self._further: dict[int, Lanes] = {}
        """Disk -> its further lanes.  Those that go by a channel have none."""
        self._lanes: DiskLanes | None = None
        self.wire = 0.0
        """Bytes per second of all disks' first passes together; 0 when they do not show the
        connection's speed."""

    def __enter__(self) -> Disks:
        remote, sources, options, report, kept = self._wanted
        needed = channels.needed(len(sources), self._trees)
        spare = min(remote.channels_left, channels.AT_ONCE) - needed
        with self._stack:
            for index, source in enumerate(sources):
                name = f"disk {index}"
                args, ends = self._stream(index)
                reused = name in kept and spare > 0
                if reused:
                    spare -= 1
                    digests = self._stack.enter_context(
                        RemoteDigests(remote, [(name, source.size)], options.stall)
                    )
                    args["reuse"] = True
                remote.call("disk", deadlines.REQUEST, **args)
                out = StreamOutput(
                    *ends,
                    report,
                    two_way=True,
                    sync_wait=0,
                    answer_timeout=options.stall,
                    compat="native",
                    offered=self._offered(reused),
                    lanes=self._further.get(index),
                )
                sender = Sender(source, choose("auto", source), out, options, report)
                self._senders.append(self._stack.enter_context(sender))
                if reused:
                    self._kept[sender] = digests
            self._share_lanes()
            self._stack = self._stack.pop_all()
        return self

    def _stream(self, index: int) -> tuple[dict[str, Any], tuple[int, int]]:
        """How a disk goes: arguments of its request, and descriptors for its stream and the
        answers."""
        remote, _, _, report, _ = self._wanted
        if remote.lanes is not None:
            found = remote.lanes.take(connection.CONNECT)
            if found is not None:
                number, lane = found
                os.set_blocking(lane.wfd, False)
                self._further[index] = Lanes()
                report.info(f"Disk {index} goes over lane {number} to {remote.host}")
                return {"index": index, "channel": 0, "lane": number}, (lane.wfd, lane.rfd)
        number, fd = remote.open_channel()
        self._stack.callback(os.close, fd)
        return {"index": index, "channel": number}, (fd, fd)

    def _offered(self, reused: bool) -> Feature:
        """What the target is asked for.  No proof of a disk of which it has kept a part: it
        has no digests of what it does not receive."""
        offered = Feature.COMPRESSED if self._wanted[2].compression else NO_FEATURES
        return offered if reused else offered | Feature.PROOF

    def _share_lanes(self) -> None:
        remote, sources, _, report, _ = self._wanted
        if remote.lanes is None:
            return
        disks = [CopiedDisk(n, door, allocated(sources[n])) for n, door in self._further.items()]
        self._lanes = DiskLanes(remote, remote.lanes, disks, report)
        self._stack.callback(self._lanes.stop)
        self._lanes.start()

    def settle_lanes(self) -> None:
        """Before the freeze: those that are open stay, and no other is opened."""
        if self._lanes is not None:
            self._lanes.stop()
        self._wanted[0].settle_lanes()

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _cancel(self) -> None:
        for sender in self._senders:
            sender.cancel()
        for digests in self._kept.values():
            digests.reader.cancel()

    def spans(self) -> list[Span]:
        """What each sender did when, for the timeline."""
        return [span for s in self._senders for span in s.recorder.spans]

    def copy_while_running(self) -> None:
        """Make the first pass and the rounds, and prepare the freeze."""

        def one(sender: Sender) -> Round:
            self._compare(sender)
            first = sender.first_pass()
            sender.converge()
            sender.prepare_freeze()
            return first

        self._note_wire(self._each(one))

    def _note_wire(self, first: Sequence[Round]) -> None:
        """first: the first passes, which ran at the same time."""
        sent, seconds = sum(r.sent for r in first), max((r.seconds for r in first), default=0.0)
        enough = not self._limited and sent >= MEASURABLE and seconds > 0
        self.wire = sent / seconds if enough else 0.0

    def forecast(self) -> float:
        """Seconds of the freeze, as it was forecast by the last `prepare_freeze`."""
        return max((s.summary.predicted or 0.0 for s in self._senders), default=0.0)

    # ---- the same in steps, each for all disks

    def first_pass(self) -> float:
        """Returns the bytes per second of all disks together; 0 when that does not show the
        connection's speed."""
        self._each(self._compare)
        self._note_wire(self._each(Sender.first_pass))
        return self.wire

    def converge(self) -> None:
        self._each(Sender.converge)

    def prepare_freeze(self) -> None:
        self._each(Sender.prepare_freeze)

    def _compare(self, sender: Sender) -> None:
        """Find out what of the disk the target has already."""
        if digests := self._kept.get(sender):
            digests.log(self._wanted[3], digests.names[0], sender.reuse(digests.reader))

    def _each(self, step: Callable[[Sender], T]) -> list[T]:
        works: list[Callable[[], T]] = [partial(step, s) for s in self._senders]
        return in_parallel(works, self._cancel)

    def finish(self) -> list[Summary]:
        """Freeze all disks together, send the last blocks, wait until they are durable at
        the target, and thaw.  The container that writes to the disks must stand still,
        for longer than the freeze."""
        with contextlib.ExitStack() as frozen:
            for sender in self._senders:
                frozen.enter_context(sender.frozen())

            def one(sender: Sender) -> None:
                sender.last_blocks()
                sender.finish()

            self._each(one)
        for index, sender in enumerate(self._senders):
            if sender.summary.acknowledged != "acknowledged":
                raise MigrateError(
                    VzExitCode.COPY_FAILED,
                    f"the target did not confirm that disk {index} is durable there",
                )
        return [s.summary for s in self._senders]
