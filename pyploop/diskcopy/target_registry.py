# SPDX-License-Identifier: Apache-2.0
"""The output that a command line names: a stream to a peer, or a local file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pyploop import _core
from pyploop._core import Known, Pump
from pyploop.diskcopy import target_room, write_mode
from pyploop.diskcopy.d1_target import StreamOutput
from pyploop.diskcopy.framing import NATIVE, Compat
from pyploop.diskcopy.lanes import Lanes
from pyploop.diskcopy.relink import Relink
from pyploop.diskcopy.resend import Resend
from pyploop.diskcopy.sinks import NEW_FILE, Wanted, open_sink
from pyploop.diskcopy.target import Output, Packets
from pyploop.diskcopy.target_file import Sink, make_durable
from pyploop.diskcopy.write_mode import PRIOR, Write, WriteMode
from pyploop.disks import backing
from pyploop.disks.backing import Thing
from pyploop.disks.image import HEADER_FRAME
from pyploop.disks.source import Source
from pyploop.errors import ParameterError, PyploopError, SyncError, WriteError
from pyploop.freeze.deadline import Deadline
from pyploop.report.events import Reporter
from pyploop.report.timeline import Heard
from pyploop.system import descriptors
from pyploop.system.worker import run_cancellable
from pyploop.units import SECTOR, format_size
from pyploop.wire.d1 import NO_FEATURES, Feature

if TYPE_CHECKING:
    from pyploop.diskcopy.prior import Contents
    from pyploop.diskcopy.target_device import DeviceSink


class FileOutput:
    """A local file, written in place: a new one (Sink), a device (DeviceSink), or a
    descriptor that the user redirected (`copy -s DEVICE > IMAGE`)."""

    sink = _core.SINK_FILE
    dialect = "local file"
    framing = NATIVE
    packets = Packets()
    features = NO_FEATURES
    proof = b""
    lanes: Lanes | None = None
    resend: Resend | None = None
    prior: Contents | None = None
    header_size = HEADER_FRAME
    heard: Heard | None = None
    end_is_answered = True
    write_mode: WriteMode

    def __init__(
        self,
        target: Sink | DeviceSink | int,
        report: Reporter | None = None,
        write: Write = "auto",
    ) -> None:
        self._sink = None if isinstance(target, int) else target
        self.device = None if isinstance(target, (int, Sink)) else target
        self._holder = self._sink if self._sink is not None and self._sink.has_prior else None
        self.old_contents = self.device is not None or self._holder is not None
        if isinstance(target, int):
            self.fd, self._name = target, f"the output (descriptor {target})"
        else:
            self.fd, self._name = target.fd, target.path
        self._report = report or Reporter()
        self.deadline = Deadline(time.monotonic)
        self.before_end: Callable[[], None] = lambda: None
        self._below = backing.of_file(self.fd)
        self.holds = ""
        """How much of the copy the file has, for messages."""
        if isinstance(target, int):
            # O_DIRECT would be a flag of everyone who shares the descriptor.
            self.write_mode = WriteMode("buffered (a descriptor that others may share)")
        elif self._holder is not None:
            self.write_mode = PRIOR
        else:
            self.write_mode = write_mode.choose(self.fd, self._name, write, self._below)

    def announce(self, source: Source, *, compare_room: bool) -> int:
        found = self._below
        if self.device is not None:
            self.device.expect(source.size)
        else:
            target_room.check_size(self.fd, source.size, found.file_systems[0].fstype, self._name)
        if compare_room:
            left, where = target_room.of_target(found)
            has = os.fstat(self.fd).st_blocks * SECTOR
            target_room.check(source, None if left is None else left + has, where)
        if self._holder is not None:
            from pyploop.diskcopy import prior  # few need it

            self.prior = prior.of_file(self._holder, source.size)
        for words in found.unknown:
            self._report.info(f"It is not known where {words} stores its data")
        return 0

    def things(self) -> set[Thing] | None:
        return self._below.things | (set() if self._sink is None else self._sink.older())

    def refuse(self, error: PyploopError) -> None:
        pass

    def prepare(self, known: Known | None) -> None:
        self.holds = "only a part of the copy"
        end = os.fstat(self.fd).st_size
        if self.device is not None:
            self.device.touched, end = True, self.device.size
        if known is not None and self.prior is None:
            known.assume_data(0, end)

    def hello(self) -> int:
        return 0

    def sync(self, pump: Pump, waiting: bool, start: bytes) -> str:
        self._durable()
        return "local"

    def header(self, pump: Pump, data: bytes) -> None:
        try:
            os.pwrite(self.fd, data, 0)
        except OSError as e:
            raise WriteError.of(f"cannot write the image header to {self._name}", e) from e

    def finish(self, pump: Pump, size: int, start: bytes) -> str:
        if self._sink is not None:
            self._sink.set_size(size)
            sink = self._sink
            run_cancellable(lambda: sink.commit(self.before_end))
            return "local"
        try:
            if os.fstat(self.fd).st_size != size:
                os.ftruncate(self.fd, size)
        except OSError as e:
            raise WriteError.of(f"cannot make {self._name} {size} bytes long", e) from e
        self._durable()
        self.before_end()
        self.holds = "the complete copy"
        return "local"

    def _durable(self) -> None:
        try:
            run_cancellable(lambda: make_durable(self.fd, self._name))
        except OSError as e:
            raise SyncError.of(f"cannot sync {self._name}", e) from e


@contextlib.contextmanager
def open_output(
    *,
    target: str | None,
    out_fd: int,
    feedback: int | None,
    report: Reporter,
    sync_wait: float,
    answer_timeout: float,
    compat: Compat = "auto",
    offered: Feature = NO_FEATURES,
    wanted: Wanted = NEW_FILE,
    write: Write = "auto",
    lanes: Lanes | None = None,
    relink: Relink | None = None,
) -> Iterator[Output]:
    """The output that `-d`, `-o` and `-f` name.  ParameterError when it cannot take an
    image.  Times in seconds.  offered: what a pyploop peer may agree to.  lanes,
    relink: as StreamOutput."""
    if target is not None:
        with open_sink(target, report, wanted) as sink:
            yield FileOutput(sink, report, write)
        return
    mode = descriptors.check_open(out_fd, "-o").st_mode
    flags = fcntl.fcntl(out_fd, fcntl.F_GETFL)
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise ParameterError(f"-o {out_fd} is not open for writing")
    if stat.S_ISREG(mode):
        if flags & os.O_APPEND:
            raise ParameterError(
                f"-o {out_fd} is a file opened for appending (>>): an image is written in place",
                hint="redirect with > instead of >>",
            )
        in_place = FileOutput(out_fd, report, write)
        try:
            yield in_place
        except PyploopError as e:
            if in_place.holds:
                e.add(f"the file of descriptor {out_fd} contains {in_place.holds}")
            raise
        return
    size = descriptors.enlarge_pipe(out_fd)
    if size:
        report.detail(f"Pipe buffer: {format_size(size)}")
    descriptors.no_delay(out_fd)
    with descriptors.nonblocking(out_fd) as fd:
        yield StreamOutput(
            fd,
            feedback,
            report,
            two_way=descriptors.is_socket(out_fd),
            sync_wait=sync_wait,
            answer_timeout=answer_timeout,
            compat=compat,
            offered=offered,
            lanes=lanes,
            relink=relink,
        )
