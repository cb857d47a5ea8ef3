# SPDX-License-Identifier: Apache-2.0
"""The memory of a container that still runs, sent ahead in rounds (pre-dumps), and
how they and the disks' rounds take turns, so that both have little left at the
same moment.

Invariant: what is dumped with a parent lacks nothing that the target does not
have.  A round that fails may have begun the tracking anew, so after it nothing
has a parent: the dump is whole again, as without rounds.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, PyploopError, VzExitCode
from pyploop.migration import deadlines, file_stream, image_chain
from pyploop.migration.memory_policy import MemoryPolicy, MemoryRound, another
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.payload import Copies
from pyploop.report.events import Reporter
from pyploop.report.timeline import Recorder
from pyploop.runtimes import Runtime
from pyploop.system.jobs import Job, end_all
from pyploop.undo.journal import Journal
from pyploop.units import format_size

PREVIEW = 0.25
"""Part of the memory in use that the dump after a round may be larger."""


class Memory:
    """Of one migration, at its source."""

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
        a pre-dump that hangs or fails.  jobs: gets what must have ended before
        anything is undone.  memory: bytes in use, 0 when not known.  policy: None for
        no rounds.  stall, rate: as of the disks."""
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
        """There may be (more) rounds."""
        return self._policy is not None

    @property
    def parent(self) -> int:
        """Number of the round that the dump builds upon, 0 for none."""
        return 0 if self._spoiled else len(self.rounds)

    @property
    def parent_folder(self) -> Path | None:
        return image_chain.folder_of(self._folder, self.parent) if self.parent else None

    def round(self, wire: float) -> bool:
        """One more, if it pays.  wire: bytes per second of the connection, 0 when
        not known."""
        if self._policy is None:
            return False
        number = len(self.rounds) + 1
        age = time.monotonic() - self._began if self.rounds else 0.0
        choice = another(self.rounds, self._policy, memory=self._memory, wire=wire, age=age)
        self._report.info(
            f"Memory round {number}{'' if choice.pays else ' not made'}: {choice.why}"
        )
        if not choice.pays:
            return False
        if not self._one(number, age, choice.expected + int(self._memory * (1 + PREVIEW))):
            self._policy = None
        return self.wanted

    def _one(self, number: int, age: float, room: int) -> bool:
        """False when there is no room for it, or it failed."""
        channel, fd = self._remote.open_channel()
        with file_stream.Writer(fd, self._stall, self._rate) as out:
            try:
                image_chain.check_room(self._folder, room)
                args = {"number": number, "parent": self.parent, "room": room}
                self._remote.call("dump", deadlines.REQUEST, channel=channel, **args)
            except MigrateError as e:
                self._report.note(f"Memory is not copied ahead any further: {e}")
                return False
            entry = self._log.add(self._entry)
            try:
                self._send(number, age, out)
            except (PyploopError, OSError) as e:
                self._undo(e)
            self._log.done(entry)
        return not self._spoiled

    def _send(self, number: int, age: float, out: file_stream.Writer) -> None:
        images = image_chain.folder_of(self._folder, number)
        images.mkdir(mode=0o700)
        parent = self.parent_folder
        self._report.event("phase", phase=f"memory {number}", bytes=None)
        start = self._began = time.monotonic()
        dump = Job(lambda: self._runtime.pre_dump(images, parent))
        stream = Job(lambda: file_stream.stream_dump(images, out, dump))
        self._jobs += [dump, stream]
        try:
            dump.start()
            stream.start()
            frozen = dump.join()
            stream.join()
        except BaseException:
            # A failed pre-dump may have left it frozen: not until the target reads.
            end_all([stream], out.cancel)
            raise
        self._remote.call("join", self._stall, name=f"memory {number}", timeout=self._stall)
        end = time.monotonic()
        self._recorder.add(f"memory {number}", start, end)
        done = MemoryRound(out.sent, end - start, age, frozen)
        self.rounds.append(done)
        self._report.event("memory round", number=number, **vars(done))
        still = "" if frozen is None else f", stood still for {frozen:.3f} s"
        self._report.info(
            f"Memory round {number}: {format_size(done.sent)} in {done.seconds:.3f} s{still}"
        )

    def _undo(self, cause: Exception) -> None:
        """As if the failed round had not been, but for the tracking."""
        self._spoiled = True
        end_all(self._jobs)
        if not self._remote.alive():
            raise cause
        self._runtime.resume()
        state = self._runtime.state()
        if state.suspended or not state.running:
            raise MigrateError(
                VzExitCode.DUMP_FAILED,
                f"the container no longer runs after a failed pre-dump: {cause}",
            ) from cause
        self._report.note(f"A pre-dump failed, so all of the memory is dumped: {cause}")


def policy_for(
    runtime: Runtime, most: int | None, report: Reporter, taken: bool
) -> MemoryPolicy | None:
    """For rounds of memory, `most` at most, where they work; logged in any case.
    most: None when there is no memory to move.  taken: by the target's agent."""
    if most is None:
        return None
    why = "not wanted"
    if most:
        why = runtime.why_no_pre_dump() if taken else "the target's pyploop is too old"
    report.event("pre-dump", works=not why, why=why)
    report.info(f"Memory is copied ahead: no ({why})" if why else "Memory is copied ahead: yes")
    return None if why else MemoryPolicy(max_rounds=most)


def approach(disks: Copies, memory: Memory) -> None:
    """All that is sent while the container runs."""
    if not memory.wanted:
        disks.copy_while_running()
        return
    wire = disks.first_pass()
    memory.round(wire)
    disks.converge()
    while memory.round(wire):
        disks.converge()
    disks.prepare_freeze()
    # That may have waited for a quiet moment (--max-freeze), which memory did not see.
    while memory.round(wire):
        disks.prepare_freeze()
