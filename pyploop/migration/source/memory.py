# SPDX-License-Identifier: Apache-2.0
"""Memory rounds (pre-dumps): the memory is sent while the container still runs.  Memory
rounds and the disks' rounds take turns, so that both have little left at the same moment.

Invariant: a dump with a parent leaves out only pages that the target has.  A failed
round may have restarted the kernel's tracking.  After it nothing has a parent, and the
dump contains all of the memory, as without rounds.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, PyploopError, VzExitCode
from pyploop.migration import deadlines, image_chain
from pyploop.migration.image_channels import ImageWriter
from pyploop.migration.memory_policy import MemoryPolicy, MemoryRound, another
from pyploop.migration.source import dump_stream
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.payload import Copies
from pyploop.report.events import Reporter
from pyploop.report.timeline import Recorder
from pyploop.runtimes import Runtime
from pyploop.system.jobs import Job, end_all
from pyploop.undo.journal import Journal
from pyploop.units import MIB, format_size

PREVIEW = 0.25
"""Room for the dump that follows a round: this part of the memory in use, beyond all of it."""

SHOWS_SPEED = 16 * MIB
"""Bytes that a round must have sent before its speed counts as the connection's."""


class Memory:
    """The memory rounds of one migration, at its source."""

    def __init__(
        self,
        runtime: Runtime,
        remote: Remote,
        folder: Path,
        *,
        undo: tuple[Journal, dict[str, Any]],
        jobs: list[Job[Any]],
        memory: int,
        policy: MemoryPolicy | None,
        stall: float,
        rate: int,
        recorder: Recorder,
        report: Reporter,
    ) -> None:
        """folder: where images are made.  undo: a journal, and the entry that undoes
        a pre-dump that hangs or fails.  jobs: the jobs that must have ended before
        anything is undone; those of a round are added.  memory: bytes in use, 0 when not
        known.  policy: None for no rounds.  stall, rate: as for the disks."""
        self._runtime, self._remote, self._folder = runtime, remote, folder
        self._log, self._entry = undo
        self._jobs, self._memory, self._policy = jobs, memory, policy
        self._stall, self._rate = stall, rate
        self._recorder, self._report = recorder, report
        self._began = 0.0
        self._spoiled = False
        self.rounds: list[MemoryRound] = []

    @property
    def wanted(self) -> bool:
        """Whether another round is possible."""
        return self._policy is not None

    @property
    def age(self) -> float:
        """Seconds since the last round began."""
        return time.monotonic() - self._began if self.rounds else 0.0

    @property
    def speed(self) -> float:
        """Bytes per second of the fastest round that shows it; 0: none does."""
        large = [r for r in self.rounds if r.sent >= SHOWS_SPEED and r.seconds > 0]
        return 0.0 if self._rate else max((r.sent / r.seconds for r in large), default=0.0)

    @property
    def parent(self) -> int:
        """The round that is the dump's parent; 0: none."""
        return 0 if self._spoiled else len(self.rounds)

    def drop_rounds(self) -> None:
        """The dump will have no parent."""
        self._spoiled = True

    @property
    def room(self) -> int:
        """Bytes that the dump needs in images_dir, 0 when that is not known."""
        whole = self._memory if not self.parent else self.rounds[-1].sent
        return int(whole * (1 + PREVIEW))

    @property
    def parent_folder(self) -> Path | None:
        return image_chain.folder_of(self._folder, self.parent) if self.parent else None

    def round(self, wire: float) -> bool:
        """Make one more round, if it pays.  wire: bytes per second of the connection, 0
        when not known.  Returns whether another round is possible after it."""
        if self._policy is None:
            return False
        number = len(self.rounds) + 1
        age = self.age
        choice = another(self.rounds, self._policy, memory=self._memory, wire=wire, age=age)
        self._report.info(
            f"Memory round {number}{'' if choice.pays else ' is left out'}: {choice.why}"
        )
        if not choice.pays:
            return False
        if not self._one(number, age, choice.expected + int(self._memory * (1 + PREVIEW))):
            self._policy = None
        return self.wanted

    def _one(self, number: int, age: float, room: int) -> bool:
        """False when there is no room for the round, or it failed."""
        channel, out = self._remote.open_images(self._stall, self._rate)
        with out:
            try:
                image_chain.check_room(self._folder, room)
                args = {"number": number, "parent": self.parent, "room": room}
                self._remote.call("dump", deadlines.REQUEST, **channel, **args)
            except MigrateError as e:
                self._report.note(f"There are no more memory rounds: {e}")
                return False
            entry = self._log.add(self._entry)
            try:
                self._send(number, age, out)
            except (PyploopError, OSError) as e:
                self._undo(e)
            self._log.done(entry)
        return not self._spoiled

    def _send(self, number: int, age: float, out: ImageWriter) -> None:
        images = image_chain.folder_of(self._folder, number)
        images.mkdir(mode=0o700)
        parent = self.parent_folder
        self._report.event("phase", phase=f"memory {number}", bytes=None)
        start = self._began = time.monotonic()
        dump = Job(lambda: self._runtime.pre_dump(images, parent))
        stream = Job(lambda: dump_stream.stream_dump({"": images}, out, dump))
        self._jobs += [dump, stream]
        try:
            dump.start()
            stream.start()
            frozen = dump.join()
            dump_stream.explained(self._remote, f"memory {number}", stream.join)
        except BaseException:
            # A failed pre-dump may have left the container frozen.  It must not stay so
            # until the target reads the rest of the stream.
            end_all([stream], out.cancel)
            raise
        self._remote.call("join", self._stall, name=f"memory {number}", timeout=self._stall)
        end = time.monotonic()
        self._recorder.add(f"memory {number}", start, end)
        done = MemoryRound(out.sent, end - start, age, frozen)
        self.rounds.append(done)
        self._report.event("memory round", number=number, **vars(done))
        still = "" if frozen is None else f", container frozen for {frozen:.3f} s"
        self._report.info(
            f"Memory round {number}: {format_size(done.sent)} in {done.seconds:.3f} s{still}"
        )

    def _undo(self, cause: Exception) -> None:
        """Undo a failed round.  The kernel's tracking stays lost.  MigrateError(8) when the
        container does not run after it."""
        self._spoiled = True
        end_all(self._jobs)
        if not self._remote.alive():
            raise cause
        self._runtime.resume()
        state = self._runtime.state()
        if state.suspended or not state.running:
            raise MigrateError(
                VzExitCode.DUMP_FAILED,
                "after a failed pre-dump the container does not run on the source any more: "
                f"{cause}",
                hint="look at its state on the source, and start it there if it has ended",
            ) from cause
        self._report.note(
            f"A memory round failed, so the dump will contain all of the memory: {cause}"
        )


def policy_for(
    runtime: Runtime, most: int | None, report: Reporter, taken: bool, useless: str = ""
) -> MemoryPolicy | None:
    """The policy for `most` memory rounds at most; None: no rounds.  The log says which, and
    why.  most: None when there is no memory to move.  taken: whether the target's agent
    takes memory rounds.  useless: why they would save nothing; empty: they may."""
    if most is None:
        return None
    why = "--pre-dumps is 0"
    if most:
        why = useless or runtime.why_no_pre_dump() if taken else "the target's pyploop is too old"
    report.event("pre-dump", works=not why, why=why)
    report.info(f"Memory rounds: no ({why})" if why else f"Memory rounds: {most} at most")
    return None if why else MemoryPolicy(max_rounds=most)


def approach(disks: Copies, memory: Memory) -> None:
    """Send all that is sent while the container runs."""
    if not memory.wanted:
        disks.copy_while_running()
        return
    wire = disks.first_pass()
    memory.round(wire)
    disks.converge()
    while memory.round(wire):
        disks.converge()
    disks.prepare_freeze()
    # That may have waited for a moment with few writes (--max-freeze).  The memory was
    # written to meanwhile.
    while memory.round(wire):
        disks.prepare_freeze()
