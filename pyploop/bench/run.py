# SPDX-License-Identifier: Apache-2.0
"""All stages of a source, of a target, and of the line between them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyploop.bench import forecast, freezes, line, source, target
from pyploop.bench.far_host import FarHost
from pyploop.bench.forecast import Copy
from pyploop.bench.stages import Stage
from pyploop.diskcopy.freeze_policy import Costs
from pyploop.disks import opening
from pyploop.disks.source import Source
from pyploop.system import cpu

SCHEMA = "pyploop.bench/1"


@dataclass(frozen=True)
class Wanted:
    """What is to be measured."""

    source: str = ""
    """Device or image; empty: none."""
    folder: str = ""
    """Of the target; empty: none."""
    host: str = ""
    """Of the folder, as ssh takes it; empty: this host."""
    ssh: Sequence[str] = ("ssh",)
    """ssh, as a program and its arguments."""
    ssh_options: Sequence[str] = ()
    """The user's options for ssh."""
    remote_pyploop: Sequence[str] = ("pyploop",)
    """The command that is pyploop on that host."""
    seconds: float = 2.0
    """For each stage."""
    freeze: bool = False
    """Freeze the source's file systems, for some milliseconds, several times."""


@dataclass(frozen=True)
class Bench:
    """What was measured, and what follows from it."""

    stages: tuple[Stage, ...]
    copy: Copy | None
    """None without a source or without a target."""

    def document(self) -> dict[str, Any]:
        """For --json."""
        stages = [
            {**asdict(s), "values": list(s.values), "median": s.median, "low": s.low}
            | {"high": s.high}
            for s in self.stages
        ]
        copy = None if self.copy is None else asdict(self.copy)
        return {"schema": SCHEMA, "stages": stages, "copy": copy, "aes": "aes" in cpu.flags()}


def bench(wanted: Wanted, tell: Callable[[Stage], None] = lambda _: None) -> Bench:
    """tell: is called with each stage when it is measured.  PyploopError when the source
    cannot be opened, the target not be written, or the host not be reached."""
    run = _Run(wanted, tell)
    with contextlib.ExitStack() as stack:
        opened = None
        if wanted.source:
            opened = opening.open_source(wanted.source)
            stack.callback(opened.close)
        run.all(opened)
        copy = None
        if opened is not None and wanted.folder:
            copy = run.expected(opened)
    return Bench(tuple(run.stages), copy)


class _Run:
    def __init__(self, wanted: Wanted, tell: Callable[[Stage], None]) -> None:
        self._wanted, self._tell = wanted, tell
        self.stages: list[Stage] = []
        self._ratio = 1.0

    def _add(self, *stages: Stage) -> None:
        for stage in stages:
            self.stages.append(stage)
            self._tell(stage)

    def all(self, opened: Source | None) -> None:
        """What may be impossible comes first."""
        wanted, seconds = self._wanted, self._wanted.seconds
        data = source.sample(opened) if opened is not None else b""
        if wanted.host:
            self._line(data or os.urandom(source.SAMPLE))
        elif wanted.folder:
            self._add(*target.measure(wanted.folder, seconds))
        if opened is None:
            return
        self._add(source.read(opened, seconds))
        self._add(*source.processed(data, seconds / 4))
        if wanted.host:
            stage, self._ratio = source.compress(opened, seconds)
            self._add(stage)
        self._add(line.pipe(opened, seconds))
        if opened.is_device:
            self._add(freezes.written(wanted.source, seconds))
        if wanted.freeze:
            self._add(*freezes.freeze(opened))

    def _line(self, data: bytes) -> None:
        wanted = self._wanted
        host = FarHost(wanted.host, wanted.ssh, wanted.ssh_options)
        there, aes = host.measure(wanted.remote_pyploop, wanted.folder, wanted.seconds)
        self._add(*there)
        command = host.command(aes)
        self._add(line.connect(command, wanted.remote_pyploop), line.round_trip(command))
        for stage in line.lanes(command, data, wanted.seconds):
            self._add(stage)

    def expected(self, opened: Source) -> Copy:
        by_name = {s.name: s for s in self.stages}
        write = max(
            (by_name[name] for name in (target.DIRECT, target.BUFFERED) if name in by_name),
            key=lambda s: s.median,
        )
        passed = [by_name[source.READ], write]
        if self._wanted.host:
            # Its data go through a pipe, too.
            passed += [by_name[line.PIPE], self._carried(by_name)]
        median = {s.name: s.median for s in self.stages if s.values}
        costs = Costs(
            freeze=median.get(freezes.WARM, Costs.freeze if opened.mounts else 0.0),
            target=median.get(target.SYNC, Costs.target) + median.get(line.ROUND_TRIP, 0.0),
            target_rate=write.median,
        )
        data = sum(end - start for start, end in opened.holes()[0])
        written = median.get(freezes.WRITTEN, 0.0)
        setup = 0.0
        if self._wanted.host:
            asked = forecast.ROUND_TRIPS * median.get(line.ROUND_TRIP, 0.0)
            setup = median.get(line.CONNECT, 0.0) + asked
        return forecast.expected(data, passed, dirty=written, costs=costs, setup=setup)

    def _carried(self, by_name: dict[str, Stage]) -> Stage:
        """What the fastest number of connections carries; with compression, if that is more."""
        lanes = [by_name[n] for n in map(line.lanes_name, line.LANES) if n in by_name]
        best = max(lanes, key=lambda s: s.median)
        packed = by_name[source.COMPRESS]
        if not packed.values or min(packed.median, best.median / self._ratio) <= best.median:
            return best
        more = tuple(min(packed.median, v / self._ratio) for v in best.values)
        return Stage(f"{best.name}, compressed", "bytes/s", more)
