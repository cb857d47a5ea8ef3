# SPDX-License-Identifier: Apache-2.0
"""The flight recorder: the times of all steps at both ends, on one clock.

All times are seconds of this machine's CLOCK_MONOTONIC.  `Clock` converts the peer's
times; their error is at most half of the shortest round trip.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pyploop.wire import d1

Side = Literal["source", "target"]
Stage = Literal["running", "frozen"]

_CURES = {
    "stop command": "a stop command that does less: --freeze cgroup:PATH takes about a millisecond",
    "source sync": "less to write back after the stop: a slower writer (--throttle), a faster disk",
    "freeze": "a writable /sys/kernel/rcu_expedited, and a stop command that is short",
    "prove": "an idle disk: writes were still in flight",
    "last blocks": "less that is dirty (--max-freeze waits for that), or a faster way to the peer",
    "proof": "less that is dirty (--max-freeze waits for that)",
    "repair": "a kernel whose completion events reach BPF: lost ones had to be found by hash",
    "way there": "a shorter way to the peer, or less in its buffers",
    "remote write": "less that is dirty (--max-freeze waits for that), or a faster target",
    "remote sync": "a target disk that flushes faster",
    "remote commit": "a target file system whose journal is on a faster disk",
    "way back": "a shorter way to the peer",
    "target commit": "a target disk that flushes faster",
    "before thaw": "a shorter --before-thaw command",
    "thaw": "nothing in pyploop: thawing is one system call",
}


@dataclass(frozen=True)
class Span:
    """One step, from `start` to `end` in seconds."""

    name: str
    start: float
    end: float
    side: Side = "source"
    stage: Stage = "running"

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Heard:
    """An answer with times.  asked, got: our clock, seconds.  times: the peer's clock."""

    asked: float
    got: float
    times: d1.Times


class Clock:
    """The peer's clock minus ours, from the exchange with the shortest round trip, as in NTP
    (RFC 5905, section 8).  The error is at most half of that round trip."""

    def __init__(self) -> None:
        self.offset: float | None = None
        """Seconds; None before the first exchange."""
        self.round_trip = 0.0
        """The shortest round trip in seconds, without the peer's own time in between."""

    @property
    def error(self) -> float | None:
        return None if self.offset is None else self.round_trip / 2

    def exchange(self, sent: float, arrived: float, answered: float, got: float) -> None:
        """sent, got: our clock; arrived, answered: the peer's."""
        round_trip = max((got - sent) - (answered - arrived), 0.0)
        if self.offset is None or round_trip <= self.round_trip:
            self.round_trip = round_trip
            self.offset = ((arrived - sent) + (answered - got)) / 2

    def here(self, at: float) -> float:
        """Convert a time of the peer to our clock."""
        return at - (self.offset or 0.0)


@dataclass(frozen=True, eq=False)
class Doing:
    """A step that began at `start` and has not ended."""

    name: str
    start: float


class Recorder:
    """Collects spans in one thread.  Other threads may read `doing`."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.spans: list[Span] = []
        self.clock = Clock()
        self.stage: Stage = "running"
        self.doing: Doing | None = None
        """The innermost step that is under way."""

    def give_up(self) -> None:
        """The freeze is given up: its steps no longer count as frozen."""
        frozen = [s for s in self.spans if s.stage == "frozen"]
        if frozen:
            self.spans = [replace(s, stage="running") for s in self.spans]
            self.add("freeze given up", frozen[0].start, self.now())

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Record the time of the body, also when it fails."""
        start = self.now()
        before, self.doing = self.doing, Doing(name, start)
        try:
            yield
        finally:
            self.doing = before
            self.add(name, start, self.now())

    def add(self, name: str, start: float, end: float, side: Side = "source") -> None:
        self.spans.append(Span(name, start, end, side, self.stage))

    def remote(self, heard: Heard | None) -> None:
        """Record the target's steps before one answer, on our clock."""
        if heard is None:
            return
        t = d1.Times(*(ns / 1e9 for ns in heard.times))  # type: ignore[arg-type]
        self.clock.exchange(heard.asked, t.arrived, t.answered, heard.got)
        steps = {
            "way there": t.arrived,
            "remote write": t.written,
            "remote sync": t.synced,
            "remote commit": t.named,
        }
        at = heard.asked
        for name, end in steps.items():
            if end:
                # The clocks are a little off: no step ends before it begins.
                until = min(max(self.clock.here(end), at), heard.got)
                self.add(name, at, until, "target")
                at = until
        self.add("way back", at, heard.got, "target")
        if t.first:
            # Before the question, too, but not before anything was done here.
            least = min(self.spans[0].start, heard.asked)
            last = min(max(self.clock.here(t.arrived), least), heard.got)
            start = min(max(self.clock.here(t.first), least), last)
            self.add("remote receive", start, last, "target")

    def seconds(self, stage: Stage, side: Side = "source") -> dict[str, float]:
        """Name -> seconds, in order of the first of each name."""
        total: dict[str, float] = {}
        for s in self.spans:
            if (s.stage, s.side) == (stage, side):
                total[s.name] = total.get(s.name, 0.0) + s.seconds
        return total

    def window(self, last: str) -> float:
        """Seconds from the first frozen step to the end of the step `last`."""
        frozen = [s for s in self.spans if s.stage == "frozen" and s.side == "source"]
        ends = [s.end for s in frozen if s.name == last]
        return ends[-1] - frozen[0].start if ends else 0.0

    def frozen_parts(self) -> dict[str, float]:
        """The frozen time by step.  The wait for the target's answer is split into the
        target's own steps, when it has sent their times."""
        return frozen_parts(self.seconds("frozen"), self.seconds("frozen", "target"))

    def advice(self) -> str:
        """One line about the longest step; empty when nothing was frozen."""
        parts = self.frozen_parts()
        total = sum(parts.values())
        if not total:
            return ""
        name = max(parts, key=lambda k: parts[k])
        return (
            f"Largest part: {name}, {parts[name] * 1000:.1f} of {total * 1000:.1f} ms; "
            f"what would shorten it: {_CURES.get(name, 'not known')}"
        )


def frozen_parts(source: dict[str, float], target: dict[str, float]) -> dict[str, float]:
    """As Recorder.frozen_parts, from the seconds of the steps at both ends."""
    parts, remote = dict(source), dict(target)
    remote.pop("remote receive", None)  # meanwhile, we sent
    waited = parts.pop("target commit", None)
    if waited is None:
        return parts
    after: list[str] = [k for k in ("before thaw", "thaw") if k in parts]
    thaw = {k: parts.pop(k) for k in after}
    return {**parts, **(remote or {"target commit": waited}), **thaw}


def chrome_trace(recorder: Recorder) -> str:
    """The Trace Event Format that chrome://tracing and Perfetto read: one
    process for each end, microseconds since the first span."""
    spans = recorder.spans
    zero = min((min(s.start, s.start + s.seconds) for s in spans), default=0.0)
    pids = {"source": 1, "target": 2}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": side}}
        for side, pid in pids.items()
    ]
    events += [
        {
            "ph": "X",
            "name": s.name,
            "cat": s.stage,
            "pid": pids[s.side],
            "tid": 1,
            # What ended before its span was to begin is a moment, at its end.
            "ts": round((min(s.start, s.start + s.seconds) - zero) * 1e6, 1),
            "dur": round(max(s.seconds, 0.0) * 1e6, 1),
        }
        for s in spans
    ]
    clock = recorder.clock
    other = {"clock_offset": clock.offset, "clock_error": clock.error}
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}
    return json.dumps(document, indent=1) + "\n"
